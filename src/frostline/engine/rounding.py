"""How weights that are narrower than fp32 take an optimizer's updates, and what of an update they show.

`masters`: the optimizer works on fp32 copies of what learns, and the weights are these copies rounded. `stochastic`:
there are no copies; every step is computed in fp32 and rounded up or down by chance, so that it is right on average.
`nearest`: the optimizer works on the weights themselves, and an update of less than half of what lies between two
neighbouring numbers is lost. Weights in fp32 or wider are what the optimizer works on, whatever is chosen. Read
`update` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from frostline.anatomy import Slice, intersect, put, take
from frostline.engine.optimizers import BY_ELEMENT, Optimizers
from frostline.engine.owned import Owned, Ownership, host_side, relative
from frostline.randomness import derive_seed

Rounding = Literal["masters", "stochastic", "nearest"]
CHUNK = 1 << 22
"""Elements whose update is computed a second time in fp32, when it is measured: bounds the memory for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What one step did to one leaf, element by element."""

    wanted: torch.Tensor
    """Where the step, computed in fp32, leads to another number than the weight before it."""
    lost: torch.Tensor
    """Where it does, and the weight has stayed what it was."""


def master_dtype(rounding: Rounding) -> torch.dtype | None:
    """The dtype of what the optimizer works on, where weights are narrower; None for the weights' own."""
    return torch.float32 if rounding == "masters" else None


def stepped_bytes(n: int, rounding: Rounding) -> int:
    """Bytes per element in which the optimizer steps and keeps its state, of a weight with `n`."""
    return n if rounding == "nearest" else max(n, 4)


def is_narrow(tensor: torch.Tensor) -> bool:
    """Whether a weight is kept in fewer bits than fp32."""
    return tensor.element_size() < 4


def update(
    optimizer: Optimizers,
    ownership: Ownership,
    rounding: Rounding = "nearest",
    *,
    name: str,
    seed: int,
    measure: bool = False,
) -> dict[Slice, Shown]:
    """The optimizer's step over what is owned, put into the model; gradients that were used may be gone afterwards.

    `name`: of the optimizer. `seed`: of this step. Returns what `measure` asks for: owned slice → what the step did to
    it, of the weights that are narrower than fp32. Parts of tensors that are spread over processes are not measured.
    """
    narrow = [o for o in ownership.owned if is_narrow(o.parameter) and o.value.grad is not None]
    measured = [o for o in narrow if not o.is_sharded] if measure else []
    with host_side(ownership.is_offloaded):
        if rounding == "stochastic" and narrow:
            shown = _step_by_chance(optimizer, ownership, seed=seed, measured={id(o) for o in measured})
        else:
            shown = _step_at_once(optimizer, rounding, measured, by_element=name in BY_ELEMENT)
    ownership.write_back()
    return shown


def _step_at_once(
    optimizer: Optimizers, rounding: Rounding, measured: Sequence[Owned], *, by_element: bool
) -> dict[Slice, Shown]:
    """A step of all leaves together."""
    shown: dict[Slice, Shown] = {}
    if measured and rounding == "nearest":
        with _disable_current_modes():  # what is measured is no part of the step
            shown = {o.piece: _would_show(optimizer, o, by_element=by_element) for o in measured}
    optimizer.step()
    if measured and rounding == "masters":
        with _disable_current_modes():
            shown = {o.piece: _shows(_weight(o), o.value.detach()) for o in measured}
    return shown


def _weight(o: Owned) -> torch.Tensor:
    """What the model has of a leaf, where the leaf is."""
    return take(o.parameter.detach(), o.local).to(o.value.device)


