"""One stage of a recipe: what learns, for how long, with which optimizer settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Record):
    """An optimizer and its settings; those that the named optimizer does not use are refused."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """`adamw` decays weights apart from the gradient, `adam` adds the decay to it, `sgd` takes momentum."""
    betas: Annotated[tuple[Beta, Beta], Strict(False)] | None = None
    """Adam and AdamW: decay rates of the two moments; (0.9, 0.999) when left out."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Adam and AdamW: added to the denominator; 1e-8 when left out."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """SGD: momentum; 0 when left out."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of the learning parts, except norms and biases."""
    decay_norms_and_biases: bool = False
    """Decay norms and biases too."""

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> OptimizerSpec:
        foreign = ("momentum",) if self.name != "sgd" else ("betas", "eps")
        for field in foreign:
            if getattr(self, field) is not None:
                raise ValueError(f"{self.name} has no setting '{field}'")
        return self


class StageSpec(Record):
    """What learns, until when, how."""

    learn: str
    """A selection, such as `ffn`, `attn.q & layers[2:]`, `all - embed`."""
    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
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
    state: Literal["keep", "reset"] = "keep"
    """Optimizer state at the switch into this stage: what was learning before keeps it, or all start afresh. A part of
    a packed tensor keeps it only where all that now learns of the tensor has one history; how many do is printed."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _warmup_ends_before_the_stage(self) -> StageSpec:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        return self
