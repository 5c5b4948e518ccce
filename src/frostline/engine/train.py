"""The training loop, for any module. Read `train_loop`: it is the order in which things happen."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from frostline.anatomy import Anatomy, fingerprint
from frostline.engine.buffers import FrozenBuffers
from frostline.engine.compiled import Compiled, as_it_is, graphs
from frostline.engine.corrections import forget_load, move_corrections
from frostline.engine.dispatch import set_dispatch
from frostline.engine.evaluation import EvalSet, bits_per_byte
from frostline.engine.events import (
    Evaluated,
    Event,
    Measured,
    Noted,
    Observer,
    RolledBack,
    RunStarted,
    SetEvaluated,
    StageCompiled,
    StageEnded,
    StageStarted,
    StepDone,
)
from frostline.engine.flow import measure_flow
from frostline.engine.nonfinite import find_nonfinite
from frostline.engine.notes import notes_on
from frostline.engine.record import Recorder, named_tensors
from frostline.engine.rollback import Window, batch_of, is_spike, last_return, window_of
from frostline.engine.rounding import Rounding
from frostline.engine.routes import Points, set_routes
from frostline.engine.run_state import RunState, capture, reenter
from frostline.engine.stage_switch import Active, Memory, set_modes, switch
from frostline.engine.step import Countable, LossFunction, step
from frostline.errors import NonFiniteError, RecipeError, RouteError, SpikeError
from frostline.randomness import derive_seed
from frostline.recipe import SpikeSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage, plateaued

CPU = torch.device("cpu")

Moment = Literal["start", "step", "stage end", "stop"]
"""When a state may be saved: before the first step, after a step, at a stage's last one, when the run is stopped."""

