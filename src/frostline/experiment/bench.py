"""What claims are measured with: one model, one batch, and the engine's own switch and step. Read `Bench` first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from frostline.anatomy import Anatomy, Slice, read_anatomy, take
from frostline.data import Batch
from frostline.engine import loss_of, step
from frostline.engine.stage_switch import Active, Memory, switch
from frostline.errors import FrostlineError, first_line
from frostline.recipe import OptimizerSpec, StageSpec
from frostline.schedule import Schedule
from frostline.selection import Selection, select

N_STEPS = 3
LR = 1e-3
DECAY = 0.1
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One belief and what was measured of it."""

    key: str
    """Row of the question's table: S3, S4, …"""
    belief: str
    """What is said."""
    verdict: str
    """What our measurement says of the belief."""
    measured: str
    """The numbers, in a sentence."""
    holds: bool
    """Whether the measurement agrees with our verdict."""
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    """The numbers by name."""
    table: tuple[tuple[str, ...], ...] = ()
    """Rows of a table that goes with it, the header first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """All claims measured on one model."""

    model: str
    n_parameters: int
    n_tokens: int
    """Tokens of the probe batch."""
    claims: tuple[Claim, ...]

    @property
    def hold(self) -> bool:
        """Whether every measurement agrees with its verdict."""
        return all(c.holds for c in self.claims)


class Bench:
    """A model, its anatomy and one batch, with the few operations that the claims are made of."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.anatomy: Anatomy = read_anatomy(model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.start = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.device = next(model.parameters()).device
        self.layers = range(self.anatomy.n_layers)
        self.active: Active | None = None

    def learn(self, expression: str, **settings: Any) -> Active:
        """Put the weights back and enter a stage in which `expression` learns."""
        with torch.no_grad():
            for name, value in self.start.items():
                self.parameters[name].copy_(value)
        return self.enter(expression, memory={}, **settings)

    def enter(self, expression: str, *, memory: Memory, **settings: Any) -> Active:
        """Enter a stage in which `expression` learns, the weights as they are. `settings`: of its `StageSpec`."""
        optimizer = OptimizerSpec(name="adamw", weight_decay=DECAY)
        usual: dict[str, Any] = {"steps": N_STEPS, "lr": LR, "optimizer": optimizer, "clip": None}
        spec = StageSpec(learn=expression, **usual | settings)
        schedule = Schedule.of([("claim", spec, select(self.anatomy, expression))])
        self.active = switch(self.parameters, self.anatomy, schedule.stages[0], memory=memory, leaving=self.active)
        return self.active

    def backward(self) -> float:
        """One forward and backward pass, dropout off; returns the loss."""
        self.model.eval()
        assert self.active is not None
        loss = loss_of(self.active.stage, None)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # some sums run in any order otherwise (GPT-OSS)
        try:
            return step(self.model, [self.batch], loss, seed=SEED, device=self.device).loss.item()
        finally:
            torch.use_deterministic_algorithms(before)

    def update(self, active: Active) -> None:
        """One optimizer step, gradients cleared after it."""
        active.optimizer.step()
        active.ownership.write_back()
        active.optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the gradients that are there, by tensor name."""
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def bytes_changed(self, selection: Selection) -> int:
        """Bytes of the selection that differ from the start."""
        total = 0
        for s in selection.slices:
            now = take(self.parameters[s.tensor].detach(), s).contiguous().view(torch.uint8)
            total += int((now != take(self.start[s.tensor], s).contiguous().view(torch.uint8)).sum())
        return total

    def moved(self, piece: Slice) -> bool:
        """Whether a slice differs from the start."""
        return not torch.equal(take(self.parameters[piece.tensor], piece), take(self.start[piece.tensor], piece))

    def select(self, expression: str) -> Selection:
        """A selection of this model."""
        return select(self.anatomy, expression)


def unmeasured(key: str, belief: str, error: FrostlineError) -> Claim:
    """A claim that this model cannot settle, with the reason."""
    return Claim(
        key=key, belief=belief, verdict="NOT MEASURED HERE", measured=f"{first_line(error).rstrip('.')}.", holds=True
    )


def reached(bench: Bench, gradients: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Names of the components with and without a gradient; tied storage goes by the name that owns it."""
    with_gradient: list[str] = []
    without: list[str] = []
    for c in bench.anatomy.components:
        own = [s for s in c.slices if bench.anatomy.learnable(s) and s.tensor not in bench.anatomy.ties]
        if own:
            found = any(s.tensor in gradients and bool(take(gradients[s.tensor], s).any()) for s in own)
            (with_gradient if found else without).append(c.name)
    return with_gradient, without


def any_gradient(bench: Bench, part: str, gradients: dict[str, torch.Tensor]) -> bool:
    """Whether any element of a part has a gradient that is not zero."""
    return any(s.tensor in gradients and bool(take(gradients[s.tensor], s).any()) for s in bench.select(part).slices)


def similarity(
    bench: Bench, part: str, true: dict[str, torch.Tensor], cut: dict[str, torch.Tensor]
) -> tuple[float | None, float | None]:
    """Cosine, and ratio of norms (cut over true), between two gradients of a part; None where one is missing."""
    slices = bench.select(part).slices
    a, b = (_flat([take(g[s.tensor], s) for s in slices if s.tensor in g]) for g in (true, cut))
    return cosine(a, b), float(b.norm() / a.norm()) if a is not None and b is not None else None


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat([t.reshape(-1).double() for t in tensors]) if tensors else None


def cosine(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    """Cosine between two gradients; None where one is missing."""
    if a is None or b is None:
        return None
    return float(cosine_similarity(a.reshape(-1).double(), b.reshape(-1).double(), dim=0))


def three_digits(number: float | None) -> str:
    """`0.1234` → `0.123`."""
    return "none" if number is None else f"{number:.3f}"


def folded(names: Sequence[str]) -> list[str]:
    """Names with their indices left out, each once."""
    return list(dict.fromkeys(re.sub(r"\[\d+\]", "", n) for n in names))
