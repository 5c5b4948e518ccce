"""The schema of the evidence: what the records in a run folder hold. The engine writes them, the audit reads them.

Read `Boundary` and `StageRecord` first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from frostline.anatomy import Slice

State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """The state of every tensor before the first step, or after a stage's last one."""

    index: int
    """0 at the start; k after stage k-1 (0-based)."""
    step: int
    """Steps done."""
    hashes: dict[str, str]
    """Piece (as text) → SHA-256 of its bytes."""
    derived: tuple[str, ...] = ()
    """Buffers that a plain forward pass rewrites itself; listed at boundary 0, not held to be frozen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """One stage as it was resolved."""

    index: int
    name: str
    learn: str
    start: int
    end: int
    n_learning: int
    """Parameters that learn."""
    learning: tuple[Slice, ...]
    """The slices that learn, one per piece."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientSample:
    """Gradients at one step, before clipping."""

    step: int
    """1-based: after this step's backward pass."""
    stage: int
    norms: dict[str, float | None]
    """Learning piece → L2 norm; None where no gradient arrived at all."""
    stray: tuple[str, ...] = ()
    """Tensors with a gradient that nothing owns, or that may have one, or may not, against what the stage says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSample:
    """What weights in fewer bits than fp32 showed of one step's update."""

    step: int
    stage: int
    rounding: str
    updates: dict[str, tuple[int, int]]
    """Learning piece → (elements that the step, computed in fp32, leads to another number; those of them that kept
    their value)."""