BatchFunction = Callable[[int, Stage], Sequence[Countable]]
"""(batch, the stage of its step) → the micro-batches of the step: a pure function. Batches count as steps do, over
those that a rollback has left out."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop runs, beside what the stages say."""

    seed: int = 0
    bf16: bool = False
    rounding: Rounding = "nearest"
    """How weights narrower than fp32 take updates."""
    device: torch.device = CPU
    eval_every: int | None = None
    """Steps between measurements of the held-out loss, beside the start and each stage's end."""
    also: tuple[EvalSet, ...] = ()
    """Other sets that are measured at the same steps; needs held-out data."""
    held_out_bytes: float | None = None
    """UTF-8 bytes of text that a held-out target stands for."""
    gradients_every: int = 10
    """Steps between recorded gradient norms, beside each stage's first and last step."""
    points: Points | None = None
    """Where gradient routes can be set; needed when a stage has routes."""
    flow_every: int | None = None
    """Steps between measurements of where gradients go, from the start of each stage; needs `points`."""
    loss_of: Callable[[Stage], LossFunction] | None = None
    """What each stage minimises, where that is not the loss that is measured."""
    skip_limit: int = 0
    """So many steps in a row that are not finite may be left out; 0: the first one stops the run."""
    spike: SpikeSpec | None = None
    """What loss is a spike, and what then."""
    save: Callable[[int, Moment, Callable[[], RunState]], None] | None = None
    """(steps done, what moment this is, the state on demand) → None; called before the first step, after every one, and
    at a stop."""
    go_back: Callable[[NonFiniteError, int, int, int], RunState] | None = None
    """(why, steps done, the first step to go back to, rollbacks so far) → the state of a checkpoint; raises, if not."""
    compiled: Compiled | None = None
    """The model's compiled blocks."""
    notes: Sequence[str] = ()
    """Told when the run starts."""
    watch: Callable[[Active, int], AbstractContextManager[None]] | None = None
    """(stage in progress, its step) → a context around that step that only looks; for measuring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopResult:
    """How far the loop came."""

    steps: int
    finished: bool
    """Whether every stage ran to its end."""


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
    resumed: RunState | None = None,
) -> LoopResult:
    """Train `model` in place through every stage of `schedule`; the evidence goes to `folder`.

    Says whether every stage ran to its end, and the steps done: not when `stop` said so at the end of a step. Raises
    `NonFiniteError` before an update that would not be finite, `RecipeError` for a plateau without held-out data. Any
    module can be trained: `loss` and `batches` decide what a batch is. `resumed`: go on from this state, in a model as
    it was at the start and a folder that was taken back to it.
    """
    if not held_out and any(s.spec.plateau for s in schedule.stages):
        raise RecipeError("a stage ends at a plateau of the held-out loss, but there is no held-out data")
    if settings.points is None and any(s.routes for s in schedule.stages):
        raise RouteError("a stage has gradient routes, but no points were placed in the model (see `place`)")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    recorder = Recorder(
        folder, model, anatomy, schedule, gradients_every=settings.gradients_every, rounding=settings.rounding
    )
    memory: Memory = {}
    active: Active | None = None
    endings: list[int] = []
    losses: list[float] = []
    done, n_skipped = 0, 0
    recent: list[float] = []
    left_out: list[Window] = []
    proved: Active | None = None
    n_graphs = graphs()

    bytes_each = settings.held_out_bytes

    def tell(event: Event) -> None:
        for observer in (recorder.event, *observers):
            observer(event)

    def measure(stage: Stage, done: int) -> float:
        if not held_out:
            return math.nan
        value = held_out_loss(model, held_out, loss, settings)
        set_modes(model, stage)
        tell(Evaluated(stage=stage, step=done, held_out_loss=value, bits_per_byte=bits_per_byte(value, bytes_each)))
        for s in settings.also:
            of_set = held_out_loss(model, s.batches, loss, settings)
            set_modes(model, stage)
            bits = bits_per_byte(of_set, s.bytes_per_target)
            tell(SetEvaluated(stage=stage, step=done, name=s.name, loss=of_set, bits_per_byte=bits))
        return value

    def enter(saved: RunState) -> Active:
        """Go on from a saved state."""
        nonlocal done, n_skipped, endings, losses, recent, schedule
        done, endings, losses = saved.step, list(saved.endings), list(saved.losses)
        n_skipped, recent = saved.n_skipped, list(saved.recent)
        schedule = schedule.ended(endings)
        memory.clear()
        memory.update(saved.memory)
        entered = reenter(model, anatomy, schedule.stages[saved.stage], saved, settings.rounding)
        enter_routes(settings.points, entered.stage)
        recorder.resume(entered.stage, saved.drifted, ended=len(endings) > saved.stage)
        set_modes(model, entered.stage)
        return entered

    def take_back(why: NonFiniteError, left: Active) -> Active:
        """Go back to a checkpoint of this stage, or of its start, and leave out the batches since. Raises `why`."""
        stage = left.stage
        if settings.go_back is None:
            raise why
        saved = settings.go_back(why, done, max(stage.start, last_return(left_out)), len(left_out))
        left.ownership.release()
        window = window_of(saved.step, done, left_out)
        tell(RolledBack(stage=stage, step=done + 1, to=saved.step, left_out=window, why=why))
        if saved.stage != stage.index:  # the stage's start: what only this stage trains is in no checkpoint
            recorder.put_entry(stage)
        left_out.append(window)
        return enter(saved)

    def state() -> RunState:
        assert active is not None
        return capture(
            named_tensors(model),
            active,
            memory,
            recorder.learned(active.stage),
            step=done,
            endings=tuple(endings),
            losses=tuple(losses),
            drifted=recorder.drifts,
            n_skipped=n_skipped,
            recent=tuple(recent),
            left_out=tuple(left_out),
            records=folder.record_sizes(),
        )

    derived = find_derived_buffers(model, batches(0, schedule.stages[0])[0], loss)
    if resumed is None:
        tell(RunStarted(schedule=schedule))
        for note in settings.notes:
            tell(Noted(text=note))
        recorder.boundary(0, step=0, derived=derived)
    else:
        left_out = list(resumed.left_out)
        active = enter(resumed)
        recorder.lay(schedule)
        tell(RunStarted(schedule=schedule, done=done))
    buffers = FrozenBuffers(model, derived)
    try:
        while done < schedule.n_steps and not stop():
            stage = schedule.at(done)
            if active is None or active.stage.index != stage.index:
                active = switch(parameters, anatomy, stage, memory=memory, leaving=active, rounding=settings.rounding)
                enter_routes(settings.points, stage)
                set_modes(model, stage)
                recorder.entry(stage)
                n_owned = len(active.ownership.owned)
                notes = notes_on(model, stage)
                tell(StageStarted(stage=stage, n_restored=active.n_restored, n_owned=n_owned, notes=notes))
                losses, recent = [], []
                if done == 0:
                    measure(stage, done)
                    if settings.save:
                        settings.save(done, "start", state)
            if settings.flow_every and (done - stage.start) % settings.flow_every == 0:
                tell(_flow(model, stage, held_out, settings, done))
                set_modes(model, stage)
            objective = settings.loss_of(stage) if settings.loss_of else loss
            if settings.compiled is not None and proved is not active:
                first = batches(batch_of(stage.start, left_out), stage)[0]
                tell(_proved(settings.compiled, model, active, first, objective, settings, since=n_graphs))
                buffers.restore()
                proved = active
            with settings.watch(active, done - stage.start) if settings.watch else nullcontext():
                batch, may_skip = batch_of(done, left_out), n_skipped < settings.skip_limit
                forget_load(model, stage)
                try:
                    event = _one_step(
                        model, active, schedule, batches(batch, stage), objective, recorder, settings,
                        at=done, batch=batch, may_skip=may_skip, recent=recent,
                        put_back=lambda: recorder.drifted(buffers.restore()),
                    )  # fmt: skip
                except NonFiniteError as why:
                    recorder.drifted(buffers.restore())  # looking for where it began has computed the step once more
                    active = take_back(why, active)
                    buffers.accept(s.tensor for s in stage.by_rule)
                    continue
            n_skipped = n_skipped + 1 if event.skipped else 0
            recent = recent if event.skipped or not settings.spike else [*recent, event.loss][-settings.spike.window :]
            tell(event)
            if done == stage.start and (text := recorder.loss_warning(stage)):
                tell(Noted(text=text, is_warning=True))
            if not event.skipped:
                buffers.accept(move_corrections(model, stage))
            done += 1
            plateau = stage.spec.plateau
            due = plateau is not None and (done - stage.start) % plateau.every == 0
            if due or done == stage.end or (settings.eval_every and done % settings.eval_every == 0):
                value = measure(stage, done)
                losses += [value] if due else []
            if done == stage.end or (plateau is not None and due and plateaued(losses, plateau)):
                if settings.flow_every:
                    tell(_flow(model, stage, held_out, settings, done))
                endings.append(done)
                schedule = schedule.ended(endings)
                tell(_end_stage(schedule, stage.index, recorder, n_skipped=stage.end - done))
            if settings.save:
                settings.save(done, "stage end" if len(endings) > stage.index else "step", state)
        if settings.save and active is not None and done < schedule.n_steps:
            settings.save(done, "stop", state)
    finally:
        set_dispatch(model, None)
        if active is not None:
            active.ownership.release()
            if settings.points is not None:
                set_routes(settings.points, ())
            if len(endings) <= active.stage.index:  # stopped inside a stage: its evidence ends here
                recorder.boundary(active.stage.index + 1, step=done)
    return LoopResult(steps=done, finished=done == schedule.n_steps)


def enter_routes(points: Points | None, stage: Stage) -> None:
    """Put exactly a stage's routes in force; after its switch, which says what learns."""
    if points is not None:
        set_routes(points, stage.routes)


