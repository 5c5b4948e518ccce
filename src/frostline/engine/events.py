"""What happens in a run, as records that observers read. An observer is a read-only function of one event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from frostline.schedule import Schedule, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """Before the first step."""

    schedule: Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """After the switch into a stage."""

    stage: Stage
    n_restored: int
    """Owned leaves that continue with kept optimizer state."""
    n_owned: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """After an optimizer step."""

    stage: Stage
    step: int
    """Steps done, this one included."""
    loss: float
    lr: float
    gradient_norm: float
    """L2 norm over what learns, before clipping."""
    n_targets: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """After a measurement of the held-out loss."""

    stage: Stage
    step: int
    """Steps done."""
    held_out_loss: float
    """Mean per token, natural logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEnded:
    """After a stage's last step."""

    stage: Stage
    step: int
    """Steps done."""


Event = RunStarted | StageStarted | StepDone | Evaluated | StageEnded
Observer = Callable[[Event], None]
