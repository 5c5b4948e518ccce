"""The training loop, for any module. Read `train_loop`: it is the order in which things happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import nn

from frostline.anatomy import Anatomy, named_tensors
from frostline.engine.buffers import FrozenBuffers, find_derived_buffers
from frostline.engine.compiled import Compiled, graphs
from frostline.engine.corrections import forget_load, move_corrections
from frostline.engine.dispatch import set_dispatch
from frostline.engine.evaluation import bits_per_byte, held_out_loss
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
    StageStarted,
    StepDone,
)
from frostline.engine.flow import measure_flow
from frostline.engine.loop_settings import BatchFunction, LoopResult, LoopSettings, Moment
from frostline.engine.notes import notes_on
from frostline.engine.one_step import one_step
from frostline.engine.record import Recorder
from frostline.engine.rollback import Window, batch_of, last_return, window_of
from frostline.engine.routes import enter_routes, set_routes
from frostline.engine.run_state import RunState, capture, reenter
from frostline.engine.stage_switch import Active, Memory, set_modes, switch
from frostline.engine.step import Countable, LossFunction
from frostline.errors import NonFiniteError, RecipeError, RouteError
from frostline.randomness import derive_seed
from frostline.run_folder import RunFolder, record_sizes
from frostline.schedule import Schedule, Stage, plateaued


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
    loop = _Loop(model, anatomy, schedule, batches, loss, folder, settings, held_out, observers)
    loop.begin(resumed)
    try:
        while loop.done < loop.schedule.n_steps and not stop():
            loop.advance()
        loop.save("stop")
    finally:
        loop.leave()
    return LoopResult(steps=loop.done, finished=loop.done == loop.schedule.n_steps)


class _Loop:
    """A run in progress: how far it is, and the stage it is in. Read `advance`: it is one step."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        schedule: Schedule,
        batches: BatchFunction,
        loss: LossFunction,
        folder: RunFolder,
        settings: LoopSettings,
        held_out: Sequence[Countable],
        observers: Sequence[Observer],
    ) -> None:
        self.model, self.anatomy, self.schedule, self.settings = model, anatomy, schedule, settings
        self.batches, self.loss, self.held_out, self.folder = batches, loss, held_out, folder
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.recorder = Recorder(
            folder, model, anatomy, schedule, gradients_every=settings.gradients_every, rounding=settings.rounding
        )
        self.observers = (self.recorder.event, *observers)
        self.memory: Memory = {}
        self.active: Active | None = None
        self.done = 0
        """Steps done."""
        self.n_skipped = 0
        """Steps in a row that were left out."""
        self.endings: list[int] = []
        self.losses: list[float] = []
        """Held-out losses of the stage that a plateau looks at."""
        self.recent: list[float] = []
        """Losses of the stage that a spike is compared with."""
        self.left_out: list[Window] = []
        self._proved: Active | None = None
        self._n_graphs = graphs()

    def begin(self, resumed: RunState | None) -> None:
        """Record the start, or go on from a state."""
        derived = find_derived_buffers(self.model, self.batches(0, self.schedule.stages[0])[0], self.loss)
        if resumed is None:
            self.tell(RunStarted(schedule=self.schedule))
            for note in self.settings.notes:
                self.tell(Noted(text=note))
            self.recorder.boundary(0, step=0, derived=derived)
        else:
            self.left_out = list(resumed.left_out)
            self._reenter(resumed)
            self.recorder.lay(self.schedule)
            self.tell(RunStarted(schedule=self.schedule, done=self.done))
        self.buffers = FrozenBuffers(self.model, derived)

    def advance(self) -> None:
        """One optimizer step, and what comes before and after it; or a return to a checkpoint."""
        stage = self.schedule.at(self.done)
        if self.active is None or self.active.stage.index != stage.index:
            self._enter(stage)
        every = self.settings.flow_every
        if every and (self.done - stage.start) % every == 0:
            self._measure_flow(stage)
            set_modes(self.model, stage)
        event = self._step(stage)
        if event is None:
            return
        self.n_skipped = self.n_skipped + 1 if event.skipped else 0
        if self.settings.spike and not event.skipped:
            self.recent = [*self.recent, event.loss][-self.settings.spike.window :]
        self.tell(event)
        if self.done == stage.start and (text := self.recorder.loss_warning(stage)):
            self.tell(Noted(text=text, is_warning=True))
        if not event.skipped:
            self.buffers.accept(move_corrections(self.model, stage))
        self.done += 1
        ended = self._end_if_due(stage, plateaued=self._evaluate_if_due(stage))
        self.save("stage end" if ended else "step")

    def save(self, moment: Moment) -> None:
        """Let the state be saved, if it should be; at a stop only where something is left to do."""
        if self.settings.save and self.active is not None and (moment != "stop" or self.done < self.schedule.n_steps):
            self.settings.save(self.done, moment, self._state)

    def leave(self) -> None:
        """Take out of the model what a stage has put in; where one was not ended, its evidence ends here."""
        set_dispatch(self.model, None)
        if self.active is None:
            return
        self.active.ownership.release()
        if self.settings.points is not None:
            set_routes(self.settings.points, ())
        if len(self.endings) <= self.active.stage.index:
            self.recorder.boundary(self.active.stage.index + 1, step=self.done)

    def tell(self, event: Event) -> None:
        """Every observer, the recorder first."""
        for observer in self.observers:
            observer(event)

    def _enter(self, stage: Stage) -> None:
        """The switch into a stage."""
        active = switch(
            self.parameters,
            self.anatomy,
            stage,
            memory=self.memory,
            leaving=self.active,
            rounding=self.settings.rounding,
        )
        self.active = active
        enter_routes(self.settings.points, stage)
        set_modes(self.model, stage)
        self.recorder.entry(stage)
        n_owned, notes = len(active.ownership.owned), notes_on(self.model, stage)
        self.tell(StageStarted(stage=stage, n_restored=active.n_restored, n_owned=n_owned, notes=notes))
        self.losses, self.recent = [], []
        if self.done == 0:
            self._evaluate(stage)
            self.save("start")

    def _step(self, stage: Stage) -> StepDone | None:
        """One step; None where it was not finite and the run went back to a checkpoint."""
        assert self.active is not None
        settings, active = self.settings, self.active
        objective = settings.loss_of(stage) if settings.loss_of else self.loss
        if settings.compiled is not None and self._proved is not active:
            first = self.batches(batch_of(stage.start, self.left_out), stage)[0]
            since = self._n_graphs
            self.tell(_proved(settings.compiled, self.model, active, first, objective, settings, since=since))
            self.buffers.restore()
            self._proved = active
        with settings.watch(active, self.done - stage.start) if settings.watch else nullcontext():
            batch = batch_of(self.done, self.left_out)
            forget_load(self.model, stage)
            try:
                return one_step(
                    self.model,
                    active,
                    self.schedule,
                    self.batches(batch, stage),
                    objective,
                    self.recorder,
                    settings,
                    at=self.done,
                    batch=batch,
                    may_skip=self.n_skipped < settings.skip_limit,
                    recent=self.recent,
                    put_back=self._put_back,
                )
            except NonFiniteError as why:
                self._put_back()  # looking for where it began has computed the step once more
                self._take_back(why)
                self.buffers.accept(s.tensor for s in stage.by_rule)
                return None

    def _put_back(self) -> None:
        """Undo, and note, what passes in training mode have written into buffers."""
        self.recorder.drifted(self.buffers.restore())

    def _evaluate_if_due(self, stage: Stage) -> bool:
        """Measure where the stage or the run asks for it; whether a plateau has ended the stage."""
        plateau, every = stage.spec.plateau, self.settings.eval_every
        due = plateau is not None and (self.done - stage.start) % plateau.every == 0
        if due or self.done == stage.end or (every and self.done % every == 0):
            value = self._evaluate(stage)
            self.losses += [value] if due else []
        return plateau is not None and due and plateaued(self.losses, plateau)

    def _evaluate(self, stage: Stage) -> float:
        """The held-out loss, and those of the other sets."""
        if not self.held_out:
            return math.nan
        model, settings, done = self.model, self.settings, self.done
        measured = settings.measure_of(stage) if settings.measure_of else self.loss
        value = held_out_loss(model, self.held_out, measured, settings)
        set_modes(model, stage)
        bits = bits_per_byte(value, settings.held_out_bytes)
        self.tell(Evaluated(stage=stage, step=done, held_out_loss=value, bits_per_byte=bits))
        for s in settings.also:
            of_set = held_out_loss(model, s.batches, measured, settings)
            set_modes(model, stage)
            bits = bits_per_byte(of_set, s.bytes_per_target)
            self.tell(SetEvaluated(stage=stage, step=done, name=s.name, loss=of_set, bits_per_byte=bits))
        return value

    def _end_if_due(self, stage: Stage, *, plateaued: bool) -> bool:
        """Write the evidence of a stage at its end; what follows is laid anew when that is before its time."""
        if self.done != stage.end and not plateaued:
            return False
        if self.settings.flow_every:
            self._measure_flow(stage)
        self.endings.append(self.done)
        n_left = stage.end - self.done
        self.schedule = self.schedule.ended(self.endings)
        stage = self.schedule.stages[stage.index]
        later = self.schedule.stages[stage.index + 1 :]
        self.recorder.boundary(stage.index + 1, step=stage.end, between=bool(later))
        if n_left:
            self.recorder.lay(self.schedule)
        self.tell(self.recorder.ended(stage, n_skipped=n_left, following=later[0] if later else None))
        return True

    def _measure_flow(self, stage: Stage) -> None:
        settings = self.settings
        assert settings.points is not None
        assert self.held_out
        flow = measure_flow(
            self.model, settings.points, stage, self.held_out[0], device=settings.device, bf16=settings.bf16
        )
        self.tell(Measured(stage=stage, step=self.done, flow=flow))

    def _reenter(self, saved: RunState) -> None:
        """Go on from a saved state."""
        self.done, self.endings, self.losses = saved.step, list(saved.endings), list(saved.losses)
        self.n_skipped, self.recent = saved.n_skipped, list(saved.recent)
        self.schedule = self.schedule.ended(self.endings)
        self.memory.clear()
        self.memory.update(saved.memory)
        stage = self.schedule.stages[saved.stage]
        self.active = reenter(self.model, self.anatomy, stage, saved, self.settings.rounding)
        enter_routes(self.settings.points, stage)
        self.recorder.resume(stage, saved.drifted, ended=len(self.endings) > saved.stage)
        set_modes(self.model, stage)

    def _take_back(self, why: NonFiniteError) -> None:
        """Go back to a checkpoint of this stage, or of its start, and leave out the batches since. Raises `why`."""
        assert self.active is not None
        stage = self.active.stage
        if self.settings.go_back is None:
            raise why
        since = max(stage.start, last_return(self.left_out))
        saved = self.settings.go_back(why, self.done, since, len(self.left_out))
        self.active.ownership.release()
        window = window_of(saved.step, self.done, self.left_out)
        self.tell(RolledBack(stage=stage, step=self.done + 1, to=saved.step, left_out=window, why=why))
        if saved.stage != stage.index:  # the stage's start: what only this stage trains is in no checkpoint
            self.recorder.put_entry(stage)
        self.left_out.append(window)
        self._reenter(saved)

    def _state(self) -> RunState:
        """Everything that a run needs to go on from here."""
        assert self.active is not None
        return capture(
            named_tensors(self.model),
            self.active,
            self.memory,
            self.recorder.learned(self.active.stage),
            step=self.done,
            endings=tuple(self.endings),
            losses=tuple(self.losses),
            drifted=self.recorder.drifts,
            n_skipped=self.n_skipped,
            recent=tuple(self.recent),
            left_out=tuple(self.left_out),
            records=record_sizes(self.folder),
        )


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
