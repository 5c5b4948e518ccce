"""The stage switch: the only writer of `requires_grad`, and the place where an optimizer is made.

`switch` leaves the stage before it and enters the next: gradients are cleared, ownership is rebuilt, an optimizer is
made over what is owned and nothing else, and its state is kept, offloaded or reset as the stage says; modules of which
nothing learns are put into evaluation mode. Read `switch` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from frostline.anatomy import Anatomy, Slice, embedding_dropout, intersect, subtract, subtract_all, take
from frostline.engine.dispatch import set_dispatch
from frostline.engine.optimizers import BY_ELEMENT, Optimizers, leaf_device, leaves, make_optimizer
from frostline.engine.owned import Owned, Ownership, leaf_shape, local_slice, own, relative
from frostline.engine.prefix import learns_before_blocks
from frostline.engine.rounding import Rounding, Shown, keep_masters, master_dtype, update
from frostline.grouped import let_experts_learn
from frostline.schedule import Stage

CPU = torch.device("cpu")


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
    optimizer: Optimizers
    n_restored: int
    """Owned leaves that continue with kept optimizer state; the others start afresh."""
    rounding: Rounding = "nearest"
    """How weights narrower than fp32 take updates."""

    def update(self, *, seed: int = 0, measure: bool = False) -> dict[Slice, Shown]:
        """The optimizer's step, put into the model; see `rounding.update`."""
        name = self.stage.spec.optimizer.name
        return update(self.optimizer, self.ownership, self.rounding, name=name, seed=seed, measure=measure)


def switch(
    parameters: Mapping[str, nn.Parameter],
    anatomy: Anatomy,
    stage: Stage,
    *,
    memory: Memory,
    leaving: Active | None,
    rounding: Rounding = "nearest",
) -> Active:
    """Enter `stage`. `parameters` holds every name of every parameter; `memory` is updated.

    Afterwards `memory` holds what was offloaded, and nothing else: what still learns has its state in the optimizer.
    What still learns keeps its master too; what freezes has the rounded value only, from now on.
    Switch only at a step's end: a gradient accumulated for the stage before would leak into this one.
    """
    if leaving is not None:
        leaving.ownership.release()
        remember(memory, leaving, parameters)
    if stage.spec.state == "reset":
        memory.clear()
    let_learn(parameters, anatomy, stage)
    name = stage.spec.optimizer.name
    known = [piece for piece, stored in memory.items() if stored.optimizer == name]
    ownership = own(parameters, leaves(stage, known), master_dtype=master_dtype(rounding), device=leaf_device(stage))
    if leaving is not None:
        keep_masters(leaving.ownership, ownership)
    optimizer = make_optimizer(ownership.owned, stage)
    n_restored = restore(memory, optimizer, ownership.owned, name)
    _forget_or_offload(memory, stage, parameters)
    return Active(stage=stage, ownership=ownership, optimizer=optimizer, n_restored=n_restored, rounding=rounding)


def let_learn(parameters: Mapping[str, nn.Parameter], anatomy: Anatomy, stage: Stage) -> None:
    """Exactly the tensors in which something of the stage's selection lies may have a gradient; none has one yet."""
    learning: dict[str, list[Slice]] = {}
    for s in stage.selection.slices:
        learning.setdefault(s.tensor, []).append(s)
    for name, parameter in parameters.items():
        pieces = learning.get(anatomy.storage_name(name))
        parameter.grad = None
        parameter.requires_grad_(pieces is not None)
        let_experts_learn(parameter, _leading(pieces, parameter) if pieces and parameter.dim() > 2 else None)


def _leading(pieces: Sequence[Slice], parameter: torch.Tensor) -> list[int] | None:
    """The leading indices in which something of the pieces lies: experts, in a packed weight; None for all."""
    found = sorted({i for piece in pieces for r in piece.index[0] for i in r})
    return found if len(found) < parameter.shape[0] else None


