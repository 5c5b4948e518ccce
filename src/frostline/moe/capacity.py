"""Capacity of experts: how many choices of a row each expert takes, and which are dropped.

Every row is a group of its own, as in GShard: the choices of its tokens are taken in the order of the tokens until an
expert is full, so what is dropped depends on nothing that follows in the row, on no other row, and not on how a step is
divided into micro-batches. Read `kept` first.
"""

from __future__ import annotations

from fractions import Fraction

import torch


def capacity_of(factor: float, *, lengths: torch.Tensor, chosen: int, n_experts: int) -> torch.Tensor:
    """C = ⌈factor · length · chosen / n_experts⌉: choices of each row that every expert takes; (rows,), int64, exact.

    `lengths`: (rows,), the tokens of each row, padding left out.
    """
    # 1.3333333333333333 as 4/3: with all of its digits the products below would not fit into 64 bits
    exact = Fraction(str(factor)).limit_denominator(10**6)
    return -(-(lengths * chosen * exact.numerator) // (n_experts * exact.denominator))


def kept(index: torch.Tensor, *, n_experts: int, capacity: torch.Tensor) -> torch.Tensor:
    """Which choices find room, (tokens, chosen), bool. Dropped per row and expert are max(0, load - capacity) choices.

    `index`: (tokens, chosen), the experts of each token, the rows one after another; `n_experts` and beyond are no
    experts (padding, experts that compute nothing) and never dropped. `capacity`: (rows,).
    """
    rows = len(capacity)
    hot = torch.zeros(len(index), n_experts + 1, dtype=torch.int32, device=index.device)
    hot.scatter_(1, index.clamp(max=n_experts), 1)
    before = hot.view(rows, -1, n_experts + 1).cumsum(1, dtype=torch.int32).view_as(hot) - hot
    room = capacity.repeat_interleave(len(index) // rows, output_size=len(index))[:, None]
    return (before.gather(1, index.clamp(max=n_experts)) < room) | (index >= n_experts)
