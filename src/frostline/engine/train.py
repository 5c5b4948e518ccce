"""The training loop, for any module. Read `train_loop`: it is the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from frostline.anatomy import Anatomy, fingerprint
from frostline.engine.events import Evaluated, Event, Observer, RunStarted, StageEnded, StageStarted, StepDone
from frostline.engine.record import Recorder
from frostline.engine.stage_switch import Active, Memory, switch
from frostline.engine.step import Countable, LossFunction, step
from frostline.errors import NonFiniteError
from frostline.randomness import derive_seed
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage, lr_at

CPU = torch.device("cpu")

BatchFunction = Callable[[int, Stage], Sequence[Countable]]
"""(step, its stage) → the micro-batches of the step: a pure function."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop runs, beside what the stages say."""

    seed: int = 0
    bf16: bool = False
    device: torch.device = CPU
    eval_every: int | None = None
    """Steps between measurements of the held-out loss, beside the start and each stage's end."""
    gradients_every: int = 10
    """Steps between recorded gradient norms, beside each stage's first and last step."""


def train_loop(
    model: nn.Module,
    anatomy: Anatomy,
    schedule: Schedule,
    batches: BatchFunction,
    loss: LossFunction,
    *,
    folder: RunFolder,
    settings: LoopSettings,
    held_out: Sequence[Countable] = (),
    observers: Sequence[Observer] = (),
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `model` in place through every stage of `schedule`; the evidence goes to `folder`.

    Returns the steps done: fewer than the schedule's when `stop` said so at the end of a step. Raises
    `NonFiniteError` before an update that would not be finite. Any module can be trained: `loss` and `batches`
    decide what a batch is.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    recorder = Recorder(folder, model, anatomy, schedule, gradients_every=settings.gradients_every)
    memory: Memory = {}
    active: Active | None = None

    def tell(event: Event) -> None:
        for observer in (recorder.event, *observers):
            observer(event)

    def measure(stage: Stage, done: int) -> None:
        if held_out:
            value = held_out_loss(model, held_out, loss, settings)
            tell(Evaluated(stage=stage, step=done, held_out_loss=value))

    tell(RunStarted(schedule=schedule))
    derived = find_derived_buffers(model, batches(0, schedule.stages[0])[0], loss)
    recorder.boundary(0, step=0, derived=derived)
    done = 0
    try:
        while done < schedule.n_steps and not stop():
            stage = schedule.at(done)
            if active is None or active.stage is not stage:
                active = switch(parameters, anatomy, stage, memory=memory, leaving=active)
                recorder.entry(stage)
                n_owned = len(active.ownership.owned)
                tell(StageStarted(stage=stage, n_restored=active.n_restored, n_owned=n_owned))
                if done == 0:
                    measure(stage, done)
            tell(_one_step(model, active, batches(done, stage), loss, recorder, settings, at=done))
            done += 1
            if done == stage.end or (settings.eval_every and done % settings.eval_every == 0):
                measure(stage, done)
            if done == stage.end:
                recorder.boundary(stage.index + 1, step=done)
                tell(StageEnded(stage=stage, step=done))
    finally:
        if active is not None:
            active.ownership.release()
            if active.stage.start <= done < active.stage.end:  # stopped inside a stage: its evidence ends here
                recorder.boundary(active.stage.index + 1, step=done)
    return done


def _one_step(
    model: nn.Module,
    active: Active,
    micro_batches: Sequence[Countable],
    loss: LossFunction,
    recorder: Recorder,
    settings: LoopSettings,
    *,
    at: int,
) -> StepDone:
    started = time.perf_counter()
    stage, ownership, optimizer = active.stage, active.ownership, active.optimizer
    model.train()
    seed = derive_seed(settings.seed, "step", at)
    computed = step(model, micro_batches, loss, seed=seed, device=settings.device, bf16=settings.bf16)
    recorder.gradients(stage, at + 1, ownership)
    norm = torch.nn.utils.clip_grad_norm_([o.value for o in ownership.owned], stage.spec.clip or math.inf).item()
    if not (math.isfinite(computed.loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"step {at + 1} (stage {stage.name}): loss {computed.loss}, gradient norm {norm}; stopped before the update"
        )
    lr = lr_at(stage, at)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    ownership.write_back()
    optimizer.zero_grad(set_to_none=True)
    return StepDone(
        stage=stage,
        step=at + 1,
        loss=computed.loss,
        lr=lr,
        gradient_norm=norm,
        n_targets=computed.n_targets,
        seconds=time.perf_counter() - started,
    )


def held_out_loss(model: nn.Module, batches: Sequence[Countable], loss: LossFunction, settings: LoopSettings) -> float:
    """Mean loss per target over `batches`, in evaluation mode (no dropout)."""
    model.eval()
    with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        total = sum(loss(model, b).item() for b in batches)
    return total / max(sum(b.n_targets for b in batches), 1)


def find_derived_buffers(model: nn.Module, batch: Countable, loss: LossFunction) -> tuple[str, ...]:
    """Names of the buffers that a plain forward pass without gradients rewrites itself (rotary caches and the like)."""
    before = {name: fingerprint(b) for name, b in model.named_buffers(remove_duplicate=False)}
    if not before:
        return ()
    model.eval()
    with torch.no_grad():
        loss(model, batch)
    after = dict(model.named_buffers(remove_duplicate=False))
    return tuple(name for name, old in before.items() if name not in after or fingerprint(after[name]) != old)
