"""What an audit says: rows (one component in one stage), evidence (one checked claim), and all of it for one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_SIGNAL = 1e-6
"""A piece whose gradient's root mean square stays below this share of the stage's largest carries no signal: that
is rounding (fp32 has 6e-8) of a gradient that is zero by structure, as for the key bias of softmax attention."""


Declared = Literal["learns", "frozen", "learns in part"]
Basis = Literal["recomputed", "recorded"]

Verdict = Literal[
    "unchanged",
    "moved",
    "moved by rule",
    "FROZEN BUT MOVED",
    "LEARNING BUT UNMOVED",
    "lost to rounding",
    "no signal",
    "zero gradient",
    "no gradient",
    "every step skipped",
    "no step done",
    "derived",
    "not reached",
]
"""`unchanged`, `moved`: as declared. `moved by rule`: a router's correction bias, which the recipe lets move without a
gradient. `lost to rounding`: no step could be large enough to
reach the next number that the piece's dtype has; of bf16 weights, every update that was measured was too small.
`no signal`: its gradient is zero but for rounding.
`zero gradient`: exactly zero at every sampled step, as for an expert that no token is routed to. `no gradient`: the
loss does not depend on it. `every step skipped`, `no step done`: the stage made no update at all, because nothing in it
was finite, or because the run halted at its first step. `derived`: a buffer that the forward pass itself rewrites.
`not reached`: the run stopped before."""

FAILED: frozenset[str] = frozenset({"FROZEN BUT MOVED", "LEARNING BUT UNMOVED"})
WORST_FIRST: tuple[Verdict, ...] = (
    "FROZEN BUT MOVED",
    "LEARNING BUT UNMOVED",
    "moved",
    "moved by rule",
    "lost to rounding",
    "no signal",
    "zero gradient",
    "no gradient",
    "every step skipped",
    "no step done",
    "unchanged",
    "derived",
    "not reached",
)


RAN_TO_ITS_END = "every stage ran to its end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One component in one stage."""

    component: str
    stage: str
    declared: Declared
    bytes_changed: int | None
    """Bytes that differ; None when they moved and no file of the run holds both values."""
    relative_change: float | None
    """‖Δ‖/‖w‖ over the component's parameters; None as above."""
    gradient_norm: float | None
    """Largest recorded L2 norm of the gradient over what learns; None when none arrived or nothing learns."""
    verdict: Verdict
    basis: Basis
    """`recomputed` from weight files, or `recorded`: a hash that the run wrote."""
    details: tuple[str, ...] = ()
    """Pieces whose verdict differs from the component's, with that verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One checked claim about the whole run."""

    claim: str
    expected: str
    measured: str
    passed: bool
    basis: Basis


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Every row and every check of one run."""

    run: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    evidence: tuple[Evidence, ...]
    interrupted: bool = False
    """Whether the run says that it was stopped and saved."""

    @property
    def verdict(self) -> Literal["passed", "interrupted", "failed"]:
        """`interrupted`: nothing is wrong up to where the run was stopped."""
        if self.passed:
            return "passed"
        unfinished = [e.claim for e in self.evidence if not e.passed] == [RAN_TO_ITS_END]
        return "interrupted" if self.interrupted and unfinished else "failed"

    @property
    def passed(self) -> bool:
        """Whether what was asked is what happened."""
        return all(e.passed for e in self.evidence)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not as declared."""
        return tuple(r for r in self.rows if r.verdict in FAILED)
