"""The optimizer owns only what learns.

`own` gives one `Owned` per learning slice: a contiguous leaf that an optimizer may change. For a whole tensor in its
own dtype that leaf is the parameter itself. For part of a tensor, an fp32 master or a leaf on another device it is a
copy: the packed parameter stays the model's only one, a hook moves the slice's gradient to the leaf, and `write_back`
copies the leaf into the parameter after the optimizer's step. So weight decay, momentum and state cannot reach the
rest. A view is never given to an optimizer: torch's fused AdamW writes outside a non-contiguous view. Cost: the packed
gradient exists for a moment.

Under FSDP2 a parameter is a DTensor, and a rank owns what of a slice lies in its shard, through the shard's plain
tensor: indexing a DTensor gives a copy, and writing to that changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.hooks import RemovableHandle

from frostline.anatomy import Slice, intersect, put, take, whole
from frostline.anatomy.slices import Indices, compress
from frostline.grouped import let_experts_learn


@dataclass(frozen=True, kw_only=True, slots=True)
class Owned:
    """Elements of one tensor that an optimizer may change."""

    piece: Slice
    """The elements, of the whole tensor; under FSDP2 this rank may hold only some of them, or none."""
    parameter: nn.Parameter
    """The model's parameter that the elements belong to."""
    local: Slice
    """The elements that this rank holds, in the coordinates of its part of the parameter."""
    value: nn.Parameter
    """A contiguous leaf: `parameter` itself, its shard, or a copy of the elements, leading dimensions of 1 dropped."""

    is_copy: bool
    """Whether `value` must be written back."""
    is_offloaded: bool = False
    """Whether `value` is in the host's memory, and the model is not."""

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only part of the parameter."""
        return isinstance(self.parameter, DTensor)

    @property
    def is_master(self) -> bool:
        """Whether `value` holds more than the parameter's dtype can show."""
        return self.value.element_size() > self.parameter.element_size()

    def write_back(self) -> None:
        """Copy the leaf into its place in the model, if it is a copy."""
        if self.is_copy and self.value.numel():
            target = local_part(self.parameter)
            put(target, self.local, self.value.detach().to(target).reshape(self.local.shape))

    def add_gradient(self, packed: torch.Tensor) -> None:
        """Add this slice's part of the parameter's gradient to the leaf's."""
        gradient = take(local_part(packed), self.local).reshape(self.value.shape) if self.value.numel() else None
        with host_side(self.is_offloaded):
            if gradient is None:
                gradient = torch.zeros_like(self.value)
            if self.value.grad is None:
                own = gradient.to(self.value)
                as_it_was = own is gradient  # and may be a view of the packed gradient, which is cleared
                self.value.grad = own.clone(memory_format=torch.contiguous_format) if as_it_was else own.contiguous()
            else:
                self.value.grad.add_(gradient.to(self.value))


