"""Selections, stages and the audit in the Trainer of transformers, and in those made from it (TRL's).

`run = attach(trainer, "ffn", out="runs/mine")`, then `trainer.train()` as ever, then `run.audit()`. The Trainer makes
its own optimizer; what of a tensor learns only in part is put in its place there, and in clipping. Who owns what, and
the evidence, is `frostline.learning`'s; this file says when. Read `attach`, then `TrainerRun`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from frostline.anatomy import anatomy_of_parts, read_anatomy
from frostline.audit import Audit, audit
from frostline.errors import FrostlineError, RunFolderError
from frostline.integrations.leaves import check_given, leaves_apart, own
from frostline.integrations.refusals import check
from frostline.integrations.replaced import Replaced
from frostline.integrations.saved import numbers_of, read_progress, write_progress
from frostline.learning import Learning, learning
from frostline.progress import Progress, name_of
from frostline.run_folder import RunFolder
from frostline.selection import Selection, select

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    learn: str | Sequence[str | tuple[str, int]],
    *,
    out: str | Path,
    parts: Mapping[str, Sequence[str]] | None = None,
    ties: bool = False,
    frozen_dropout: bool = False,
    gradients_every: int = 10,
    state: Literal["keep", "reset"] = "keep",
    save: bool = False,
) -> TrainerRun:
    """Let exactly `learn` learn in `trainer.train()`, and write the evidence into the new folder `out`.

    `learn`: a selection, or stages such as `[("all", 100), "ffn"]`: pairs of a selection and its optimizer steps; the
    last one's may be left out. `state`: whether optimizer state is kept over a switch where the same slice goes on
    learning. `save`: keep the trained model in `out` too. `parts`, `ties`, `frozen_dropout`, `gradients_every`: as in
    `frostline.learning`. Raises a `FrostlineError` for a wrong selection, a folder that holds something else, or a
    Trainer with which what learns would not be exactly what was named.
    """
    if not isinstance(trainer, Trainer):
        raise FrostlineError(
            "attach needs a Trainer of transformers, or one made from it (as TRL's are), not this "
            f"{type(trainer).__name__}"
        )
    stages = _stages(learn)
    check(trainer, n_stages=len(stages), has_parts=parts is not None, frozen_dropout=frozen_dropout)
    anatomy = read_anatomy(trainer.model) if parts is None else anatomy_of_parts(trainer.model, parts)
    selections = [select(anatomy, e, ties="together" if ties else "error") for e, _ in stages]
    check_given(trainer, selections[0])
    if save and not isinstance(trainer.model, PreTrainedModel):
        raise FrostlineError(f"save=True keeps a model of transformers, and this is a {type(trainer.model).__name__}")
    if name_of(RunFolder(out)) is None:
        RunFolder.at_free(out)
    settings = {"parts": parts, "ties": ties, "frozen_dropout": frozen_dropout, "gradients_every": gradients_every}
    for callback in [c for c in trainer.callback_handler.callbacks if isinstance(c, _Follow)]:
        callback.run.detach()
    return TrainerRun(trainer, selections, [n for _, n in stages], Path(out), settings, state == "keep", save)


def _stages(learn: str | Sequence[str | tuple[str, int]]) -> list[tuple[str, int | None]]:
    """Every stage with its steps; None for the last one's where they are what is left."""
    given = [learn] if isinstance(learn, str) else list(learn)
    for s in given:
        if not isinstance(s, str) and not (isinstance(s, tuple | list) and [*map(type, s)] == [str, int]):
            raise FrostlineError(f"{s!r} is no stage: write a selection, or a pair such as ('ffn', 100)")
    stages: list[tuple[str, int | None]] = [(s, None) if isinstance(s, str) else (s[0], s[1]) for s in given]
    if not stages:
        raise FrostlineError("nothing is named that learns")
    for i, (expression, steps) in enumerate(stages):
        if steps is None and i + 1 < len(stages):
            raise FrostlineError(f"{expression!r} is not the last stage: say for how many steps it learns, as a pair")
        if steps is not None and steps < 1:
            raise FrostlineError(f"{expression!r} is to learn for {steps} steps: at least one")
    return stages