def remember(memory: Memory, active: Active, parameters: Mapping[str, nn.Parameter]) -> None:
    """Store the optimizer state of what has learned; it replaces older state of the same elements."""
    name = active.stage.spec.optimizer.name
    for o in active.ownership.owned:
        state = active.optimizer.state_of(o.value)
        if not state:
            continue
        for piece in [p for p in memory if intersect(p, o.piece) is not None]:
            older = memory.pop(piece)
            if older.optimizer in BY_ELEMENT:  # state of a matrix is of no use for a part of it
                for rest in subtract(piece, o.piece):
                    memory[rest] = replace(older, state=_within(older.state, rest, piece, parameters))
        memory[o.piece] = StoredState(optimizer=name, state=state)


def restore(memory: Memory, optimizer: Optimizers, owned: tuple[Owned, ...], name: str) -> int:
    """Give owned leaves the stored state of their elements; returns how many got it.

    State of another optimizer is of no use; nor is state of a matrix for a part of it, where the optimizer does not
    treat every element by itself.
    """
    n_restored = 0
    for o in owned:
        stored = memory.get(o.piece)
        if stored is not None and stored.optimizer == name:
            optimizer.set_state(o.value, stored.state)
        elif name in BY_ELEMENT:
            found = next((p for p in memory if relative(o.piece, p) is not None), None)
            if found is None or memory[found].optimizer != name:
                continue
            optimizer.set_state(o.value, _within(memory[found].state, o.piece, found, {o.piece.tensor: o.parameter}))
        else:
            continue
        n_restored += 1
    return n_restored


def _forget_or_offload(memory: Memory, stage: Stage, parameters: Mapping[str, nn.Parameter]) -> None:
    """What learns has its state in the optimizer; the rest is moved to the CPU, or forgotten."""
    if stage.spec.state != "offload":
        memory.clear()
        return
    for piece in list(memory):
        stored = memory.pop(piece)
        left = subtract_all((piece,), stage.selection.slices)
        if left == (piece,):
            memory[piece] = replace(stored, state=_moved(stored.state, CPU))
        elif stored.optimizer in BY_ELEMENT:
            for rest in left:
                memory[rest] = replace(stored, state=_moved(_within(stored.state, rest, piece, parameters), CPU))


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state with its tensors on a device; counters (no dimensions) stay where they are."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state.items()}


def _within(
    state: Mapping[str, Any], piece: Slice, container: Slice, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """The state of `piece`, from the state of the slice `container` that holds it; of this rank's part of both."""
    parameter = parameters[piece.tensor]
    mine, held = local_slice(piece, parameter), local_slice(container, parameter)
    inside = relative(mine, held) if mine.n_elements else None
    out: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() == held.n_elements:
            part = take(value.reshape(held.shape), inside) if inside else value.reshape(-1)[:0]
            out[key] = part.reshape(leaf_shape(mine.shape)).clone(memory_format=torch.contiguous_format)
        else:
            out[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return out


def frozen_modules(model: nn.Module, stage: Stage) -> list[nn.Module]:
    """The largest modules that have parameters and of which none learns; with a frozen embedding, its dropout too."""
    out: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            out.append(module)
        elif parameters:
            for child in module.children():
                visit(child)

    visit(model)
    return out if learns_before_blocks(stage) else out + embedding_dropout(model)


def set_modes(model: nn.Module, stage: Stage) -> None:
    """Training mode, except for modules of which nothing learns: their dropout is off, their statistics stay.

    What the stage says about capacity and jitter of experts is in force.
    """
    reshard(model)
    set_dispatch(model, stage)
    model.train()
    if stage.spec.frozen_dropout == "off":
        for module in frozen_modules(model, stage):
            module.eval()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give up what it has gathered; any other model is left alone.

    Without a backward pass (an evaluation) its root stays gathered. The gathered parameters are those that the model
    then has, with the `requires_grad` of when they were gathered: the next step would let the wrong ones learn.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What a switch changes of a model beside its weights."""

    requires_grad: dict[nn.Parameter, bool]
    training: dict[nn.Module, bool]


def flags_of(model: nn.Module) -> Flags:
    """The flags of a model as they are, to be put back with `set_flags`."""
    return Flags(
        requires_grad={p: p.requires_grad for p in model.parameters()},
        training={m: m.training for m in model.modules()},
    )


def set_flags(flags: Flags) -> None:
    """Put the flags back; gradients are cleared."""
    for parameter, requires_grad in flags.requires_grad.items():
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for module, training in flags.training.items():
        module.training = training
