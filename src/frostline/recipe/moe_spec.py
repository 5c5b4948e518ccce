"""Balancing losses of a stage of a mixture of experts, and how its tokens go to experts while it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from frostline.recipe.base import Record


class MoeSpec(Record):
    """What is added to the loss so that routers spread their tokens over the experts, each a mean over layers; and what
    happens to tokens on their way to the experts, in training alone."""

    balance: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the load-balancing loss of Switch: 1 × the factor when balanced, N × with everything on one of N."""
    z: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the router z-loss: the mean of logsumexp(logits)², (ln N)² at zero logits."""
    capacity: Annotated[float, Field(ge=1e-3, le=10_000)] | None = None
    """Choices of a row that each expert takes in training, in units of its equal share: ⌈capacity · length · k / N⌉, in
    the order of the tokens; the others are dropped, and counted in `evidence/load.jsonl`. Without it none is."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training each number of the routers' input, and of nothing else, is multiplied by one drawn between
    1 - jitter and 1 + jitter."""
    bias: Annotated[float, Field(gt=0)] | None = None
    """Balance without a loss, where routers have a correction bias (DeepSeek-V3 and its kin): after every step it rises
    by so much for experts with less than the mean load, and falls for those with more. A buffer: it moves by this rule
    alone, and only in stages in which the router learns."""
    over: Literal["step", "row"] = "step"
    """What the load is balanced over: all rows of a step (a further forward pass where `accumulate` is above 1), or
    each row by itself."""
