"""Balancing losses of a stage of a mixture of experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from frostline.recipe.base import Record


class MoeSpec(Record):
    """What is added to the loss so that routers spread their tokens over the experts. Each is a mean over layers."""

    balance: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the load-balancing loss of Switch: 1 × the factor when balanced, N × with everything on one of N."""
    z: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the router z-loss: the mean of logsumexp(logits)², (ln N)² at zero logits."""
    over: Literal["step", "row"] = "step"
    """What the load is balanced over: all rows of a step (a further forward pass where `accumulate` is above 1), or
    each row by itself."""
