"""Capacity of experts: how many choices of a row each expert takes, and which are dropped.

Every row is a group of its own, as in GShard: the choices of its tokens are taken in the order of the tokens until an
expert is full, so what is dropped depends on nothing that follows in the row, on no other row, and not on how a step is
divided into micro-batches. Read `kept` first.
"""

from __future__ import annotations

from fractions import Fraction

import torch


def capacity_of(factor: float, *, length: int, chosen: int, n_experts: int) -> int:
    """C = ⌈factor · length · chosen / n_experts⌉: choices of a row of `length` tokens that each expert takes; exact."""
    return -(-(Fraction(str(factor)) * length * chosen) // n_experts)


def kept(index: torch.Tensor, *, rows: int, n_experts: int, capacity: int) -> torch.Tensor:
    """Which choices find room, (tokens, chosen), bool. Dropped per row and expert are max(0, load - capacity) choices.

    `index`: (tokens, chosen), the experts of each token, the rows one after another.
    """
    hot = torch.zeros(len(index), n_experts + 1, dtype=torch.int32, device=index.device)
    hot.scatter_(1, index.clamp(max=n_experts), 1)  # beyond the last expert stand experts that compute nothing
    before = hot.view(rows, -1, n_experts + 1).cumsum(1, dtype=torch.int32).view_as(hot) - hot
    return (before.gather(1, index.clamp(max=n_experts)) < capacity) | (index >= n_experts)