def _step_by_chance(
    optimizer: Optimizers, ownership: Ownership, *, seed: int, measured: set[int]
) -> dict[Slice, Shown]:
    """A step of one leaf after the other, each in fp32 for as long as its step takes; its state stays in fp32."""
    shown: dict[Slice, Shown] = {}
    for o in ownership.owned:
        if o.value.grad is None:
            continue
        stand_in = nn.Parameter(o.value.detach().float()) if is_narrow(o.value) else o.value
        if stand_in is not o.value:
            stand_in.grad, o.value.grad = o.value.grad.float(), None
        optimizer.set_state(o.value, optimizer.step_as(o.value, stand_in, optimizer.state_of(o.value)))
        if stand_in is o.value:
            continue
        generator = torch.Generator(o.value.device)
        generator.manual_seed(derive_seed(seed, f"rounding:{o.piece}", _rank() if o.is_sharded else 0))
        rounded = round_by_chance(stand_in.detach(), generator).to(o.value.dtype)
        if id(o) in measured:
            with _disable_current_modes():
                wanted = stand_in.detach() != o.value.detach().float()
                shown[o.piece] = Shown(wanted=wanted, lost=wanted & (rounded == o.value.detach()))
        o.value.detach().copy_(rounded)
    return shown


def round_by_chance(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 values as bf16, to the neighbour above or below with a probability that makes the mean right.

    bf16 is the upper half of fp32's bits. A number drawn evenly from [0, 2¹⁶) is added to the lower half, and what does
    not carry is cut off: it carries with probability lower half / 2¹⁶, which is where the value lies between its two
    neighbours. What bf16 holds exactly, has a lower half of 0 and stays; NaN and infinity stay what they are.
    """
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    cut = ((bits + chance) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


def _shows(before: torch.Tensor, after: torch.Tensor) -> Shown:
    """What is seen of a step from narrow weights to an fp32 result, once that is rounded."""
    after = after.reshape(before.shape)
    wanted = after != before.to(after.dtype)
    return Shown(wanted=wanted, lost=wanted & (after.to(before.dtype) == before))


def _would_show(optimizer: Optimizers, o: Owned, *, by_element: bool) -> Shown:
    """The step that is about to be made, made on an fp32 copy and thrown away."""
    assert o.value.grad is not None
    value, gradient, state = o.value.detach(), o.value.grad, optimizer.state_of(o.value)
    n = value.numel()
    flat = by_element and n > CHUNK
    found = []
    for at in range(0, n, CHUNK) if flat else (0,):
        cut = slice(at, at + CHUNK) if flat else None
        before = _part(value, n, cut)
        stand_in = nn.Parameter(before.float())
        stand_in.grad = _part(gradient, n, cut).float()
        optimizer.step_as(o.value, stand_in, {k: _fp32(_part(v, n, cut)) for k, v in state.items()})
        found.append(_shows(before, stand_in.detach()))
    return Shown(
        wanted=torch.cat([f.wanted.reshape(-1) for f in found]), lost=torch.cat([f.lost.reshape(-1) for f in found])
    )


def _part(value: Any, n: int, cut: slice | None) -> Any:
    """The elements `cut` of something that has one value per element of a leaf; anything else as it is."""
    whole = cut is None or not isinstance(value, torch.Tensor) or value.numel() != n
    return value if whole else value.reshape(-1)[cut]


def _fp32(value: Any) -> Any:
    """A copy, in fp32 where it is a tensor of floating point."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


def n_shown(shown: Mapping[Slice, Shown], piece: Slice) -> tuple[int, int] | None:
    """(wanted, lost) elements of one piece, from what was measured of the leaves that hold it; None if nothing was."""
    wanted = lost = 0
    if not any(leaf.tensor == piece.tensor for leaf in shown):
        return None
    for leaf, masks in shown.items():
        common = intersect(piece, leaf) if leaf.tensor == piece.tensor else None
        inside = relative(common, leaf) if common is not None else None
        if inside is not None:
            wanted += int(take(masks.wanted.reshape(leaf.shape), inside).sum())
            lost += int(take(masks.lost.reshape(leaf.shape), inside).sum())
    return wanted, lost


def keep_masters(old: Ownership, new: Ownership) -> None:
    """What learns on goes on from the master it had, and not from that master rounded."""
    with torch.no_grad():
        for mine in (o for o in new.owned if o.is_master and o.value.numel()):
            for other in (o for o in old.owned if o.is_master and o.value.numel() and o.parameter is mine.parameter):
                common = intersect(mine.local, other.local)
                if common is None:
                    continue
                here, there = relative(common, mine.local), relative(common, other.local)
                assert here is not None
                assert there is not None
                values = take(other.value.detach().reshape(other.local.shape), there)
                put(mine.value.detach().view(mine.local.shape), here, values.to(mine.value.device))


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
