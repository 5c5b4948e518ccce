"""Everything a run needs to go on as if it had never stopped, as tensors and plain data.

Weights are those of what has learned so far and of nothing else: the rest is the base model's, and the base is verified
by its recorded hashes. Randomness has no state: it is a function of seed and step. Read `RunState` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, Slice, named_tensors, put, reaches_outside, slice_from_json, slice_to_json, take
from frostline.engine.optimizers import BY_ELEMENT, leaf_device, make_optimizer
from frostline.engine.owned import Owned, own
from frostline.engine.rollback import Window
from frostline.engine.rounding import Rounding, master_dtype
from frostline.engine.stage_switch import Active, Memory, StoredState, let_learn
from frostline.schedule import Stage

Tensors = dict[str, dict[str, torch.Tensor]]
"""File → name → tensor."""
MASTER = "master"
"""Among the state of a leaf: the leaf itself, in fp32, where the model's weight is narrower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run after a step, its stage still entered."""

    step: int
    """Steps done."""
    stage: int
    """Index of the stage that was entered last: at its end, the one that is being left."""
    endings: tuple[int, ...]
    losses: tuple[float, ...]
    """Held-out losses of the stage that a plateau looks at."""
    drifted: tuple[str, ...]
    """Buffers that the stage has put back."""
    n_skipped: int
    """Steps in a row, the last one included, whose update was left out."""
    recent: tuple[float, ...]
    """The stage's last losses, for the detection of spikes."""
    left_out: tuple[Window, ...]
    """Batches that rollbacks have left out."""
    records: Mapping[str, int]
    """Record of the run folder → its bytes, or its number of files: what comes after was written later."""
    leaves: tuple[tuple[Slice, dict[str, Any]], ...]
    """What the optimizer owns, in its order, each with its state; an fp32 master is there as `master`."""
    memory: Memory
    """State of what does not learn now, moved away."""
    weights: Mapping[Slice, torch.Tensor]
    """Values of every piece that has learned."""


def capture(
    tensors: Mapping[str, torch.Tensor],
    active: Active,
    memory: Memory,
    learned: tuple[Slice, ...],
    **rest: Any,
) -> RunState:
    """The state of a run, copied to the CPU. `tensors`: the model's, buffers too; `rest`: the other fields."""
    with torch.no_grad():
        weights = {p: _copy(take(tensors[p.tensor], p)) for p in learned}
    leaves = tuple((o.piece, _copied(_leaf_state(active, o))) for o in active.ownership.owned)
    kept = {p: StoredState(optimizer=s.optimizer, state=_copied(s.state)) for p, s in memory.items()}
    return RunState(stage=active.stage.index, leaves=leaves, memory=kept, weights=weights, **rest)


def _leaf_state(active: Active, o: Owned) -> dict[str, Any]:
    """The optimizer's state of a leaf, with the leaf itself where the model's weight does not show all of it."""
    return active.optimizer.state_of(o.value) | ({MASTER: o.value} if o.is_master else {})


