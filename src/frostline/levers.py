"""What makes a run cost less and changes nothing of it: chosen by the recipe or by the plan, and said.

Read `recompute_for`, `freed_memory_for`, `prefix_cache_of`, and `prefix_outlook`, which says beforehand what will
become of the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.data import Batch, Layout, files_to_hash, rows_at
from frostline.engine import Chose, Observer, PrefixCache, PrefixSettings
from frostline.engine.freed_memory import can_be_kept
from frostline.engine.prefix import NoPrefixError, depth_of
from frostline.environment import MATTERS, describe_environment
from frostline.errors import ModelError, first_line
from frostline.plan import Plan, why_not_worth
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage
from frostline.units import format_bytes

KEPT = 0.8
"""The share of what compiled blocks would keep for their backward pass that they do keep, where that costs no time."""
FULL = 0.9
"""The share of a device's memory from which on a run is not begun without computing blocks again."""
PATHS = ("train", "held_out", "chat_template")
"""Settings of the data that say where it is: what is there has hashes."""


COMPILED = "blocks are compiled, and what they give would be read by others than gave it"


def recompute_for(recipe: Recipe, plan: Plan | None, device: torch.device) -> Chose:
    """Whether blocks are computed again for their backward pass: by the recipe, or because it would not fit else."""

    def chose(value: str, why: str) -> Chose:
        return Chose(setting="recompute", value=value, why=why)

    if recipe.recompute != "auto":
        return chose(str(recipe.recompute), "asked for")
    cheap = recipe.compile == "blocks" and recipe.precision == "fp32" and device.type == "cpu"
    small = str(KEPT) if cheap else "off"
    memory = memory_of(device)
    if plan is None or memory is None:
        return chose(small, "what the run needs, or what there is, is not known")
    worst = max(s.cost.peak_bytes if device.type == "cuda" else s.cost.resident_bytes for s in plan.stages)
    numbers = f"a step needs about {format_bytes(worst)}, there are {format_bytes(memory)}"
    if worst > FULL * memory:
        return chose("blocks", numbers)
    return chose(small, "what is cheap for compiled blocks is computed again" if cheap else numbers)


def kept_share(chosen: str) -> float:
    """What compiled blocks keep of what they would keep, for a value of `recompute`: 1.0 where that is no share."""
    return 1.0 if chosen in ("off", "blocks") else float(chosen)


def freed_memory_for(recipe: Recipe, device: torch.device) -> Chose:
    """Whether freed memory stays with the process: by the recipe, or where a step's tensors are the host's."""

    def chose(value: str, why: str) -> Chose:
        return Chose(setting="freed_memory", value=value, why=why)

    if recipe.freed_memory == "keep" and not can_be_kept():
        return chose("return", "asked to keep it, but that is for glibc's allocator alone")
    if recipe.freed_memory != "auto":
        return chose(recipe.freed_memory, "asked for")
    if device.type != "cpu":
        return chose("return", "the tensors of a step are on the device")
    if not can_be_kept():
        return chose("return", "the allocator is not glibc's")
    return chose("keep", "each step uses the pages of the one before")


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, torch uses what gives the same bits every time. Raises `ModelError` for an operation that has no such
    implementation; nothing is changed where it is not wanted."""
    if not wanted:
        yield
        return
    before, tuned = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ModelError(
            f"deterministic: true, but this model needs an operation without such a way: {first_line(error)}"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = tuned


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """Whether a stage's frozen prefix will be kept, as far as that is known before the run tries it."""

    stage: str
    kept: bool
    why: str
    n_bytes: int
    """Of all training rows; 0 where nothing is below what learns."""


def prefix_outlook(recipe: Recipe, plan: Plan, schedule: Schedule, layout: Layout) -> tuple[Outlook, ...]:
    """What will become of `cache.prefix` in every stage."""
    return tuple(_outlook(recipe, plan, schedule, stage, layout) for stage in schedule.stages)


def _outlook(recipe: Recipe, plan: Plan, schedule: Schedule, stage: Stage, layout: Layout) -> Outlook:
    n_bytes, limit = plan.stages[stage.index].prefix_bytes, recipe.cache.limit_bytes

    def found(why: str, *, kept: bool = False) -> Outlook:
        return Outlook(stage=stage.name, kept=kept, why=why, n_bytes=n_bytes)

    if recipe.cache.prefix == "off":
        return found("asked for")
    try:
        depth_of(stage.selection.anatomy, stage)
    except NoPrefixError as error:
        return found(str(error))
    why = None if recipe.cache.prefix == "on" else worth(recipe, plan, schedule, stage)
    if why is not None:
        return found(why)
    if layout not in ("stream", "packed"):
        return found("rows of this data have no fixed length")
    if n_bytes > limit:
        return found(f"it would hold {n_bytes:,} bytes and the limit is {limit:,}")
    return found("asked for" if recipe.cache.prefix == "on" else "it pays", kept=True)


def worth(recipe: Recipe, plan: Plan | None, schedule: Schedule, stage: Stage) -> str | None:
    """Why a stage's cache does not pay; None where it does."""
    return COMPILED if recipe.compile != "off" else why_not_worth(plan, schedule, stage)


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
    measured: Sequence[Batch],
    say: Callable[[str, str, str], None],
) -> PrefixCache:
    """The cache of a run's frozen prefix, as its recipe wants it. `measured`: every batch that is measured. `say`:
    told (setting, value, why)."""

    def depends_on() -> Mapping[str, Any]:
        found = describe_environment(device=device, data=files_to_hash(recipe.data), base=None)
        return {
            **{key: found[key] for key in MATTERS},
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "data": [row["sha256"] for row in found["data"]],
            "compile": recipe.as_dict().get("compile"),
            "data settings": {k: v for k, v in recipe.as_dict()["data"].items() if k not in PATHS},
        }

    settings = PrefixSettings(
        how=recipe.cache.prefix,
        folder=cache_folder(recipe.cache.dir),
        limit_bytes=recipe.cache.limit_bytes,
        n_rows=n_rows,
        batch=lambda stage: batches(stage.start, stage)[0],
        measured=measured,
        rows_of=lambda step: rows_at(step, seed=recipe.seed, n_rows=n_rows, batch=recipe.data.batch),
        bf16=recipe.precision == "bf16-mixed",
        depends_on=depends_on,
        worth=lambda stage: worth(recipe, plan, schedule, stage),
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
