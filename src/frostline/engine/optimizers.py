"""The optimizers: which leaves each wants, and how each is made. Read `make_optimizer` first.

Every leaf is contiguous, so that fused kernels are safe. Optimizers that treat a matrix as one thing (Adafactor, Muon)
or quantise their state in blocks (8-bit AdamW) get one leaf per component; the others get neighbours joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, Slice, intersect_all, merge, refine
from frostline.engine.owned import Owned
from frostline.errors import RecipeError
from frostline.recipe import OptimizerSpec
from frostline.schedule import Group, Stage, norms_and_biases

BY_ELEMENT = ("sgd", "adam", "adamw", "lion")
"""Optimizers that treat every element by itself: their state can be cut and joined as parameters are."""
FOREIGN = {"adamw8bit": "bitsandbytes", "lion": "bitsandbytes"}
"""Optimizers of a library that is not installed by default."""


def check_installed(name: str) -> None:
    """Raise `RecipeError` when an optimizer needs a library that is not there."""
    library = FOREIGN.get(name)
    if library and find_spec(library) is None:
        raise RecipeError(f"the optimizer {name} needs {library}: pip install 'frostline[{library}]'")


def leaf_device(stage: Stage) -> torch.device | None:
    """Where a stage's leaves are; None: where the model is."""
    return torch.device(stage.spec.optimizer.device) if stage.spec.optimizer.device else None


