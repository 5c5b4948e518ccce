"""What happens in a run, as records that observers read. An observer is a read-only function of one event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from frostline.engine.compiled import Proof
from frostline.engine.flow import Flow
from frostline.errors import NonFiniteError
from frostline.schedule import Schedule, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """Before the first step, or the first one after a resume."""

    schedule: Schedule
    done: int = 0
    """Steps that were done before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """After the switch into a stage."""

    stage: Stage
    n_restored: int
    """Owned leaves that continue with kept optimizer state."""
    n_owned: int
    notes: tuple[str, ...] = ()
    """What costs more than it looks like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """After an optimizer step."""

    stage: Stage
    step: int
    """Steps done, this one included."""
    loss: float
    lr: float
    """The largest of the parts' learning rates."""
    gradient_norm: float
    """L2 norm over what learns, before clipping."""
    n_targets: int
    seconds: float
    skipped: bool = False
    """Whether the update was left out, because loss or gradients were not finite."""
    spike: bool = False
    """Whether the loss is far above those before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """After a measurement of the held-out loss."""

    stage: Stage
    step: int
    """Steps done."""
    held_out_loss: float
    """Mean per token, natural logarithm."""
    bits_per_byte: float | None = None
    """The same in bits per byte of text, where that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetEvaluated:
    """After a measurement of another set, where the held-out loss is measured."""

    stage: Stage
    step: int
    """Steps done."""
    name: str
    """Such as `keep`, or a single source: `held_out/a.jsonl`."""
    loss: float
    """Mean per token, natural logarithm."""
    bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """After a measurement of where gradients go."""

    stage: Stage
    step: int
    """Steps done."""
    flow: Flow


@dataclass(frozen=True, kw_only=True, slots=True)
class Chose:
    """A setting was settled, by the recipe or by what the plan says."""

    setting: str
    """Its key in the recipe."""
    value: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEnded:
    """After a stage's last step."""

    stage: Stage
    step: int
    """Steps done."""
    n_skipped: int
    """Steps that a plateau left out."""
    n_moved: int
    """Learning pieces of which a byte changed."""
    unmoved: tuple[tuple[str, str], ...]
    """Learning pieces of which none did, each with what is known of the reason."""
    buffers_restored: tuple[str, ...]
    """Buffers that a forward pass in training mode had changed, put back."""
    following: Stage | None
    following_bytes: int
    """Bytes of gradients, optimizer state and copies of slices that the next stage needs."""
    lost_updates: float | None = None
    """Share of the measured updates that bf16 weights, rounded to the nearest number, did not show; None elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledBack:
    """In place of `StepDone`: the run has gone back to a checkpoint."""

    stage: Stage
    step: int
    """The step that was not done (1-based)."""
    to: int
    """Steps done, now."""
    left_out: tuple[int, int]
    """The first batch that is never trained on again, and the one after the last."""
    why: NonFiniteError


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCompiled:
    """After the graphs of a stage were made and held against the model itself."""

    stage: Stage
    proof: Proof
    n_graphs: int
    """All graphs of the run so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """Something that a person should know, in words; nothing that an observer has to act on."""

    text: str
    is_warning: bool = False


Event = (
    RunStarted
    | StageStarted
    | StepDone
    | RolledBack
    | Evaluated
    | SetEvaluated
    | Measured
    | Chose
    | StageEnded
    | Noted
    | StageCompiled
)
Observer = Callable[[Event], None]
