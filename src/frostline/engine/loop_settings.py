"""How the training loop runs, and how far it came. Read `LoopSettings`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from frostline.engine.compiled import Compiled
from frostline.engine.rounding import Rounding
from frostline.engine.routes import Points
from frostline.engine.run_state import RunState
from frostline.engine.stage_switch import Active
from frostline.engine.step import Countable, LossFunction
from frostline.errors import NonFiniteError
from frostline.recipe import SpikeSpec
from frostline.schedule import Stage

CPU = torch.device("cpu")

Moment = Literal["start", "step", "stage end", "stop"]
"""When a state may be saved: before the first step, after a step, at a stage's last one, when the run is stopped."""

BatchFunction = Callable[[int, Stage], Sequence[Countable]]
"""(batch, the stage of its step) → the micro-batches of the step: a pure function. Batches count as steps do, over
those that a rollback has left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """One set whose loss is measured, always on the same batches."""

    name: str
    batches: Sequence[Countable]
    bytes_per_target: float | None = None
    """UTF-8 bytes of text that a target stands for, over the whole set; None where that is not known."""


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
    measure_of: Callable[[Stage], LossFunction] | None = None
    """The same numbers as the loss that is measured, while a stage is in progress, computed in another way."""
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