def reenter(
    model: nn.Module,
    anatomy: Anatomy,
    stage: Stage,
    state: RunState,
    rounding: Rounding = "nearest",
) -> Active:
    """The stage as it was: weights put in, the same leaves owned in the same order, each with its optimizer state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = named_tensors(model)
    with torch.no_grad():
        for piece, values in state.weights.items():
            put(tensors[piece.tensor], piece, values.to(tensors[piece.tensor].device))
    let_learn(parameters, anatomy, stage)
    pieces = [piece for piece, _ in state.leaves]
    ownership = own(parameters, pieces, master_dtype=master_dtype(rounding), device=leaf_device(stage))
    optimizer = make_optimizer(ownership.owned, stage)
    n_restored = 0
    for o, (_, kept) in zip(ownership.owned, state.leaves, strict=True):
        stored = {k: v for k, v in kept.items() if k != MASTER}
        if o.is_master:
            o.value.detach().copy_(kept[MASTER])
        if stored:
            optimizer.set_state(o.value, stored)
        n_restored += bool(stored)
    return Active(stage=stage, ownership=ownership, optimizer=optimizer, n_restored=n_restored, rounding=rounding)


def misfits(state: RunState, stage: Stage) -> list[str]:
    """What of a state does not fit the model and the stage that it says it is of; empty for every state of this run."""
    shapes = {t.name: t.shape for t in stage.selection.anatomy.tensors}
    out = [
        f"the weights of {p}"
        for p, v in state.weights.items()
        if p.tensor not in shapes or reaches_outside(p, shapes[p.tensor]) or tuple(v.shape) != p.shape
    ]
    strange = [p for p, _ in state.leaves if not stage.selection.within(p)]
    if strange or sum(p.n_elements for p, _ in state.leaves) != stage.selection.n_elements:
        out.append(f"what the optimizer owns ({strange[0] if strange else 'not all that learns'})")
    by_element = [*state.leaves] if stage.spec.optimizer.name in BY_ELEMENT else []
    by_element += [(p, s.state) for p, s in state.memory.items() if s.optimizer in BY_ELEMENT]
    for piece, values in by_element:
        tensors = [v for v in values.values() if isinstance(v, torch.Tensor) and v.dim()]
        if any(v.numel() != piece.n_elements for v in tensors):
            out.append(f"the optimizer's state of {piece}")
    return out


def to_files(state: RunState) -> tuple[Tensors, dict[str, Any]]:
    """The state as tensors by file, and plain data."""
    tensors: Tensors = {"weights": {str(i): t for i, t in enumerate(state.weights.values())}, "optimizer": {}}
    leaves = [_written(p, s, f"leaf{i}", tensors["optimizer"]) for i, (p, s) in enumerate(state.leaves)]
    memory = [
        {**_written(p, s.state, f"memory{i}", tensors["optimizer"]), "optimizer": s.optimizer}
        for i, (p, s) in enumerate(state.memory.items())
    ]
    data = {
        "step": state.step,
        "stage": state.stage,
        "endings": list(state.endings),
        "losses": list(state.losses),
        "drifted": list(state.drifted),
        "n_skipped": state.n_skipped,
        "recent": list(state.recent),
        "left_out": [list(w) for w in state.left_out],
        "records": dict(state.records),
        "weights": [slice_to_json(p) for p in state.weights],
        "leaves": leaves,
        "memory": memory,
    }
    return tensors, data


def from_files(tensors: Tensors, data: Mapping[str, Any]) -> RunState:
    """The inverse of `to_files`."""
    optimizer = tensors["optimizer"]
    return RunState(
        step=data["step"],
        stage=data["stage"],
        endings=tuple(data["endings"]),
        losses=tuple(data["losses"]),
        drifted=tuple(data["drifted"]),
        n_skipped=data["n_skipped"],
        recent=tuple(data.get("recent", ())),
        left_out=tuple((first, after) for first, after in data.get("left_out", ())),
        records=data["records"],
        weights={slice_from_json(p): tensors["weights"][str(i)] for i, p in enumerate(data["weights"])},
        leaves=tuple((slice_from_json(r["piece"]), _read(r, optimizer)) for r in data["leaves"]),
        memory={
            slice_from_json(r["piece"]): StoredState(optimizer=r["optimizer"], state=_read(r, optimizer))
            for r in data["memory"]
        },
    )


def _written(piece: Slice, state: Mapping[str, Any], prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    named = {key: f"{prefix}.{key}" for key, value in state.items() if isinstance(value, torch.Tensor)}
    tensors.update({name: state[key] for key, name in named.items()})
    plain = {key: value for key, value in state.items() if key not in named}
    return {"piece": slice_to_json(piece), "keys": list(state), "tensors": named, "plain": plain}


def _read(row: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {k: tensors[row["tensors"][k]] if k in row["tensors"] else row["plain"][k] for k in row["keys"]}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