class TrainerRun:
    """What `attach` gives: the run of one `trainer.train()`, resumed or not."""

    def __init__(
        self,
        trainer: Trainer,
        selections: Sequence[Selection],
        steps: Sequence[int | None],
        out: Path,
        settings: Mapping[str, Any],
        keep_state: bool,
        save: bool,
    ) -> None:
        self.trainer, self.folder = trainer, RunFolder(out)
        self.selections = tuple(selections)
        """What learns, one per stage; each prints with its counts."""
        self._steps, self._settings, self._keep_state, self._save = steps, settings, keep_state, save
        self._learning: Learning | None = None
        self._since: Progress | None = None
        self._inside: ExitStack | None = None
        self._ends: list[int] = []
        self._callback = _Follow(self)
        trainer.add_callback(self._callback)
        self._replaced = Replaced(trainer)
        self._train = self._replaced.put("_inner_training_loop", self._carry_out)
        self._make = self._replaced.put("create_optimizer", self._create_optimizer)
        self._save_trainers = self._replaced.put("_save_checkpoint", self._save_checkpoint)

    def __str__(self) -> str:
        return "\n".join(map(str, self.selections))

    def audit(self) -> Audit:
        """The verdict on the run folder; after `trainer.train()` has returned."""
        return audit(self.folder.path)

    def detach(self) -> None:
        """Give the Trainer back as it was: its next `train()` trains whatever may have a gradient."""
        self.trainer.remove_callback(self._callback)
        self._replaced.back()

    def _carry_out(self, *args: Any, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        """The Trainer's whole training, inside `learning`: begun when it makes its optimizer, ended when it is done."""
        trainer = self.trainer
        has_parts, frozen_dropout = self._settings["parts"] is not None, self._settings["frozen_dropout"]
        check(trainer, n_stages=len(self._steps), has_parts=has_parts, frozen_dropout=frozen_dropout)
        self._since = self._found(resume_from_checkpoint)
        given = trainer.optimizer, trainer.lr_scheduler
        try:
            with ExitStack() as self._inside:
                done = self._train(*args, resume_from_checkpoint=resume_from_checkpoint, **more)
                if self._save:
                    self._running.save(trainer.processing_class)
            return done
        finally:
            # the optimizer that was made holds leaves of a run that is over
            trainer.optimizer, trainer.lr_scheduler = given
            self._learning = self._inside = None

    def _found(self, checkpoint: str | None) -> Progress | None:
        """Where the run goes on; None at its start. Raises `RunFolderError` when `out` does not belong to that."""
        path, is_there = self.folder.path, name_of(self.folder) is not None
        if checkpoint is None:
            if is_there:
                state, step = (self.folder.read_status()[key] for key in ("state", "step"))
                how = "killed or under way" if state == "running" else state
                raise RunFolderError(
                    f"{path} holds a run, {how} after step {step}: trainer.train(resume_from_checkpoint=…) goes on "
                    "with it; another run is attached with another `out`"
                )
            return None
        if not is_there:
            raise RunFolderError(f"{path} is not there, and {checkpoint} is of a run that has a folder: name that one")
        since = read_progress(Path(checkpoint))
        status = self.folder.read_status()
        if status["state"] == "finished" and status["step"] > since.step:
            logger.warning(
                "%s: the run had finished after step %d and goes on after step %d: its records are taken back to that",
                path,
                status["step"],
                since.step,
            )
        return since

    @property
    def _running(self) -> Learning:
        if self._learning is None:
            raise FrostlineError("the Trainer has made no optimizer: nothing is known of what it trained")
        return self._learning

    def _create_optimizer(self, *args: Any, **more: Any) -> torch.optim.Optimizer:
        if self._inside is None:  # somebody calls it outside training
            return self._make(*args, **more)  # type: ignore[no-any-return]
        if self._learning is None:
            self._learning = self._begin(self._inside)
        is_users = self.trainer.optimizer is not None
        self.trainer.optimizer = own(self._make(*args, **more), self._learning, is_users=is_users)
        return self.trainer.optimizer  # type: ignore[no-any-return]

    def _begin(self, inside: ExitStack) -> Learning:
        steps = self._planned(self.trainer.state.max_steps)
        self._ends = [*accumulate(steps)]
        started = learning(
            self.trainer.model,
            [s.expression for s in self.selections],
            out=self.folder.path,
            steps=steps,
            since=self._since,
            **self._settings,
        )
        if self._since is not None:  # before the records are taken back
            inside.enter_context(self.folder.locked())
        run = inside.enter_context(started)
        if self._since is None:
            inside.enter_context(self.folder.locked())
        clipping = Replaced(self.trainer.accelerator)
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            clipping.put(name, self._with_leaves(getattr(self.trainer.accelerator, name)))
        inside.callback(clipping.back)
        return run

    def _planned(self, total: int) -> list[int]:
        """Steps of every stage, of all the steps that the Trainer will make."""
        *first, last = self._steps
        before = sum(n or 0 for n in first)
        left = total - before
        if left < 1 or last not in (None, left):
            said = " + ".join("the rest" if n is None else str(n) for n in self._steps)
            raise FrostlineError(
                f"the stages take {said} steps, and the Trainer makes {total}: change one of them (max_steps=…), or "
                "leave out the last stage's steps"
            )
        return [*(n or 0 for n in first), left]

    def _with_leaves(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """Clipping that takes the leaves of parameters that learn in part, in their places, for those parameters."""

        def clip_what_learns(parameters: Iterable[nn.Parameter], *args: Any, **more: Any) -> Any:
            apart = leaves_apart(self._running)
            return clip([leaf for p in parameters for leaf in apart.get(p, [p])], *args, **more)

        return clip_what_learns

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._save_trainers(model, trial)
        folder = Path(self.trainer._get_output_dir(trial=trial)) / f"checkpoint-{self.trainer.state.global_step}"
        if self._learning is not None and folder.is_dir():
            self.folder.write_status("running", step=self._learning.steps)
            write_progress(folder, self._learning.progress())

    def before_step(self) -> None:
        """Enter the next stage where the one in progress is over: then the Trainer needs an optimizer over other
        leaves. Its scheduler goes on in the same place, as it does when the Trainer resumes."""
        run = self._running
        if self.trainer.state.global_step != self._ends[run.stage_index] or run.stage_index + 1 == len(self._ends):
            return
        trainer, kept = self.trainer, {o.piece: o.value for o in run.ownership.owned}
        old, scheduler, rates = trainer.optimizer, trainer.lr_scheduler.state_dict(), trainer.lr_scheduler.get_last_lr()
        run.next_stage()
        trainer.optimizer = trainer.lr_scheduler = None
        new = trainer.accelerator.prepare(trainer.create_optimizer())
        if len(new.param_groups) != len(rates):
            raise FrostlineError(
                f"{run.stage}: the Trainer made {len(new.param_groups)} parameter groups, and {len(rates)} before: its "
                "scheduler cannot go on; train each stage in a train() of its own"
            )
        trainer.accelerator._optimizers.remove(old)  # it would keep the state of what is frozen now
        trainer.optimizer = new
        trainer.create_scheduler(num_training_steps=trainer.state.max_steps, optimizer=new)
        trainer.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(new.param_groups, rates, strict=True):
            group["lr"] = rate
        if self._keep_state:
            for o in run.ownership.owned:
                if o.piece in kept and kept[o.piece] in old.state:
                    new.state[o.value] = old.state[kept[o.piece]]
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))

    def after_step(self) -> None:
        """Raise `FrostlineError` when the Trainer counted a step that no optimizer over what learns has made."""
        run, step = self._running, self.trainer.state.global_step
        if self.trainer.accelerator.optimizer_step_was_skipped:  # by a gradient scaler: fp16
            run.skip()
        if run.steps != step:
            raise FrostlineError(f"the Trainer counts {step} steps, and its optimizer made {run.steps} of what learns")

    def log(self, logs: Mapping[str, Any]) -> None:
        """Keep the numbers of the Trainer's log."""
        numbers = numbers_of(logs)
        if self._learning is not None and numbers:
            self._learning.log(**numbers)


class _Follow(TrainerCallback):  # type: ignore[misc]
    """Tells a run what its Trainer does."""

    def __init__(self, run: TrainerRun) -> None:
        self.run = run

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.run.before_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.after_step()

    def on_log(self, *_: Any, logs: Mapping[str, Any] | None = None, **__: Any) -> None:
        self.run.log(logs or {})