class Optimizers:
    """One optimizer, or several for different leaves, as one. Every group has a `peak_lr` beside its `lr`."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]
        self._part_of = {p: part for part in parts for g in part.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [g for part in self.parts for g in part.param_groups]

    def set_rate(self, factor: float) -> float:
        """Set every learning rate to its peak times `factor`; returns the largest."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return max(float(g["lr"]) for g in self.param_groups)

    def step(self) -> None:
        """Update every leaf that has a gradient."""
        for part in self.parts:
            part.step()

    def step_as(self, leaf: nn.Parameter, stand_in: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """Update `stand_in`, which has a gradient, as if it were `leaf` with this state; returns the state after it.

        Nothing else is updated, and the state that is kept for `leaf` is not changed.
        """
        part = self._part_of[leaf]
        groups, kept = part.param_groups, part.state.pop(leaf, None)
        group = next((g for g in groups if any(p is leaf for p in g["params"])), None)
        if group is None:
            return dict(state)
        held, part.param_groups = group["params"], [group]
        group["params"] = [stand_in]
        if state:
            part.state[stand_in] = dict(state)
        try:
            part.step()
            return dict(part.state.pop(stand_in, {}))
        finally:
            group["params"], part.param_groups = held, groups
            if kept is not None:
                part.state[leaf] = kept

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_of(self, leaf: nn.Parameter) -> dict[str, Any]:
        """The state of one leaf; empty before its first step."""
        return dict(self._part_of[leaf].state.get(leaf, {}))

    def set_state(self, leaf: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Give one leaf a state, moved to where the leaf is.

        Counters (no dimensions) stay where they are, except for fused kernels, which read them on the leaf's device.
        """
        part = self._part_of[leaf]
        fused = bool(part.defaults.get("fused"))
        part.state[leaf] = {
            key: value.to(leaf.device) if isinstance(value, torch.Tensor) and (value.dim() or fused) else value
            for key, value in state.items()
        }


def leaves(stage: Stage, known: Iterable[Slice]) -> tuple[Slice, ...]:
    """The slices that a stage's optimizer owns one leaf each of.

    `known`: slices with a state to go on from; a leaf lies inside one of them or outside all.
    """
    if stage.spec.optimizer.name in BY_ELEMENT:
        known = tuple(known)
        return tuple(piece for group in stage.groups for piece in refine(merge(group.slices), known))
    components = stage.selection.anatomy.components
    return tuple(
        piece
        for c in components
        for group in stage.groups
        for s in c.slices
        for piece in intersect_all((s,), group.slices)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    value: nn.Parameter
    group: Group
    matrix: bool
    """Whether it is a matrix inside a layer."""


def make_optimizer(owned: Sequence[Owned], stage: Stage) -> Optimizers:
    """The optimizer of a stage over its leaves. Raises `RecipeError` when it cannot work on them."""
    spec = stage.spec.optimizer
    check_installed(spec.name)
    sharded = next((o.piece.tensor for o in owned if o.is_sharded), None)
    if sharded and spec.name not in BY_ELEMENT:
        raise RecipeError(
            f"{spec.name} treats a matrix as one thing, and {sharded} is spread over processes: "
            f"use one of {', '.join(BY_ELEMENT)}"
        )
    if sharded and spec.device is not None:
        raise RecipeError(
            f"optimizer.device: {sharded} is spread over processes, and its parts are updated where they are; leave "
            "`device` out"
        )
    group_of = {s: g for g in stage.groups for s in g.slices}
    matrices = matrices_of(stage.selection.anatomy)
    found = [
        _Leaf(
            value=o.value,
            group=group_of.get(o.piece) or next(g for g in stage.groups if intersect_all((o.piece,), g.slices)),
            matrix=o.piece.tensor in matrices and o.value.dim() == 2,
        )
        for o in owned
    ]
    if spec.name == "muon":
        muon, adamw = [x for x in found if x.matrix], [x for x in found if not x.matrix]
        parts = [_muon(muon, spec)] if muon else []
        return Optimizers([*parts, *([_adamw(adamw, spec)] if adamw else [])])
    return Optimizers([_MAKERS[spec.name](found, spec)])


def matrices_of(anatomy: Anatomy) -> set[str]:
    """Names of the weights inside layers."""
    plain = norms_and_biases(anatomy)
    inside = (c for c in anatomy.components if c.path[0][0] == "layers")
    return {s.tensor for c in inside for s in c.slices} - plain


def _groups(found: Sequence[_Leaf], betas: tuple[float, float] | None = None) -> list[dict[str, Any]]:
    """torch's parameter groups: leaves of equal settings together."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for leaf in found:
        own = {"betas": leaf.group.betas or betas} if betas else {}
        key = (leaf.group.lr, leaf.group.weight_decay, *own.values())
        group = {"params": [], "lr": leaf.group.lr, "weight_decay": leaf.group.weight_decay, **own}
        out.setdefault(key, group)["params"].append(leaf.value)
    return list(out.values())


def _adamw(found: Sequence[_Leaf], spec: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(found, (0.9, 0.999)), eps=spec.eps or 1e-8, fused=True)


def _adam(found: Sequence[_Leaf], spec: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.Adam(_groups(found, (0.9, 0.999)), eps=spec.eps or 1e-8, fused=True)


def _sgd(found: Sequence[_Leaf], spec: OptimizerSpec) -> torch.optim.Optimizer:
    momentum = spec.momentum or 0.0
    # torch's fused SGD fails when some leaves of a group have momentum and others do not have it yet; and on the CPU it
    # leaves bf16 leaves of 16 elements and more as they are, without an error (torch 2.13)
    safe = not momentum and all(leaf.value.element_size() >= 4 for leaf in found)
    return torch.optim.SGD(_groups(found), lr=0.0, momentum=momentum, fused=safe or None)


def _adafactor(found: Sequence[_Leaf], _: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(_groups(found))


def _muon(found: Sequence[_Leaf], spec: OptimizerSpec) -> torch.optim.Optimizer:
    # its update scaled to the size of AdamW's, so that one learning rate suits both
    momentum = 0.95 if spec.momentum is None else spec.momentum
    return torch.optim.Muon(_groups(found), momentum=momentum, adjust_lr_fn="match_rms_adamw")


def _bitsandbytes(name: str) -> Any:
    return getattr(import_module("bitsandbytes").optim, name)


def _adamw8bit(found: Sequence[_Leaf], spec: OptimizerSpec) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _bitsandbytes("AdamW8bit")(_groups(found, (0.9, 0.999)), eps=spec.eps or 1e-8)
    return made


def _lion(found: Sequence[_Leaf], _: OptimizerSpec) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _bitsandbytes("Lion")(_groups(found, (0.9, 0.99)))
    return made


_MAKERS: dict[str, Callable[[Sequence[_Leaf], OptimizerSpec], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
    "lion": _lion,
}
