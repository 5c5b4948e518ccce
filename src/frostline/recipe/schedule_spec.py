"""Named schedules in a recipe: one record per schedule. Each stands in place of `stages` and is written out as plain
stages before anything else happens (`frostline.schedule.named`). Read `NamedSchedule`, then the one you want.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.stage_spec import OptimizerSpec, Rate, Rates, check_one_duration, name_alone

Steps = Annotated[int, Field(ge=1)]


class DurationSpec(Record):
    """How long: one of `steps`, `tokens` and `epochs`."""

    steps: Steps | None = None
    """Optimizer steps."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens, rounded up to whole steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows, rounded up to whole steps."""

    @model_validator(mode="after")
    def _one(self) -> DurationSpec:
        check_one_duration(steps=self.steps, tokens=self.tokens, epochs=self.epochs)
        return self


class NamedSchedule(Record):
    """What the stages of every named schedule take; each key means what it means in a stage."""

    lr: Rates
    """Peak learning rate of every stage, or by part."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Multiplies the learning rate once for every layer between a part and the last layer."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of warm-up at the start of every stage; across the run: `lr_across`."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to zero in every stage; across the run: `lr_across`."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """A name, or a record with `name` and settings."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient over the learning parts; `null` switches clipping off."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches a step is computed in; divides `data.batch`."""
    state: Literal["keep", "reset", "offload"] = "keep"
    """Optimizer state at every switch."""
    moe: MoeSpec | None = None
    """Balancing losses of a mixture of experts."""
    frozen_dropout: Literal["off", "on"] = "off"
    """`off`: modules of which nothing learns run without dropout."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return name_alone(value)


class GradualUnfreezing(NamedSchedule):
    """ULMFiT (arXiv 1801.06146): what follows the layers learns first, then one more layer from the last to the first,
    then what comes before them."""

    name: Literal["gradual-unfreezing"]
    """The schedule."""
    each: DurationSpec
    """How long each stage lasts: `{epochs: 1}` in the paper."""
    last: DurationSpec | None = None
    """How long the stage in which everything learns lasts, when longer than the others."""
    layers: Annotated[int, Field(ge=1)] = 1
    """Layers that thaw at once."""


class LpFt(NamedSchedule):
    """LP-FT (arXiv 2202.10054): the head first, then everything. `lr` is that of the second stage."""

    name: Literal["lp-ft"]
    """The schedule."""
    probe: DurationSpec
    """How long the head learns alone."""
    probe_lr: Rate
    """Its learning rate then."""
    tune: DurationSpec
    """How long everything learns."""
    head: str = "head"
    """What learns first."""


class Alternate(NamedSchedule):
    """Parts take turns."""

    name: Literal["alternate"]
    """The schedule."""
    every: Steps
    """Steps of a turn."""
    steps: Steps
    """Steps in all; the last turn may be shorter."""
    turns: Annotated[tuple[str, ...], Strict(False), Field(min_length=2)] = ("attn", "ffn")
    """Selections, in their order."""
    state: Literal["keep", "reset", "offload"] = "offload"
    """Optimizer state at every switch; `offload` gives a part its state back at its next turn."""


class PretrainThenFreeze(NamedSchedule):
    """Everything learns, then all but some parts."""

    name: Literal["pretrain-then-freeze"]
    """The schedule."""
    joint: DurationSpec
    """How long everything learns."""
    then: DurationSpec
    """How long the rest learns after that."""
    freeze: str = "attn"
    """What is frozen then; `attn | norm | embed`, for example."""
    then_lr: Rate | None = None
    """The learning rate then; `lr` when left out."""


class Lisa(NamedSchedule):
    """LISA (arXiv 2403.17919): a few layers, drawn anew every so many steps, and what is always on."""

    name: Literal["lisa"]
    """The schedule."""
    layers: Annotated[int, Field(ge=1)]
    """Layers that learn at a time (γ in the paper), drawn without replacement, every draw apart from the others."""
    every: Steps
    """Steps between draws (K in the paper)."""
    steps: Steps
    """Steps in all; after the last draw there may be fewer than `every`."""
    always: str | None = "embed | head | final_norm"
    """What learns in every stage; `null` for nothing. In the paper embedding and head; what it costs is printed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of the draws; the recipe's when left out."""


class BAdam(NamedSchedule):
    """BAdam (arXiv 2404.02827): one block of the model after another, each with an optimizer of its own."""

    name: Literal["badam"]
    """The schedule."""
    every: Steps
    """Steps of a block (K in the paper)."""
    steps: Steps
    """Steps in all; the last block may have fewer."""
    order: Literal["ascending", "descending", "random"] = "descending"
    """`random`: every block once in a new order, then again."""
    embed: bool = False
    """Whether what comes before the layers is a block too."""
    head: bool = False
    """Whether what follows the layers is a block too."""
    always: str | None = None
    """What learns beside every block."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of the random orders; the recipe's when left out."""
    state: Literal["keep", "reset", "offload"] = "reset"
    """Optimizer state at every switch; the paper's is `reset`."""


class Spectrum(NamedSchedule):
    """Spectrum (arXiv 2406.06623): of every kind of matrix in the layers, those with the highest ratio of signal to
    noise by the Marchenko–Pastur threshold; measured on the base model's weights when the run starts."""

    name: Literal["spectrum"]
    """The schedule."""
    top: Annotated[float, Field(gt=0, le=1)]
    """Share of the matrices of each kind that learns: 0.25 for a quarter."""
    train: DurationSpec
    """How long."""
    among: str | None = None
    """Matrices to choose from; all in the layers when left out."""
    always: str | None = None
    """What learns beside them; the reference's own scripts take `embed | head`."""


SCHEDULES: dict[str, type[NamedSchedule]] = {
    "gradual-unfreezing": GradualUnfreezing,
    "lp-ft": LpFt,
    "alternate": Alternate,
    "pretrain-then-freeze": PretrainThenFreeze,
    "lisa": Lisa,
    "badam": BAdam,
    "spectrum": Spectrum,
}
"""Name in a recipe → its record."""


def _named(value: object) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if isinstance(name, str) else None


ScheduleSpec = Annotated[
    Annotated[GradualUnfreezing, Tag("gradual-unfreezing")]
    | Annotated[LpFt, Tag("lp-ft")]
    | Annotated[Alternate, Tag("alternate")]
    | Annotated[PretrainThenFreeze, Tag("pretrain-then-freeze")]
    | Annotated[Lisa, Tag("lisa")]
    | Annotated[BAdam, Tag("badam")]
    | Annotated[Spectrum, Tag("spectrum")],
    Discriminator(_named),
]
