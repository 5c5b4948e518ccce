"""Frostline in anybody's own training loop: `with frostline.learning(model, "ffn", out="runs/mine") as run:`.

Inside, exactly what was named learns. The loop stays as it is: forward, backward, its own optimizer's `step` and
`zero_grad`. The optimizer is made from `run.parameter_groups()`, because part of a tensor is owned by a leaf of its
own; copying it back, sampling gradients and putting buffers back happen at every optimizer step by themselves.
Afterwards `frostline audit` reads the run folder. Read `learning` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from frostline.anatomy import Anatomy, anatomy_of_parts, read_anatomy
from frostline.audit import Audit, audit
from frostline.engine.buffers import FrozenBuffers
from frostline.engine.owned import Ownership
from frostline.engine.recompute import left_out, recomputed
from frostline.engine.record import Recorder, cut_pieces
from frostline.engine.stage_switch import Active, flags_of, frozen_modules, reshard, set_flags, switch
from frostline.environment import describe_environment, hash_file
from frostline.errors import FrostlineError, RunFolderError
from frostline.model import save_model
from frostline.progress import Progress, check_it_goes_on, hashes_of, misfits, name_of, note_differences
from frostline.recipe import StageSpec
from frostline.run_folder import RunFolder, State, record_sizes, rewind
from frostline.schedule import Schedule, norms_and_biases
from frostline.selection import Selection, select
from frostline.storage import storage_errors


@contextmanager
def learning(
    model: nn.Module,
    learn: str | Sequence[str],
    *,
    out: str | Path,
    parts: Mapping[str, Sequence[str]] | None = None,
    ties: bool = False,
    frozen_dropout: bool = False,
    gradients_every: int = 10,
    steps: Sequence[int] | None = None,
    since: Progress | None = None,
) -> Iterator[Learning]:
    """Let exactly `learn` learn inside the context, and write the evidence into the new folder `out`.

    `learn`: a selection, or one per stage (`run.next_stage()` enters the next). `parts`: the parts of a module that is
    no causal language model of transformers, as in `anatomy_of_parts`. `ties`: let tied parts follow each other.
    `frozen_dropout`: leave dropout on in modules of which nothing learns. Gradient norms are recorded at the first and
    every `gradients_every`-th optimizer step of a stage, and at the last where `steps` says how many each will have.
    `since`: what `run.progress()` gave at a checkpoint; the records in `out` are taken back to it and go on, once the
    model's weights are those of then. Raises a `FrostlineError` for a wrong selection, a folder that is not empty (or,
    to go on, is not the run's own), or an optimizer that holds something else than what learns.
    """
    anatomy = read_anatomy(model) if parts is None else anatomy_of_parts(model, parts)
    expressions = [learn] if isinstance(learn, str) else list(learn)
    selections = [select(anatomy, e, ties="together" if ties else "error") for e in expressions]
    before = flags_of(model)
    folder = RunFolder.create(out) if since is None else RunFolder.open(out)
    settings = _Settings(frozen_dropout=frozen_dropout, gradients_every=gradients_every, steps=steps, since=since)
    run = Learning(model, anatomy, selections, folder, settings)
    try:
        yield run
    except BaseException as error:
        run._close("failed", f"{type(error).__name__}: {error}")
        raise
    else:
        run._close("finished", "")
    finally:
        set_flags(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """What `learning` was asked for, beside what learns."""

    frozen_dropout: bool
    gradients_every: int
    steps: Sequence[int] | None
    since: Progress | None


class Learning:
    """A run in a loop of one's own; made by `learning`."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        selections: Sequence[Selection],
        folder: RunFolder,
        settings: _Settings,
    ) -> None:
        self.model, self.anatomy, self.folder = model, anatomy, folder
        since = settings.since
        self.steps = since.step if since else 0
        """Optimizer steps done."""
        dropout: Literal["on", "off"] = "on" if settings.frozen_dropout else "off"
        # unless the loop says it, how long a stage lasts is known when it ends; its rates are the loop's own
        steps = settings.steps or [1] * len(selections)
        named = [
            (f"stage-{i + 1}", StageSpec(learn=s.expression, steps=n, lr=1.0, frozen_dropout=dropout), s)
            for i, (s, n) in enumerate(zip(selections, steps, strict=True))
        ]
        self._endings = list(since.endings) if since else []
        self._schedule = Schedule.of(named).ended(self._endings)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        # no batch is at hand to find what a forward pass rewrites itself: what no checkpoint holds counts as that
        derived = tuple(t.name for t in anatomy.tensors if t.kind == "buffer" and not t.persistent)
        self._recorder = self._go_on(since, settings) if since else self._begin(derived, settings)
        self._buffers = FrozenBuffers(model, derived)
        self._stepped: set[int] = set()
        self._retired: set[nn.Parameter] = set()
        self._recomputed = ExitStack()
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)),
            model.register_forward_pre_hook(lambda *_: self._still_the_frozen()),
        ]
        self._active = self._enter(since.stage if since else 0, None, again=since is not None)

    def _begin(self, derived: tuple[str, ...], settings: _Settings) -> Recorder:
        """Start the records: who, where, and every piece as it is."""
        environment = describe_environment(device=self._device, data=(), base=None)
        self.folder.write_status("running", step=0)
        self.folder.write_json("environment.json", {"run": uuid4().hex, **environment})
        recorder = self._make_recorder(settings)
        recorder.boundary(0, step=0, derived=derived)
        return recorder

    def _go_on(self, since: Progress, settings: _Settings) -> Recorder:
        """Take the records back to where they were then. Raises `RunFolderError`, and changes nothing, unless the run
        and the weights are those of then."""
        selections = [s.selection for s in self._schedule.stages]
        check_it_goes_on(since, self.folder, [s.expression for s in selections])
        wrong = misfits(since, self.folder, self.model, cut_pieces(self.anatomy, selections))
        if wrong:
            raise RunFolderError(
                f"the model is not the one that was saved after step {since.step}: {', '.join(wrong[:5])}"
                + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )
        rewind(self.folder, since.records)
        self.folder.write_status("running", step=since.step)
        note_differences(self.folder, self._device, since.step)
        recorder = self._make_recorder(settings)
        recorder.resume(self._schedule.stages[since.stage], since.drifted, ended=False)
        return recorder

    def _make_recorder(self, settings: _Settings) -> Recorder:
        every = settings.gradients_every
        return Recorder(self.folder, self.model, self.anatomy, self._schedule, gradients_every=every, loop="own")

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def stage(self) -> str:
        """The name of the stage in progress."""
        return self._active.stage.name

    @property
    def stage_index(self) -> int:
        """Which of the stages that is (0-based)."""
        return self._active.stage.index

    @property
    def selection(self) -> Selection:
        """What learns now."""
        return self._active.stage.selection

    @property
    def ownership(self) -> Ownership:
        """The leaves that an optimizer may change."""
        return self._active.ownership

    def parameter_groups(self, *, weight_decay: float = 0.0, **settings: Any) -> list[dict[str, Any]]:
        """Groups for any torch optimizer: what learns now, and nothing else; norms and biases without weight decay."""
        plain = norms_and_biases(self.anatomy)
        decayed = [o.value for o in self.ownership.owned if o.piece.tensor not in plain]
        others = [o.value for o in self.ownership.owned if o.piece.tensor in plain]
        groups = [(decayed, weight_decay), (others, 0.0)]
        return [{"params": p, "weight_decay": decay, **settings} for p, decay in groups if p]

    def clip(self, max_norm: float) -> float:
        """Scale the gradients of what learns down to an L2 norm of `max_norm`; returns the norm before."""
        return self.ownership.clip(max_norm).item()

    def log(self, **numbers: float) -> None:
        """Add numbers, such as `loss=…`, to `metrics.jsonl` under the steps done so far."""
        self.folder.append(self.folder.metrics, {"step": self.steps, "stage": self.stage, **numbers})

    def skip(self) -> None:
        """Count a step for which the loop made no update, as with a gradient scaler whose numbers overflowed; the
        gradients of parts of tensors are dropped, which no `model.zero_grad()` knows."""
        self.steps += 1
        self._forget_gradients({o.value for o in self.ownership.owned})
        self._note_skip()

    def _note_skip(self) -> None:
        self.folder.append(self.folder.metrics, {"step": self.steps, "stage": self.stage, "skipped": True})

    def next_stage(self) -> None:
        """End the stage and enter the next; make a new optimizer from `parameter_groups` afterwards."""
        index = self._active.stage.index
        if index + 1 == len(self._schedule.stages):
            raise FrostlineError(f"{self.stage} is the last stage: `learn` names {index + 1}")
        if self.steps == self._start:
            raise FrostlineError(self._nothing_done())
        self._end_stage()
        self._retired |= {o.value for o in self.ownership.owned}
        self._stepped = set()
        self._active = self._enter(index + 1, self._active)

    def progress(self) -> Progress:
        """What a checkpoint of the loop keeps, so that `learning(…, since=…)` can go on from there."""
        return Progress(
            run=name_of(self.folder) or "",
            learn=tuple(s.selection.expression for s in self._schedule.stages),
            step=self.steps,
            stage=self._active.stage.index,
            endings=tuple(self._endings),
            records=record_sizes(self.folder),
            drifted=self._recorder.drifts,
            hashes=hashes_of(self.model, self._recorder.learning[self._active.stage.index]),
        )

    def save(self, tokenizer: Any = None) -> None:
        """Save a model of transformers into the run folder, so that the audit can compare it with the evidence."""
        if not isinstance(self.model, PreTrainedModel):
            raise FrostlineError("only a model of transformers can be saved into the run folder")
        with storage_errors(self.folder.model):
            save_model(self.model, tokenizer, self.folder.model)
            files = {p.name: hash_file(p) for p in sorted(self.folder.model.glob("*")) if p.is_file()}
            self.folder.write_model_files(files)

    def audit(self) -> Audit:
        """The verdict on the run folder; after the context has ended."""
        return audit(self.folder.path)

    def _enter(self, index: int, leaving: Active | None, *, again: bool = False) -> Active:
        """Let a stage learn; `again`: what it started with is recorded."""
        stage = self._schedule.stages[index]
        active = switch(self._parameters, self.anatomy, stage, memory={}, leaving=leaving)
        reshard(self.model)
        self._frozen = frozen_modules(self.model, stage) if stage.spec.frozen_dropout == "off" else []
        self._recomputed.close()
        self._recomputed.enter_context(recomputed({b: b.forward for b in left_out(self._frozen)}))
        if not again:
            self._recorder.entry(stage)
        return active

    @property
    def _start(self) -> int:
        """Steps done before the stage in progress."""
        return self._endings[-1] if self._endings else 0

    def _nothing_done(self) -> str:
        return f"{self.stage}: no optimizer over run.parameter_groups() made a step"

    def _end_stage(self) -> None:
        self._endings.append(self.steps)
        self._schedule = self._schedule.ended(self._endings)
        self._recorder.lay(self._schedule)
        self._recorder.boundary(len(self._endings), step=self.steps)

    def _close(self, state: State, message: str) -> None:
        """Write what is left to write, whatever happened."""
        self.ownership.release()
        self._recomputed.close()
        for handle in self._handles:
            handle.remove()
        nothing = self.steps == self._start
        if not nothing:
            self._end_stage()
        idle = nothing and state == "finished"
        if idle:
            state, message = "failed", self._nothing_done()
        self.folder.write_status(state, step=self.steps, message=message)
        if idle:
            raise FrostlineError(message)

    def _mine(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer is one over what learns. Raises `FrostlineError` when it holds more of the model."""
        held = _held(optimizer)
        owned = {o.value for o in self.ownership.owned}
        others = held - owned
        name = next((n for n, p in self._parameters.items() if p in others), None)
        if name is not None:
            raise FrostlineError(
                f"an optimizer holds {name}, which is not what learns in {self.stage} (or learns only in part): "
                "make it from run.parameter_groups()"
            )
        if others & self._retired:
            raise FrostlineError(
                f"an optimizer of an earlier stage made a step in {self.stage}: make a new one from "
                "run.parameter_groups() after run.next_stage()"
            )
        return bool(held & owned)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._mine(optimizer):
            return
        if any(callable(a) for a in args if a is not optimizer) or kwargs.get("closure") is not None:
            raise FrostlineError(
                "an optimizer's step with a closure runs the model while the leaves of slices are not yet copied back: "
                "call backward before step"
            )
        if not self._stepped or id(optimizer) in self._stepped:  # several optimizers may share one step
            self._stepped = set()
            if not _overflowed(optimizer):
                self._recorder.gradients(self._active.stage, self.steps + 1, self.ownership)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._mine(optimizer):
            return
        if not self._stepped:
            self.steps += 1
            if _overflowed(optimizer):
                self._note_skip()
        self._stepped.add(id(optimizer))
        self.ownership.write_back()
        self._forget_gradients(_held(optimizer))  # the model's own zero_grad does not know these leaves
        self._recorder.drifted(self._buffers.restore())

    def _forget_gradients(self, held: set[nn.Parameter]) -> None:
        """Those of leaves that are no parameters of the model."""
        for o in self.ownership.owned:
            if o.value is not o.parameter and o.value in held:
                o.value.grad = None

    def _still_the_frozen(self) -> None:
        """The loop's `model.train()` reaches frozen modules too: before every forward pass they are put back."""
        if self.model.training:
            for module in self._frozen:
                module.eval()


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's gradient scaler has told a fused optimizer, which steps all the same, to change nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _held(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups for p in group["params"]}
