"""Where gradients go: measured on one batch, with the routes that are in force and without them.

Nothing is changed: gradients are asked for, not accumulated. Read `measure_flow` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from frostline.anatomy import take
from frostline.engine.compiled import as_it_is
from frostline.engine.loss import loss_of, next_token_loss
from frostline.engine.route_points import watched
from frostline.engine.routes import Points, set_routes
from frostline.schedule import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFlow:
    """L2 norms of the loss's gradient at one block; None where none arrives."""

    out: float | None
    """At its output."""
    into: float | None
    """At its input."""
    through: dict[str, float | None]
    """Part that reads the stream → what comes back through it alone, past it apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """One measurement."""

    embed: float | None
    """At the embedding's output."""
    blocks: tuple[BlockFlow, ...]
    norms: dict[str, float | None]
    """Component that learns → norm of its gradient."""
    bias: dict[str, tuple[float, float] | None]
    """Component that learns → cosine to, and norm over, its gradient without stops; None where it has none."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_flow(
    model: nn.Module, points: Points, stage: Stage, batch: Any, *, device: torch.device, bf16: bool = False
) -> Flow:
    """Gradients of a stage's loss on one batch in evaluation mode, beside those of the model's own loss without stops.

    Residual connections that the stage removes stay removed on both sides: another function has other gradients.
    Routes are in force as before afterwards; the caller puts the modules' modes back.
    """
    with as_it_is():  # compiled blocks do not show what happens inside them
        return _measured(model, points, stage, batch, device=device, bf16=bf16)


def _measured(model: nn.Module, points: Points, stage: Stage, batch: Any, *, device: torch.device, bf16: bool) -> Flow:
    model.eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), watched(points.every()):
        loss = loss_of(stage, points)(model, batch) / max(batch.n_targets, 1)
        places = _places(points)
        found = _gradients(loss, [*places, *parameters.values()])
    at, routed = found[: len(places)], dict(zip(parameters, found[len(places) :], strict=True))
    set_routes(points, [r for r in stage.routes if r.mode == "remove"])
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = next_token_loss(model, batch) / max(batch.n_targets, 1)
        true = dict(zip(parameters, _gradients(loss, list(parameters.values())), strict=True))
    finally:
        set_routes(points, stage.routes)
    norms, bias = _compared(stage, routed, true)
    return Flow(embed=_norm(at[0]), blocks=tuple(_block_flows(points, at[1:])), norms=norms, bias=bias)


def _places(points: Points) -> list[torch.Tensor | None]:
    """The embedding's output; then for every block its output, its input, and what its parts read."""
    out = [points.embed.gave]
    for b in points.blocks:
        out += [b.block.gave, b.block.read, *(p.read for p in b.parts.values())]
    return out


def _block_flows(points: Points, at: Sequence[torch.Tensor | None]) -> list[BlockFlow]:
    rest, out = list(at), []
    for b in points.blocks:
        mine, rest = rest[: 2 + len(b.parts)], rest[2 + len(b.parts) :]
        through = dict(zip(b.parts, map(_norm, mine[2:]), strict=True))
        readers = {r for readers in b.wiring.skips.values() for r in readers} or set(b.wiring.branches)
        out.append(
            BlockFlow(
                out=_norm(mine[0]), into=_norm(mine[1]), through={k: v for k, v in through.items() if k in readers}
            )
        )
    return out


def _gradients(loss: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if not wanted or not loss.requires_grad:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def _norm(gradient: torch.Tensor | None) -> float | None:
    return None if gradient is None else torch.linalg.vector_norm(gradient.float()).item()


def _compared(
    stage: Stage, routed: dict[str, torch.Tensor | None], true: dict[str, torch.Tensor | None]
) -> tuple[dict[str, float | None], dict[str, tuple[float, float] | None]]:
    norms: dict[str, float | None] = {}
    bias: dict[str, tuple[float, float] | None] = {}
    for component, slices in stage.selection.by_component():
        pairs = [(routed[s.tensor], true[s.tensor], s) for s in slices if s.tensor in routed]
        a = _flat([take(r, s) for r, _, s in pairs if r is not None])
        b = _flat([take(t, s) for _, t, s in pairs if t is not None])
        norms[component.name] = None if a is None else a.norm().item()
        if a is None or b is None or a.shape != b.shape or not b.norm() or not a.norm():
            bias[component.name] = None
        else:
            cosine = (torch.dot(a, b) / (a.norm() * b.norm())).item()
            bias[component.name] = (cosine, (a.norm() / b.norm()).item())
    return norms, bias


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat([t.double().reshape(-1) for t in tensors]) if tensors else None
