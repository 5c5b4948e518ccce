"""Gradient routes in a recipe: one record per stop or removed residual connection."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record

POINT = re.compile(r"block\.in|embed\.out|[a-z_]+(\[\d+\])?\.(out|skip)")
RANGES = re.compile(r"-?[0-9]+|(-?[0-9]+)?:(-?[0-9]+)?(:[1-9][0-9]*)?")


class RouteSpec(Record):
    """One route: a point, in some layers. Either `stop` or `remove`."""

    stop: str | None = None
    """Where the gradient stops, forward values unchanged to the bit: `attn.out`, `ffn.out` (a branch), `block.in` (the
    block's input), `embed.out`, `attn.skip`, `ffn.skip` (the residual connection past a branch), `block.skip` (the
    one such connection of blocks whose attention and FFN are parallel)."""
    remove: str | None = None
    """A residual connection that is left out of the forward pass: `attn.skip`, `ffn.skip`, `block.skip`."""
    layers: Annotated[tuple[int | str, ...], Strict(False), Field(min_length=1)] | None = None
    """Layers, 0-based: `"0:4"`, `[0, -1, "4:8"]`; every layer when left out."""

    @field_validator("layers", mode="before")
    @classmethod
    def _one_alone(cls, value: object) -> object:
        return (value,) if isinstance(value, (str, int)) else value

    @field_validator("layers")
    @classmethod
    def _ranges(cls, value: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        for item in value or ():
            if isinstance(item, str) and not RANGES.fullmatch(item):
                raise ValueError(f"'{item}' is no range of layers; write 3, -1, 0:4, 8: or ::2")
        return value

    @model_validator(mode="after")
    def _one_point(self) -> RouteSpec:
        if (self.stop is None) == (self.remove is None):
            raise ValueError("a route has either `stop` or `remove`")
        point = self.stop or self.remove or ""
        if not POINT.fullmatch(point):
            raise ValueError(
                f"'{point}' is no point; points are attn.out, ffn.out, block.in, embed.out, attn.skip, ffn.skip and "
                "block.skip"
            )
        if self.remove is not None and not point.endswith(".skip"):
            raise ValueError(
                f"only a residual connection can be removed (attn.skip, ffn.skip, block.skip), not {point}"
            )
        if self.layers is not None and point == "embed.out":
            raise ValueError("embed.out is in no layer; leave `layers` out")
        return self
