"""How far values moved: bytes that differ, and the size of the change against the size of the values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """The change between two states of the same elements."""

    n_elements: int
    bytes_changed: int
    """Bytes that differ."""
    squared_change: float
    """‖after − before‖², in fp64."""
    squared_norm: float
    """‖before‖², in fp64."""

    @property
    def relative_change(self) -> float:
        """‖after − before‖ / ‖before‖; infinite when something moved away from all zeros."""
        if self.squared_norm == 0:
            return math.inf if self.squared_change > 0 else 0.0
        return math.sqrt(self.squared_change / self.squared_norm)


def measure(before: torch.Tensor, after: torch.Tensor) -> Movement:
    """The movement between two tensors of one shape; of different dtypes, bytes are compared in the wider one."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    old, new = (t.detach().cpu().to(dtype).contiguous().reshape(-1) for t in (before, after))
    changed = int((old.view(torch.uint8) != new.view(torch.uint8)).sum())
    was = old.double()
    return Movement(
        n_elements=old.numel(),
        bytes_changed=changed,
        squared_change=float((new.double() - was).square().sum()) if changed else 0.0,
        squared_norm=float(was.square().sum()),
    )


def total(movements: Iterable[Movement]) -> Movement:
    """The movement of several pieces together."""
    found = list(movements)
    return Movement(
        n_elements=sum(m.n_elements for m in found),
        bytes_changed=sum(m.bytes_changed for m in found),
        squared_change=sum(m.squared_change for m in found),
        squared_norm=sum(m.squared_norm for m in found),
    )
