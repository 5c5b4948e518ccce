"""The tensors of a mixture of experts, from those of a dense model: copied part by part, experts and routers as told.

A part of either model that finds no partner is an error. Read `filled` first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.anatomy import Component, Slice, named_tensors, put, read_anatomy, take
from frostline.errors import ModelError
from frostline.model_source import quiet_transformers
from frostline.moe.pairs import TARGETS, Pair
from frostline.randomness import derive_seed

Init = Literal["copy", "noise", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What experts and routers are at first."""

    init: Init
    """Experts: copies of the FFN; copies plus noise; or copies of which some neurons are drawn anew."""
    noise: float
    """In standard deviations of each tensor."""
    drop: float
    """The share of each expert's neurons that are drawn anew."""
    router_std: float
    """Standard deviation of a router's numbers; 0 would make every logit tie."""
    seed: int


def filled(dense: nn.Module, config: Any, pair: Pair, start: Start) -> nn.Module:
    """The target model with every tensor set. Raises `ModelError` for parts without a partner."""
    with quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    filler = _Filler(dense, model, start, shared=shared_share(pair.target))
    with torch.no_grad():
        for component in filler.to.components:
            filler.fill(component)
    filler.check_all_used(pair)
    return model


def shared_share(target: str) -> float:
    """The share of the FFN that the expert which every token visits has at first; the rest is the others'."""
    return 0.5 if TARGETS[target].shared_width else 0.0


class _Filler:
    """Copies parts of a dense model into a mixture of experts; remembers which it used."""

    def __init__(self, dense: nn.Module, model: nn.Module, start: Start, *, shared: float) -> None:
        self.source, self.to = read_anatomy(dense), read_anatomy(model)
        self.given, self.taken = named_tensors(dense), named_tensors(model)
        self.start, self.shared = start, shared
        self.used: set[str] = set()

    def fill(self, part: Component) -> None:
        """Set every tensor of one part of the target."""
        names = [name for name, _ in part.path]
        if "router" in names:
            self.draw_router(part)
        elif "shared_expert_gate" in names:
            self.write(part, [torch.zeros(s.shape) for s in self.stored(part)])  # sigmoid(0) = ½: the share it gets
        elif "experts" in names or "shared_expert" in names:
            values = self.dense_values(part, re.sub(r"\.(experts\[\d+\]|shared_expert)\.", ".", part.name))
            if names[-1] == "down" and "experts" in names:
                values = [v * (1 - self.shared) for v in values]  # a power of two: no digit is lost
            if "experts" in names and self.start.init != "copy":
                values = self.changed(part, values)
            self.write(part, values)
        elif self.stored(part):
            self.write(part, self.dense_values(part, part.name))

    def stored(self, part: Component) -> list[Slice]:
        """The slices that a checkpoint holds, under the name that owns them; the rest the model computes itself."""
        return [s for s in part.slices if self.to.tensor[s.tensor].persistent and s.tensor not in self.to.ties]

    def dense_values(self, part: Component, name: str) -> list[torch.Tensor]:
        """What the dense model's part `name` holds, one tensor for each stored slice of the target's part."""
        wanted, found = self.stored(part), self.source.component.get(name)
        slices = [s for s in found.slices if self.source.tensor[s.tensor].persistent] if found else []
        if len(slices) != len(wanted):
            raise ModelError(
                f"the target's {part.name} holds {len(wanted)} tensors and the dense model's {name} {len(slices)}; "
                "a bias that only one of them has cannot be carried over"
            )
        self.used.add(name)
        return [take(self.given[s.tensor], s).detach().clone() for s in slices]

    def write(self, part: Component, values: Sequence[torch.Tensor]) -> None:
        """Put values into the stored slices of a part; experts' slices have one dimension of length 1 more."""
        for piece, value in zip(self.stored(part), values, strict=True):
            if tuple(n for n in piece.shape if n != 1) != tuple(n for n in value.shape if n != 1):
                raise ModelError(f"{part.name} has shape {piece.shape}, the dense model's {tuple(value.shape)}")
            put(self.taken[piece.tensor], piece, value.reshape(piece.shape))

    def draw_router(self, part: Component) -> None:
        """Small normal numbers for the router's matrix, zeros for biases and corrections."""
        for piece in self.stored(part):
            is_matrix = len(piece.shape) == 2 and self.to.learnable(piece) and min(piece.shape) > 1
            values = torch.zeros(piece.shape)
            if is_matrix:
                generator = self.generator("upcycle router", part.path[0][1] or 0)
                values.normal_(0, self.start.router_std, generator=generator)
            put(self.taken[piece.tensor], piece, values)

    def changed(self, part: Component, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One expert's matrices made different from the other experts'; its biases, if any, are left."""
        layer = part.path[0][1] or 0
        expert = next(i for name, i in part.path if name == "experts") or 0
        kind = ("gate", "up", "down").index(part.path[-1][0])
        generator = self.generator(f"upcycle {self.start.init}", layer, expert, kind)
        if self.start.init == "noise":
            return [_noisy(v, self.start.noise, generator) if v.dim() > 1 else v for v in values]
        dim = 1 if part.path[-1][0] == "down" else 0
        neurons = self.neurons(values[0].shape[dim], layer, expert)
        return [_redrawn(v, neurons, dim=dim, generator=generator) if v.dim() > 1 else v for v in values]

    def neurons(self, n: int, layer: int, expert: int) -> torch.Tensor:
        """Which neurons of one expert are drawn anew: the same ones in gate, up and down."""
        order = torch.randperm(n, generator=self.generator("upcycle neurons", layer, expert))
        return order[: max(1, round(self.start.drop * n))]

    def generator(self, purpose: str, *numbers: int) -> torch.Generator:
        """Random numbers for one use."""
        return torch.Generator().manual_seed(derive_seed(self.start.seed, purpose, *numbers))

    def check_all_used(self, pair: Pair) -> None:
        """Raise `ModelError` when the dense model has parameters that nothing took."""
        left = [
            c.name
            for c in self.source.components
            if c.name not in self.used
            and any(self.source.learnable(s) and s.tensor not in self.source.ties for s in c.slices)
        ]
        if left:
            raise ModelError(f"'{pair.target}' has no place for {len(left)} parts of this model: {', '.join(left[:4])}")


def _noisy(value: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    return value + noise * value.std() * torch.randn(value.shape, generator=generator)


def _redrawn(value: torch.Tensor, neurons: torch.Tensor, *, dim: int, generator: torch.Generator) -> torch.Tensor:
    old = value.index_select(dim, neurons)
    new = old.mean() + old.std() * torch.randn(old.shape, generator=generator)
    return value.index_copy(dim, neurons, new)