def _flow(model: nn.Module, stage: Stage, held_out: Sequence[Countable], settings: LoopSettings, done: int) -> Measured:
    assert settings.points is not None
    assert held_out
    flow = measure_flow(model, settings.points, stage, held_out[0], device=settings.device, bf16=settings.bf16)
    return Measured(stage=stage, step=done, flow=flow)


def _proved(
    compiled: Compiled,
    model: nn.Module,
    active: Active,
    micro_batch: Countable,
    loss: LossFunction,
    settings: LoopSettings,
    *,
    since: int,
) -> StageCompiled:
    """Make the graphs of a stage, and hold them against the model itself on one micro-batch."""
    seed = derive_seed(settings.seed, "compiled", active.stage.index)
    proof = compiled.prove(
        model, active.ownership, micro_batch, loss, seed=seed, device=settings.device, bf16=settings.bf16
    )
    return StageCompiled(stage=active.stage, proof=proof, n_graphs=graphs() - since)


def _end_stage(schedule: Schedule, index: int, recorder: Recorder, *, n_skipped: int) -> StageEnded:
    """Write the evidence of a stage that ended; what follows is laid anew when that was before its time."""
    stage = schedule.stages[index]
    recorder.boundary(index + 1, step=stage.end, between=index + 1 < len(schedule.stages))
    if n_skipped:
        recorder.lay(schedule)
    following = schedule.stages[index + 1] if index + 1 < len(schedule.stages) else None
    return recorder.ended(stage, n_skipped=n_skipped, following=following)


