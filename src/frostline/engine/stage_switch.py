"""The stage switch: the only writer of `requires_grad`, and the place where an optimizer is made.

`switch` leaves the stage before it and enters the next: gradients are cleared, ownership is rebuilt, an optimizer is
made over what is owned and nothing else, and its state is kept or reset as the stage says. Read `switch` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, Slice, subtract, take
from frostline.anatomy.slices import intersect
from frostline.engine.owned import Owned, Ownership, own, relative
from frostline.recipe import OptimizerSpec
from frostline.schedule import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredState:
    """Optimizer state of one slice, kept while it may be needed again."""

    optimizer: str
    state: dict[str, Any]


Memory = dict[Slice, StoredState]
"""Optimizer state by slice: disjoint slices, each with the state it had when it last learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Active:
    """A stage in progress."""

    stage: Stage
    ownership: Ownership
    optimizer: torch.optim.Optimizer
    n_restored: int
    """Owned leaves that continue with kept optimizer state; the others start afresh."""


def switch(
    parameters: Mapping[str, nn.Parameter],
    anatomy: Anatomy,
    stage: Stage,
    *,
    memory: Memory,
    leaving: Active | None,
) -> Active:
    """Enter `stage`. `parameters` holds every name of every parameter; `memory` is updated."""
    if leaving is not None:
        leaving.ownership.release()
        remember(memory, leaving)
    if stage.spec.state == "reset":
        memory.clear()
    learning = {s.tensor for s in stage.selection.slices}
    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.requires_grad_(anatomy.storage_name(name) in learning)
    ownership = own(parameters, stage.selection.slices)
    optimizer = build_optimizer(ownership.owned, stage.spec.optimizer, anatomy)
    n_restored = restore(memory, optimizer, ownership.owned, stage.spec.optimizer.name)
    return Active(stage=stage, ownership=ownership, optimizer=optimizer, n_restored=n_restored)


def build_optimizer(owned: tuple[Owned, ...], spec: OptimizerSpec, anatomy: Anatomy) -> torch.optim.Optimizer:
    """The optimizer over the owned leaves; norms and biases in a group without decay, unless `spec` says otherwise."""
    no_decay = set() if spec.decay_norms_and_biases else norms_and_biases(anatomy)
    decayed = [o.value for o in owned if o.piece.tensor not in no_decay]
    others = [o.value for o in owned if o.piece.tensor in no_decay]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, spec.weight_decay), (others, 0.0))
        if params
    ]
    # lr is set at every step; fused is safe here because every leaf is contiguous
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=spec.momentum or 0.0, fused=True)
    betas, eps = spec.betas or (0.9, 0.999), spec.eps or 1e-8
    make = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return make(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def norms_and_biases(anatomy: Anatomy) -> set[str]:
    """Names of the tensors that hold norms and biases."""
    return {s.tensor for c in anatomy.components for s in c.slices if c.is_norm or anatomy.is_bias(s)}


def remember(memory: Memory, active: Active) -> None:
    """Store the optimizer state of what has learned; it replaces older state of the same elements."""
    for o in active.ownership.owned:
        state = active.optimizer.state.get(o.value)
        if not state:
            continue
        for piece in [p for p in memory if intersect(p, o.piece) is not None]:
            older = memory.pop(piece)
            for rest in subtract(piece, o.piece):
                memory[rest] = StoredState(optimizer=older.optimizer, state=_within(older.state, rest, piece))
        memory[o.piece] = StoredState(optimizer=active.stage.spec.optimizer.name, state=dict(state))


def restore(memory: Memory, optimizer: torch.optim.Optimizer, owned: tuple[Owned, ...], name: str) -> int:
    """Give owned leaves the stored state of their elements; returns how many got it.

    A leaf whose elements have different histories, or learned under another optimizer, starts afresh.
    """
    n_restored = 0
    for o in owned:
        found = next((p for p in memory if relative(o.piece, p) is not None), None)
        if found is not None and memory[found].optimizer == name:
            optimizer.state[o.value] = _within(memory[found].state, o.piece, found)
            n_restored += 1
    return n_restored


def _within(state: Mapping[str, Any], piece: Slice, container: Slice) -> dict[str, Any]:
    """The state of `piece`, from the state of the slice `container` that holds it."""
    inside = relative(piece, container)
    assert inside is not None
    out: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == container.shape:
            whole_state = piece == container
            out[key] = value if whole_state else take(value, inside).clone(memory_format=torch.contiguous_format)
        else:
            out[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return out
