"""The optimizer owns only what learns.

`own` gives one `Owned` per learning slice: a contiguous leaf that an optimizer may change. For a whole tensor that
leaf is the parameter itself. For part of a tensor it is a copy: the packed parameter stays the model's only one, a
hook moves the slice's gradient to the leaf, and `write_back` copies the leaf into the parameter after the
optimizer's step. So weight decay, momentum and state cannot reach the rest. A view is never given to an optimizer:
torch's fused AdamW writes outside a non-contiguous view. Cost: the packed gradient exists for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from frostline.anatomy import Slice, merge, put, take, whole
from frostline.anatomy.slices import Indices, compress


@dataclass(frozen=True, kw_only=True, slots=True)
class Owned:
    """Elements of one tensor that an optimizer may change."""

    piece: Slice
    parameter: nn.Parameter
    """The model's parameter that the elements belong to."""
    value: nn.Parameter
    """A contiguous leaf of shape `piece.shape`: `parameter` itself, or a copy of the slice."""

    @property
    def is_copy(self) -> bool:
        """Whether `value` must be written back."""
        return self.value is not self.parameter


class Ownership:
    """Everything that learns in a stage. `release` it before the next one is made."""

    def __init__(self, owned: Iterable[Owned]) -> None:
        self.owned = tuple(owned)
        copies: dict[nn.Parameter, list[Owned]] = {}
        for o in self.owned:
            if o.is_copy:
                copies.setdefault(o.parameter, []).append(o)
        self._hooks = [self._move_gradient(p, mine) for p, mine in copies.items()]

    def write_back(self) -> None:
        """Copy every leaf that is a copy into its place in the model."""
        with torch.no_grad():
            for o in self.owned:
                if o.is_copy:
                    put(o.parameter, o.piece, o.value)

    def release(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def gradient(self, piece: Slice) -> torch.Tensor | None:
        """The gradient of one piece, a slice of something owned; None when none arrived."""
        for o in self.owned:
            inside = relative(piece, o.piece)
            if inside is not None:
                return take(o.value.grad, inside) if o.value.grad is not None else None
        raise KeyError(str(piece))

    @staticmethod
    def _move_gradient(parameter: nn.Parameter, mine: list[Owned]) -> RemovableHandle:
        def move(packed: torch.Tensor) -> None:
            assert packed.grad is not None
            for o in mine:
                gradient = take(packed.grad, o.piece)
                if o.value.grad is None:
                    o.value.grad = gradient.clone(memory_format=torch.contiguous_format)
                else:
                    o.value.grad.add_(gradient)
            packed.grad = None

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(move)
        return handle


def own(parameters: Mapping[str, nn.Parameter], slices: Iterable[Slice]) -> Ownership:
    """Own `slices` of `parameters`, neighbours joined into one leaf."""
    return Ownership(_owned(parameters[piece.tensor], piece) for piece in merge(slices))


def _owned(parameter: nn.Parameter, piece: Slice) -> Owned:
    if piece == whole(piece.tensor, parameter.shape) and parameter.is_contiguous():
        return Owned(piece=piece, parameter=parameter, value=parameter)
    copy = take(parameter.detach(), piece).clone(memory_format=torch.contiguous_format)
    return Owned(piece=piece, parameter=parameter, value=nn.Parameter(copy))


def relative(piece: Slice, container: Slice) -> Slice | None:
    """`piece` in the coordinates of the tensor `take(…, container)`; None when it does not lie inside it."""
    if piece.tensor != container.tensor:
        return None
    if piece == container:
        return whole(piece.tensor, piece.shape)
    index: list[Indices] = []
    for mine, outer in zip(piece.index, container.index, strict=True):
        if len(mine) == len(outer) == 1 and mine[0].step == outer[0].step == 1:
            start = mine[0].start - outer[0].start
            if start < 0 or mine[0].stop > outer[0].stop:
                return None
            index.append((range(start, start + len(mine[0])),))
            continue
        positions = {i: at for at, i in enumerate(i for r in outer for i in r)}
        wanted = [i for r in mine for i in r]
        if any(i not in positions for i in wanted):
            return None
        index.append(compress(positions[i] for i in wanted))
    return Slice(piece.tensor, tuple(index))