class Ownership:
    """Everything that learns in a stage. `release` it before the next one is made."""

    def __init__(self, owned: Iterable[Owned]) -> None:
        self.owned = tuple(owned)
        apart: dict[nn.Parameter, list[Owned]] = {}
        for o in self.owned:
            if o.value is not o.parameter:
                apart.setdefault(o.parameter, []).append(o)
        self._hooks = [self._move_gradient(p, mine) for p, mine in apart.items()]
        self._of: dict[str, list[Owned]] = {}
        for o in self.owned:
            self._of.setdefault(o.piece.tensor, []).append(o)

    @property
    def is_offloaded(self) -> bool:
        """Whether what learns has its leaves in the host's memory, and the model is not there: all of them or none."""
        return any(o.is_offloaded for o in self.owned)

    def write_back(self) -> None:
        """Copy every leaf that is a copy into its place in the model."""
        with torch.no_grad():
            for o in self.owned:
                o.write_back()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to an L2 norm of `max_norm` over all that learns; returns the norm before."""
        norm = self.norm()
        self.scale(max_norm, norm)
        return norm

    def scale(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, down to `max_norm`."""
        with host_side(self.is_offloaded):
            torch.nn.utils.clip_grads_with_norm_([o.value for o in self.owned], max_norm, norm)

    def norm(self) -> torch.Tensor:
        """The L2 norm of the gradients over all that learns; shape ()."""
        values = [o.value for o in self.owned]
        if not any(o.is_sharded for o in self.owned):
            with host_side(self.is_offloaded):
                return torch.nn.utils.get_total_norm([v.grad for v in values if v.grad is not None])
        sharded = next(o.parameter for o in self.owned if o.is_sharded)
        # one type on all ranks, whatever a rank holds; fp64, because fp32 squares overflow from norms of 1e19 on
        squares = torch.zeros((), dtype=torch.float64, device=local_part(sharded).device)
        gradients = [v.grad for v in values if v.grad is not None and v.numel()]
        if gradients:
            squares += torch.nn.utils.get_total_norm(gradients).to(squares).square()
        for group in shard_groups(sharded):
            torch.distributed.all_reduce(squares, group=group)
        return squares.sqrt().to(reduce(torch.promote_types, (v.dtype for v in values)))

    def release(self) -> None:
        """Remove the hooks; every expert of a packed weight may have a gradient again."""
        for o in self.owned:
            let_experts_learn(o.parameter, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def gradient(self, piece: Slice) -> torch.Tensor | None:
        """The gradient of one piece, of which every element is owned; None when none arrived. Not for shards."""
        parts = []
        for o in self._of.get(piece.tensor, ()):
            inside = relative(piece, o.piece)
            if inside is not None:
                return take(o.value.grad.reshape(o.piece.shape), inside) if o.value.grad is not None else None
            common = intersect(piece, o.piece)
            if common is not None and o.value.grad is not None:
                within = relative(common, o.piece)
                assert within is not None
                parts.append(take(o.value.grad.reshape(o.piece.shape), within).reshape(-1))
        if piece.tensor not in self._of:
            raise KeyError(str(piece))
        return torch.cat(parts) if parts else None

    @staticmethod
    def _move_gradient(parameter: nn.Parameter, mine: list[Owned]) -> RemovableHandle:
        def move(packed: torch.Tensor) -> None:
            assert packed.grad is not None
            for o in mine:
                o.add_gradient(packed.grad)
            packed.grad = None

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(move)
        return handle


def own(
    parameters: Mapping[str, nn.Parameter],
    slices: Iterable[Slice],
    *,
    master_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Ownership:
    """Own disjoint `slices` of `parameters`, one leaf each, in the parameters' dtype and place by default.

    `master_dtype`: of the leaves of parameters whose own dtype is narrower; no leaf is narrower than its parameter.
    `device`: where all leaves are, copies where the parameters are elsewhere.
    """
    return Ownership(_owned(parameters[s.tensor], s, master_dtype, device) for s in slices)


def _owned(parameter: nn.Parameter, piece: Slice, dtype: torch.dtype | None, device: torch.device | None) -> Owned:
    part = local_part(parameter)
    local = local_slice(piece, parameter)
    dtype = dtype if dtype is not None and dtype.itemsize > part.element_size() else None
    elsewhere = device is not None and (device != part.device or as_if_elsewhere())
    as_it_is = dtype is None and not elsewhere
    if as_it_is and local == whole(piece.tensor, part.shape) and part.is_contiguous():
        value = parameter if part is parameter else nn.Parameter(part.detach().view(leaf_shape(part.shape)))
        return Owned(piece=piece, parameter=parameter, local=local, value=value, is_copy=False)
    with host_side(elsewhere):
        copy = take(part.detach(), local).to(dtype=dtype, device=device, copy=True)
        value = nn.Parameter(copy.reshape(leaf_shape(local.shape)).contiguous())
    return Owned(piece=piece, parameter=parameter, local=local, value=value, is_copy=True, is_offloaded=elsewhere)


_thread = threading.local()


def on_host() -> bool:
    """Whether this thread is at work on leaves in the host's memory, the model being elsewhere: for counting bytes."""
    return bool(getattr(_thread, "host", False))


@contextmanager
def host_side(offloaded: bool) -> Iterator[None]:
    """Inside, `on_host` says so, where leaves are offloaded."""
    before, _thread.host = on_host(), on_host() or offloaded
    try:
        yield
    finally:
        _thread.host = before


def as_if_elsewhere() -> bool:
    """Whether leaves that are to be on a device are made as if the model were on another one."""
    return bool(getattr(_thread, "elsewhere", False))


@contextmanager
def model_elsewhere() -> Iterator[None]:
    """Inside, they are; for a plan of another device, and for tests."""
    before, _thread.elsewhere = as_if_elsewhere(), True
    try:
        yield
    finally:
        _thread.elsewhere = before


def leaf_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a copy: leading dimensions of 1 are dropped, so that one expert of many is a matrix."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that this rank holds of a DTensor; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_groups(tensor: torch.Tensor) -> list[ProcessGroup]:
    """The groups of ranks that a DTensor is spread over; ranks that hold copies of one another (HSDP) are none."""
    assert isinstance(tensor, DTensor)
    return [tensor.device_mesh.get_group(dim) for dim, how in enumerate(tensor.placements) if how.is_shard()]


def local_slice(piece: Slice, parameter: torch.Tensor) -> Slice:
    """What this rank holds of a slice, in the coordinates of its part; empty ranges where it holds nothing."""
    if not isinstance(parameter, DTensor):
        return piece
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    box = Slice(piece.tensor, tuple((range(at, at + n),) for at, n in zip(offset, shape, strict=True)))
    here = intersect(piece, box) if all(shape) else None
    if here is None:
        return Slice(piece.tensor, tuple((range(0),) for _ in shape))
    return Slice(
        piece.tensor,
        tuple(compress(i - at for r in indices for i in r) for indices, at in zip(here.index, offset, strict=True)),
    )


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
