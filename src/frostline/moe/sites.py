"""Where a model routes tokens: its routers and experts by their parts, and what they do in one forward pass.

`find_sites` finds them by the anatomy, `watch_routers` keeps what passes through them: each router's logits (with
their graph), the experts that each token was sent to and the weights of their outputs. What is watched is the first
forward pass only: a block that is computed again for its backward pass runs after the watching has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, Component
from frostline.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Site:
    """One layer's router and experts."""

    name: str
    """The part, such as `layers[3].ffn`."""
    layer: int
    """0-based."""
    n_experts: int
    router: nn.Module
    """Its output is, or begins with, the logits (tokens, experts)."""
    experts: nn.Module


@dataclass(slots=True)
class Routed:
    """What one forward pass did at one site."""

    logits: torch.Tensor | None = None
    """(tokens, experts), before any softmax or sigmoid; experts that compute nothing count too."""
    index: torch.Tensor | None = None
    """(tokens, chosen), int64."""
    weight: torch.Tensor | None = None
    """(tokens, chosen): the factors of the chosen experts' outputs."""
    n_calls: int = field(default=0)
    """Times the router ran; more than once is not understood."""


def find_sites(model: nn.Module, anatomy: Anatomy) -> tuple[Site, ...]:
    """Every router with its experts, in the model's order; empty for a dense model."""
    routers: dict[str, list[Component]] = {}
    for c in anatomy.components:
        at = next((k for k, (name, _) in enumerate(c.path) if name == "router"), None)
        if at is not None and c.path[0][0] == "layers":
            routers.setdefault(".".join(c.name.split(".")[:at]), []).append(c)
    return tuple(_site(model, anatomy, name, parts) for name, parts in routers.items())


def _site(model: nn.Module, anatomy: Anatomy, name: str, router: Sequence[Component]) -> Site:
    experts = [c for c in anatomy.components if c.name.startswith(f"{name}.experts")]
    members = {c.path[-2] for c in experts if c.path[-2][0] == "experts"}
    weights = [
        s.tensor for c in router for s in c.slices if anatomy.tensor[s.tensor].kind == "parameter" and len(s.shape) > 1
    ]
    return Site(
        name=name,
        layer=router[0].path[0][1] or 0,
        n_experts=len(members),
        router=_common(model, weights),
        experts=_common(model, [s.tensor for c in experts for s in c.slices]),
    )


def _common(model: nn.Module, tensors: Sequence[str]) -> nn.Module:
    """The smallest module that holds all of these tensors."""
    steps = [name.split(".")[:-1] for name in tensors]
    together = takewhile(lambda names: len(set(names)) == 1, zip(*steps, strict=False))
    return model.get_submodule(".".join(names[0] for names in together))


@contextmanager
def watch_routers(sites: Sequence[Site]) -> Iterator[dict[str, Routed]]:
    """Inside, every forward pass fills what is yielded: the site's name → what its router and experts did.

    Only references are kept; nothing is computed inside the pass, so that a block is recomputed as it was computed.
    """
    seen = {site.name: Routed() for site in sites}
    handles = []
    for site in sites:
        handles.append(site.router.register_forward_hook(_keep_logits(seen[site.name], site)))
        handles.append(site.experts.register_forward_pre_hook(keep_choice(seen[site.name]), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_logits(routed: Routed, site: Site) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        found = [t for t in outputs if _is_float(t) and t.shape[-1] >= site.n_experts]
        # Llama 4 gives its scores first and its logits second, both as wide as there are experts
        routed.logits = (found[1] if type(_module).__name__ == "Llama4Router" else found[0]) if found else None
        routed.n_calls += 1

    return keep


def keep_choice(routed: Routed) -> Any:
    """A forward pre-hook (with keywords) of an experts module: notes which experts each token is sent to."""

    def keep(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        index = next((t for t in tensors if not _is_float(t) and t.dim() == 2), None)
        routed.index = index
        weights = (t for t in tensors if index is not None and _is_float(t) and t.shape == index.shape)
        routed.weight = next(weights, None)

    return keep


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def logits_of(routed: Routed, site: Site) -> torch.Tensor:
    """The router's logits (tokens, experts) in fp32 or wider. Raises `ModelError` when they were not seen."""
    if routed.logits is None or routed.n_calls != 1:
        found = f"ran {routed.n_calls} times in one pass" if routed.n_calls != 1 else "gives no logits"
        raise ModelError(f"{site.name}.router {found}; balancing and usage are known for routers that run once")
    logits = routed.logits.flatten(0, -2)
    return logits if logits.dtype == torch.float64 else logits.float()


def choice_of(routed: Routed, site: Site) -> torch.Tensor:
    """The experts that each token was sent to, (tokens, chosen). Raises `ModelError` when they were not seen."""
    if routed.index is None:
        raise ModelError(
            f"{site.name}.experts is not told which experts each token visits ({type(site.experts).__name__}), so "
            "their load cannot be counted"
        )
    return routed.index
