"""What makes a run cost less and changes nothing of it: chosen by the recipe or by the plan, and said.

Read `prefix_cache_of`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.data import Batch, files_to_hash
from frostline.engine import Chose, Observer, PrefixCache, PrefixSettings
from frostline.environment import describe_environment
from frostline.plan import Plan, why_not_worth
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage

MATTERS = (
    "packages",
    "python",
    "platform",
    "device",
    "device_name",
    "threads",
    "float32_matmul_precision",
    "deterministic_algorithms",
    "cuda_matmul_allow_tf32",
)
"""What of the environment may change the bits of an activation."""

PATHS = ("train", "held_out", "chat_template")
"""Settings of the data that say where it is: what is there has hashes."""


COMPILED = "blocks are compiled, and what they give would be read by others than gave it"


def prefix_cache_of(
    recipe: Recipe,
    model: nn.Module,
    anatomy: Anatomy,
    schedule: Schedule,
    plan: Plan | None,
    *,
    device: torch.device,
    n_rows: int,
    batches: Callable[[int, Stage], Sequence[Batch]],
    say: Callable[[str, str, str], None],
) -> PrefixCache:
    """The cache of a run's frozen prefix, as its recipe wants it. `say`: told (setting, value, why)."""

    def depends_on() -> Mapping[str, Any]:
        found = describe_environment(device=device, data=files_to_hash(recipe.data), base=None)
        return {
            **{key: found[key] for key in MATTERS},
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "data": [row["sha256"] for row in found["data"]],
            "data settings": {k: v for k, v in recipe.as_dict()["data"].items() if k not in PATHS},
        }

    settings = PrefixSettings(
        how=recipe.cache.prefix,
        folder=cache_folder(recipe.cache.dir),
        limit_bytes=recipe.cache.limit_bytes,
        n_rows=n_rows,
        batch=lambda stage: batches(stage.start, stage)[0],
        bf16=recipe.precision == "bf16-mixed",
        depends_on=depends_on,
        worth=lambda stage: COMPILED if recipe.compile != "off" else why_not_worth(plan, schedule, stage),
        say=lambda _stage, value, why: say("cache.prefix", value, why),
    )
    return PrefixCache(model, anatomy, settings)


def cache_folder(named: str | None) -> Path:
    """Where activations are kept: what the recipe names, `$FROSTLINE_CACHE`, or the user's own cache."""
    if named is not None:
        return Path(named)
    if os.environ.get("FROSTLINE_CACHE"):
        return Path(os.environ["FROSTLINE_CACHE"]) / "prefix"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frostline" / "prefix"


def sayer(folder: RunFolder, observers: Sequence[Observer]) -> Callable[[str, str, str], None]:
    """Tells observers of a setting and writes it down; what was said last is not said again."""
    last: dict[str, tuple[str, str]] = {}

    def say(setting: str, value: str, why: str) -> None:
        if last.get(setting) == (value, why):
            return
        last[setting] = (value, why)
        for observer in observers:
            observer(Chose(setting=setting, value=value, why=why))
        folder.append(folder.timing, {"event": "setting", "setting": setting, "value": value, "why": why})

    return say
