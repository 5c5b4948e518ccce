"""Batches that a rollback leaves out, and losses that spike: pure functions. Read `batch_of` first.

A run that goes back to a checkpoint does not train again on the batches that led it astray (as PaLM's did): its steps
go on, over the *windows* of batches that were left out. Windows are part of the run's state, so which batch a step
takes is a function of seed, step and windows, whatever the kills and the resumes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from frostline.recipe import SpikeSpec

Window = tuple[int, int]
"""The first batch that is left out, and the one after the last."""


def batch_of(step: int, left_out: Sequence[Window]) -> int:
    """The batch (0-based) that `step` (0-based) trains on; windows follow one another and do not overlap."""
    for first, after in left_out:
        if step >= first:
            step += after - first
    return step


def window_of(back_to: int, step: int, left_out: Sequence[Window]) -> Window:
    """The batches of the steps from `back_to` up to and including `step` (both 0-based)."""
    return batch_of(back_to, left_out), batch_of(step, left_out) + 1


def last_return(left_out: Sequence[Window]) -> int:
    """The step (steps done) that the last rollback went back to; no later one goes further back. 0 without any."""
    return left_out[-1][0] - sum(after - first for first, after in left_out[:-1]) if left_out else 0


def is_spike(loss: float, recent: Sequence[float], spec: SpikeSpec | None) -> bool:
    """Whether a loss is far above the stage's losses before it."""
    if spec is None or len(recent) < spec.window or not math.isfinite(loss):
        return False
    return loss > spec.factor * statistics.median(recent[-spec.window :])
