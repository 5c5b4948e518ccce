"""What Frostline adds to a checkpoint of the Trainer: `frostline.json`, and what it takes of the Trainer's log.

The file is written after everything else of the checkpoint, whole or not at all: one without it was not finished, or
not saved in a run under Frostline. Read `write_progress` and `read_progress`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostline.errors import RunFolderError
from frostline.progress import Progress
from frostline.storage import write_text

FILE = "frostline.json"
STATE = "trainer_state.json"
NEEDED = ("optimizer.pt", "scheduler.pt")
"""What the Trainer leaves out with save_only_model=True; it would go on without, and not say so."""
NAMES = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "lr", "eval_loss": "held_out_loss"}
"""The Trainer's names of numbers → those of `metrics.jsonl`."""
NOT_THE_SEEDS = ("_runtime", "_per_second", "total_flos", "train_loss", "epoch")
"""Ends of names of clocks and totals: `metrics.jsonl` holds what the seed determines, step by step."""


def write_progress(checkpoint: Path, progress: Progress) -> None:
    """Finish a checkpoint. Raises `StorageError`."""
    write_text(checkpoint / FILE, json.dumps({"schema": 1, **progress.to_json()}, indent=1, ensure_ascii=False) + "\n")


def read_progress(checkpoint: Path) -> Progress:
    """Where the run was when the checkpoint was saved. Raises `RunFolderError` when nothing exact can go on from it."""
    missing = [name for name in NEEDED if not (checkpoint / name).exists()]
    if missing:
        raise RunFolderError(
            f"{checkpoint} has no {', '.join(missing)} (save_only_model=True?): the Trainer would go on with an "
            "optimizer that starts afresh. Load its model with from_pretrained, and attach a new run to that"
        )
    if not (checkpoint / FILE).exists():
        raise RunFolderError(f"{checkpoint} has no {FILE}: {_why_not(checkpoint)}")
    progress = Progress.from_json(_object(checkpoint / FILE), checkpoint / FILE)
    step = _object(checkpoint / STATE).get("global_step")
    if step != progress.step:
        raise RunFolderError(f"{checkpoint}: {STATE} is of step {step}, and {FILE} of step {progress.step}")
    return progress


def _why_not(checkpoint: Path) -> str:
    others = sorted(p.parent.name for p in checkpoint.parent.glob(f"checkpoint-*/{FILE}"))
    if others:
        return f"it was not finished when the run ended; resume from another: {', '.join(others)}"
    return (
        "it was not saved in a run that Frostline was attached to, so what happened before it cannot be shown. Load "
        "its model with from_pretrained, and attach a new run to that"
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is not readable: {error}") from None
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} is not readable: it holds no object")
    return data


def numbers_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """What of the Trainer's log goes into `metrics.jsonl`."""
    kept = {k: v for k, v in logs.items() if isinstance(v, int | float) and not k.endswith(NOT_THE_SEEDS)}
    return {NAMES.get(k, k): v for k, v in kept.items() if k not in ("step", "stage") and not math.isnan(v)}
