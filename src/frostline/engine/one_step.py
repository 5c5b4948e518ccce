"""One optimizer step: what is computed, whether it may be, the update. Read `one_step`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from torch import nn

from frostline.engine.events import StepDone
from frostline.engine.loop_settings import LoopSettings
from frostline.engine.nonfinite import find_nonfinite
from frostline.engine.record import Recorder
from frostline.engine.rollback import is_spike
from frostline.engine.stage_switch import Active
from frostline.engine.step import Countable, LossFunction, step
from frostline.errors import NonFiniteError, SpikeError
from frostline.randomness import derive_seed
from frostline.recipe import SpikeSpec
from frostline.schedule import Schedule, Stage


def one_step(
    model: nn.Module,
    active: Active,
    schedule: Schedule,
    micro_batches: Sequence[Countable],
    loss: LossFunction,
    recorder: Recorder,
    settings: LoopSettings,
    *,
    at: int,
    batch: int,
    may_skip: bool,
    recent: Sequence[float],
    put_back: Callable[[], None],
) -> StepDone:
    """Compute, judge, update. Raises `NonFiniteError`, or `SpikeError`, before the update.

    `at`: steps done. `batch`: which one it takes. `may_skip`: leave an update out that would not be finite. `recent`:
    losses that a spike is told by. `put_back`: called after the backward pass, for what the passes have changed beside
    gradients.
    """
    started = time.perf_counter()
    stage, ownership, optimizer = active.stage, active.ownership, active.optimizer
    device, bf16, seed = settings.device, settings.bf16, derive_seed(settings.seed, "step", batch)
    computed = step(model, micro_batches, loss, seed=seed, device=device, bf16=bf16)
    if settings.compiled is not None:
        settings.compiled.drop_zeros()
    norm = ownership.norm()
    value = computed.loss.item()  # a device is waited for here; what else must be read from it is read now
    put_back()
    finite = math.isfinite(value) and bool(norm.isfinite())
    if not finite and not may_skip:
        where = find_nonfinite(
            model, stage.selection, ownership, micro_batches, loss, seed=seed, device=device, bf16=bf16
        )
        said = f"loss {value}, gradient norm {norm.item()}; stopped before the update; {where}"
        raise NonFiniteError(f"{_named(stage, at, batch)}: {said}", loss=value, gradient_norm=norm.item())
    spike = finite and is_spike(value, recent, settings.spike)
    if spike and settings.spike and settings.spike.policy != "warn":
        said = _spiked(value, recent, settings.spike)
        raise SpikeError(f"{_named(stage, at, batch)}: {said}", loss=value, gradient_norm=norm.item())
    lr = optimizer.set_rate(schedule.rate_at(at))
    if finite:
        recorder.gradients(stage, at + 1, ownership)
        ownership.scale(stage.spec.clip or math.inf, norm)
        shown = active.update(seed=derive_seed(settings.seed, "update", at), measure=recorder.is_due(stage, at + 1))
        recorder.updates(stage, at + 1, shown)
    optimizer.zero_grad()
    return StepDone(
        stage=stage,
        step=at + 1,
        loss=value,
        lr=lr,
        gradient_norm=norm.item(),
        n_targets=computed.n_targets,
        seconds=time.perf_counter() - started,
        skipped=not finite,
        spike=spike,
    )


def _named(stage: Stage, at: int, batch: int) -> str:
    return f"step {at + 1} (stage {stage.name}, batch {batch})"


def _spiked(value: float, recent: Sequence[float], spike: SpikeSpec) -> str:
    return (
        f"loss {value:.4g} is a spike, above {spike.factor:g} times the median of the {len(recent)} losses before it, "
        f"{statistics.median(recent):.4g}; stopped before the update"
    )
