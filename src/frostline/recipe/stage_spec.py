"""One stage of a recipe: what learns, until when, with which optimizer settings."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.route_spec import RouteSpec

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


def _one_or_by_part(value: object) -> str:
    return "by part" if isinstance(value, dict) else "one"


Rates = Annotated[
    Annotated[Rate, Tag("one")] | Annotated[dict[str, Rate], Tag("by part")], Discriminator(_one_or_by_part)
]
Decays = Annotated[
    Annotated[Decay, Tag("one")] | Annotated[dict[str, Decay], Tag("by part")], Discriminator(_one_or_by_part)
]
ManyBetas = Annotated[
    Annotated[Betas, Tag("one")] | Annotated[dict[str, Betas], Tag("by part")], Discriminator(_one_or_by_part)
]

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "muon", "adamw8bit", "lion"]
_USES: dict[str, tuple[str, ...]] = {
    "betas": ("adamw", "adam", "muon", "adamw8bit", "lion"),
    "eps": ("adamw", "adam", "muon", "adamw8bit"),
    "momentum": ("sgd", "muon"),
}
"""Setting → the optimizers that have it."""


class OptimizerSpec(Record):
    """An optimizer and its settings; those that the named optimizer does not use are refused."""

    name: OptimizerName = "adamw"
    """`adamw` decays weights apart from the gradient, `adam` adds the decay to it, `sgd` takes momentum; `adafactor`
    keeps one row and one column of second moments per matrix; `muon` orthogonalises the momentum of the matrices inside
    layers and leaves everything else to AdamW; `adamw8bit` and `lion` need `pip install 'frostline[bitsandbytes]'`."""
    betas: ManyBetas | None = None
    """Adam, AdamW, Lion and the AdamW beside Muon: decay rates of the two moments, or `{part: rates, rest: rates}`;
    (0.9, 0.999) when left out, (0.9, 0.99) for Lion."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Adam, AdamW and the AdamW beside Muon: added to the denominator; 1e-8 when left out."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """SGD, Muon: momentum; 0 for SGD and 0.95 for Muon when left out."""
    weight_decay: Decays = 0.01
    """Weight decay of the learning parts, except norms and biases; or `{part: decay, rest: decay}`."""
    decay_norms_and_biases: bool = False
    """Decay norms and biases too."""
    device: Literal["cpu"] | None = None
    """`cpu`: what learns is copied to the host's memory, and has its optimizer state and its update there; the model
    stays where it computes. For weights and state that a device has no room for: every step moves all gradients to the
    host and all weights back. Changes nothing on a CPU. Beside the model when left out."""

    @model_validator(mode="after")
    def _no_offload_of_what_is_small(self) -> OptimizerSpec:
        if self.device is not None and self.name == "adamw8bit":
            raise ValueError(
                "adamw8bit keeps its state small beside the model, and `device: cpu` would move fp32 weights and "
                "gradients for it at every step: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> OptimizerSpec:
        for setting, optimizers in _USES.items():
            if getattr(self, setting) is not None and self.name not in optimizers:
                raise ValueError(f"{self.name} has no setting '{setting}'")
        return self


def name_alone(value: object) -> object:
    """`adamw` → `{name: adamw}`; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


def check_one_duration(**durations: float | None) -> None:
    """Raise `ValueError` unless exactly one is given."""
    given = [n for n, value in durations.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise ValueError(f"give one of steps, tokens and epochs; found {found}")


class PlateauSpec(Record):
    """When a stage ends before its time: the held-out loss no longer falls."""

    every: Annotated[int, Field(ge=1)]
    """Steps of the stage between the measurements that count."""
    patience: Annotated[int, Field(ge=1)] = 3
    """The stage ends after so many measurements in a row without a new best."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A new best is lower than the best before it by more than this."""


class StageSpec(Record):
    """What learns, until when, how. One of `steps`, `tokens` and `epochs` says how long at most."""

    learn: str
    """A selection, such as `ffn`, `attn.q & layers[2:]`, `all - embed`. `experts[top 4 by tokens]`,
    `experts[cover 0.2 by gate]` are measured on the training data when the run starts; `esft("FILE")` is an expert
    configuration of ESFT."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens, rounded up to whole steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows, rounded up to whole steps."""
    plateau: PlateauSpec | None = None
    """End earlier, when the held-out loss has stopped falling: `{every: 50, patience: 3}`."""
    lr: Rates
    """Peak learning rate; or `{embed: 1e-5, ffn: 3e-4, rest: 1e-4}`: selections that do not overlap, and `rest` for
    what else learns."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Multiplies the learning rate once for every layer between a part and the last layer; the embedding counts as the
    layer before the first."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    """Names the stage in every record; `stage-1`, `stage-2`, … when left out."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to `lr`."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to zero over the steps after the warm-up."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """A name, or a record with `name` and settings."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient over the learning parts; `null` switches clipping off."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches a step is computed in; divides `data.batch`."""
    state: Literal["keep", "reset", "offload"] = "keep"
    """Optimizer state at the switch into this stage. `keep`: what learned before and still learns keeps it, what
    freezes loses it. `offload`: what freezes has it moved to CPU memory, and gets it back when it learns again.
    `reset`: all start afresh. How many leaves kept or got back their state is printed."""
    routes: Annotated[tuple[RouteSpec, ...], Strict(False)] = ()
    """Where gradients stop, and which residual connections are left out: `[{stop: attn.out, layers: "0:4"}]`."""
    local_loss: Literal["none", "shared"] = "none"
    """`shared`: the loss of every block's output, through the final norm and the head, is added to the model's own."""
    moe: MoeSpec | None = None
    """Balancing losses of a mixture of experts, added to the loss: `{balance: 0.01, z: 0.001}`."""
    frozen_dropout: Literal["off", "on"] = "off"
    """`off`: modules of which nothing learns run as in evaluation, without dropout; a frozen embedding's dropout, which
    many models have beside their blocks, is off too."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return name_alone(value)

    @model_validator(mode="after")
    def _one_duration(self) -> StageSpec:
        check_one_duration(steps=self.steps, tokens=self.tokens, epochs=self.epochs)
        return self

    @model_validator(mode="after")
    def _warmup_ends_before_the_stage(self) -> StageSpec:
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        return self

    def n_steps(self, *, tokens_per_step: int, rows: int, rows_per_step: int) -> int:
        """Optimizer steps of the stage, if nothing ends it earlier.

        `rows`: training rows, for `epochs`. Exact: no rounding error decides about a step.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.epochs is not None
        return max(1, -(-(Fraction(str(self.epochs)) * rows) // rows_per_step))
