"""What one block of a tiny model does, measured in a watched forward pass: who reads whose output, who mixes tokens.

Nothing here knows what the parts' names promise; `prove.py` compares. Read `measure_block` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from frostline.anatomy import families
from frostline.anatomy.block_capture import Call, Trace, is_norm, kind_of

FIT = 1e-5
"""Relative residual below which a least-squares fit of a block's output counts as exact (fp32)."""

Topology = Literal["sequential", "parallel", "single branch", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockProof:
    """What was measured in one block."""

    layer: int
    mixes_tokens: dict[str, bool]
    """Branch → whether its output at a position depends on its input at earlier ones."""
    feeds: dict[str, tuple[str, ...]]
    """Norm → branches whose input is its output."""
    follows: dict[str, str]
    """Norm → branch whose output is its input."""
    topology: Topology
    """How the FFN's input relates to the mixer's output; `other` where neither form fits."""
    placement: str
    """Where the norms stand: `pre-norm`, `post-norm`, `sandwich`, or `unknown`."""
    residual_scale: dict[str, float]
    """`stream` and branches → the factors with which they add up to the block's output; empty where no fit is exact."""
    residual_inside: dict[str, str]
    """Branch whose module adds the residual itself (a stop at its output would cut the highway) → the argument that
    it adds."""
    order: tuple[str, ...]
    """Branches and norms in the order of their calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wiring:
    """The calls in one block, and who reads whose output."""

    block: Call | None
    branches: dict[str, Call]
    norms: dict[str, Call]
    feeds: dict[str, tuple[str, ...]]
    """Norm → branches whose input is its output."""
    follows: dict[str, str]
    """Norm → branch whose output is its input."""
    contributions: dict[str, torch.Tensor]
    """Branch → what it adds: its output, or that of the norm which follows it."""


def measure_block(layer: int, trace: Trace) -> BlockProof:
    """What the calls in one block say of it."""
    wiring = _wiring(trace)
    inside = {b: name for b, c in wiring.branches.items() if (name := _residual_argument(c)) is not None}
    return BlockProof(
        layer=layer,
        mixes_tokens={n: _mixes(c) for n, c in wiring.branches.items()},
        feeds=wiring.feeds,
        follows=wiring.follows,
        topology=_topology(wiring),
        placement=_placement(wiring),
        residual_scale={} if inside else _scales(wiring),
        residual_inside=inside,
        order=tuple(trace.parts),
    )


def _wiring(trace: Trace) -> _Wiring:
    branches = {n: c for n, c in trace.parts.items() if not is_norm(n)}
    norms = {n: c for n, c in trace.parts.items() if is_norm(n)}
    fed = {n: tuple(b for b, call in branches.items() if _same(c.returned, call.given)) for n, c in norms.items()}
    feeds = {n: f for n, f in fed.items() if f}
    # a norm between two branches belongs to the one it feeds: the one before it held, or had, no residual
    follows = {
        n: b
        for n, c in norms.items()
        for b, call in branches.items()
        if n not in feeds and _same(c.given, call.returned)
    }
    after = {b: norms[n].returned for n, b in reversed(follows.items())}
    return _Wiring(
        block=trace.block,
        branches=branches,
        norms=norms,
        feeds=feeds,
        follows=follows,
        contributions={b: after.get(b, c.returned) for b, c in branches.items()},
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values (a reshape between is allowed)."""
    return a.numel() == b.numel() and torch.equal(a.detach().reshape(-1), b.detach().reshape(-1))


def _mixes(call: Call) -> bool:
    """Whether the output at the last position depends on any input before it, by one vector-Jacobian product."""
    if not call.returned.requires_grad:
        return False
    n_rows = call.returned.numel() // call.returned.shape[-1]  # some modules see the tokens as rows of a matrix
    inputs = [t for t in (call.given, *call.others.values()) if t.requires_grad and t.numel() % n_rows == 0]
    last = call.returned.reshape(n_rows, -1)[-1].float().sum()
    gradients = torch.autograd.grad(last, inputs, retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.reshape(n_rows, -1)[:-1].abs().max() > 0) for g in gradients)


def _residual_argument(call: Call) -> str | None:
    """The argument that the module adds to its output as it is; None where it adds none."""
    if not call.returned.requires_grad:
        return None
    cotangent = torch.randn(call.returned.shape, generator=torch.Generator().manual_seed(1))
    for name, other in call.others.items():
        if other.requires_grad and other.shape == call.returned.shape:
            (gradient,) = torch.autograd.grad(call.returned, other, cotangent, retain_graph=True, allow_unused=True)
            if gradient is not None and torch.equal(gradient, cotangent):
                return name
    return None


def _combination(target: torch.Tensor, columns: list[torch.Tensor]) -> list[float] | None:
    """Factors with which `columns` add up to `target`, when they do so exactly."""
    if any(c.numel() != target.numel() for c in columns):
        return None
    wanted = target.detach().double().reshape(-1)
    matrix = torch.stack([c.detach().double().reshape(-1) for c in columns], dim=1)
    factors = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    error = torch.linalg.vector_norm(matrix @ factors - wanted) / torch.linalg.vector_norm(wanted)
    return [round(float(f), 4) for f in factors] if float(error) <= FIT else None


def _scales(wiring: _Wiring) -> dict[str, float]:
    """The factors with which the stream and the branches add up to the block's output."""
    if wiring.block is None or not wiring.contributions:
        return {}
    factors = _combination(wiring.block.returned, [wiring.block.given, *wiring.contributions.values()])
    return dict(zip(("stream", *wiring.contributions), factors, strict=True)) if factors else {}


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    return a.numel() == b.numel() and bool(torch.linalg.vector_norm(a - b) <= FIT * torch.linalg.vector_norm(b))


def _topology(wiring: _Wiring) -> Topology:
    """Whether the FFN reads the stream that the mixer read, or one that the mixer was added to."""
    branches, block = wiring.branches, wiring.block
    mixers = [b for b in branches if kind_of(b) in families.MIXERS]
    if len(branches) == 1:
        return "single branch"
    if not mixers or "ffn" not in branches or block is None:
        return "other"
    norm = next((wiring.norms[n] for n, fed in wiring.feeds.items() if "ffn" in fed), None)
    before = norm.given if norm else branches["ffn"].given
    if _close(before, block.given):
        return "parallel"
    for target in (before, norm.returned if norm else before):
        factors = _combination(target, [block.given, *(wiring.contributions[m] for m in mixers)])
        if factors and all(f != 0 for f in factors[1:]):
            return "sequential"
    return "other"


def _placement(wiring: _Wiring) -> str:
    """Where the norms stand."""
    block = wiring.block
    if block is not None and any(_same(c.returned, block.returned) for c in wiring.norms.values()):
        return "norm of the sum"
    return {
        (True, True): "sandwich", (True, False): "pre-norm", (False, True): "post-norm", (False, False): "unknown"
    }[bool(wiring.feeds), bool(wiring.follows)]  # fmt: skip
