"""The time of a step, measured: a few real optimizer steps on random tokens. Read `time_stage`."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.engine import LossFunction, Points, loss_of, next_token_loss, step
from frostline.engine.rounding import Rounding
from frostline.plan.shapes import StepShape, micro_batches
from frostline.plan.trace import entered, update
from frostline.schedule import Stage


def time_stage(
    model: nn.Module,
    anatomy: Anatomy,
    stage: Stage,
    *,
    rows: int,
    length: int,
    n_vocabulary: int,
    shape: StepShape | None = None,
    bf16: bool = False,
    rounding: Rounding = "nearest",
    points: Points | None = None,
    language: LossFunction = next_token_loss,
    n_steps: int = 3,
) -> float:
    """Seconds of an optimizer step of a stage: the median of `n_steps`, after one that warms up. Trains the model."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = (rows, length) if shape is None else (1, shape.computed)
    ids = torch.randint(n_vocabulary, size, generator=generator).to(device)
    active = entered(model, anatomy, stage, rounding, points)
    batches = micro_batches(rows, length, stage.spec.accumulate, ids, shape)
    seconds = []
    for _ in range(1 + n_steps):
        started = time.perf_counter()
        step(model, batches, loss_of(stage, points, language), seed=0, device=device, bf16=bf16)
        update(active)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    active.ownership.release()
    return statistics.median(seconds[1:])