def _one_step(
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
    """`put_back`: called after the backward pass, for what the passes have changed beside gradients."""
    started = time.perf_counter()
    stage, ownership, optimizer = active.stage, active.ownership, active.optimizer
    seed = derive_seed(settings.seed, "step", batch)
    computed = step(model, micro_batches, loss, seed=seed, device=settings.device, bf16=settings.bf16)
    if settings.compiled is not None:
        settings.compiled.drop_zeros()
    norm = ownership.norm()
    value = computed.loss.item()  # a device is waited for here; what else must be read from it is read now
    put_back()
    finite = math.isfinite(value) and bool(norm.isfinite())
    if not finite and not may_skip:
        bf16, device = settings.bf16, settings.device
        where = find_nonfinite(
            model, stage.selection, ownership, micro_batches, loss, seed=seed, device=device, bf16=bf16
        )
        raise NonFiniteError(
            f"step {at + 1} (stage {stage.name}, batch {batch}): loss {value}, gradient norm {norm.item()}; stopped "
            f"before the update; {where}",
            loss=value,
            gradient_norm=norm.item(),
        )
    spike = finite and is_spike(value, recent, settings.spike)
    if spike and settings.spike and settings.spike.policy != "warn":
        raise SpikeError(
            f"step {at + 1} (stage {stage.name}, batch {batch}): loss {value:.4g} is a spike, above "
            f"{settings.spike.factor:g} times the median of the {len(recent)} losses before it, "
            f"{statistics.median(recent):.4g}; stopped before the update",
            loss=value,
            gradient_norm=norm.item(),
        )
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


def held_out_loss(model: nn.Module, batches: Sequence[Countable], loss: LossFunction, settings: LoopSettings) -> float:
    """Mean loss per target over `batches`, in evaluation mode (no dropout)."""
    model.eval()
    with as_it_is(), torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        total = sum(loss(model, b).item() for b in batches)
    return total / max(sum(b.n_targets for b in batches), 1)


def find_derived_buffers(model: nn.Module, batch: Countable, loss: LossFunction) -> tuple[str, ...]:
    """Names of the buffers that a plain forward pass without gradients rewrites itself (rotary caches and the like)."""
    before = {name: fingerprint(b) for name, b in model.named_buffers(remove_duplicate=False)}
    if not before:
        return ()
    model.eval()
    with as_it_is(), torch.no_grad():
        loss(model, batch)
    after = dict(model.named_buffers(remove_duplicate=False))
    return tuple(name for name, old in before.items() if name not in after or fingerprint(after[name]) != old)
