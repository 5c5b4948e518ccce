"""Counting what is computed and what is alive: a mode that sees every operation, on real or on fake tensors.

FLOPs are told apart by kind: forward products, gradients of inputs (a product with a weight during backward) and
gradients of weights (a product that ends in one), products computed again (gradient checkpointing), and by the tensor
they belong to. Memory is the sum of the storages that are alive. Read `Meter` first.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frostline.engine.linear_loss import gradient_kind
from frostline.engine.owned import on_host
from frostline.engine.recompute import recomputing
from frostline.errors import PlanError
from frostline.plan.cuda import allocated_bytes
from frostline.plan.formulas import aten, flops_of

Device = Literal["cpu", "cuda"]
Kind = Literal["forward", "recomputed", "input gradients", "weight gradients"]
KINDS: tuple[Kind, ...] = ("forward", "recomputed", "input gradients", "weight gradients")
_COPIES = {aten._to_copy, aten.clone}
"""Operations whose result stands for the same weight in other memory (autocast's casts)."""


class Meter(TorchDispatchMode):
    """Inside, every operation is counted; `weights` names the tensors that products are attributed to."""

    def __init__(self, weights: Mapping[str, torch.Tensor], *, device: Device = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        """Whose allocator the bytes are of; tensors without values are all on the CPU."""
        self.flops: Counter[tuple[str, Kind]] = Counter()
        """(tensor, kind) → FLOPs; products without a weight go to the weight before them, as `tensor*`."""
        self.live_bytes = 0
        """Bytes of the storages made inside that are alive."""
        self.peak_bytes = 0
        self.host_bytes = 0
        """Of them, what offloaded leaves have in the host's memory, which `live_bytes` is without."""
        self.host_peak_bytes = 0
        self._numbers_scale = False
        self._storages: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._last_dimension: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._given = weakref.WeakSet(t.untyped_storage() for t in weights.values())
        self._weights = weakref.WeakKeyDictionary({t.untyped_storage(): n for n, t in weights.items()})
        self._names = {id(t): n for n, t in weights.items()}
        self._last = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            return self._value_of(args[0])
        out = _grouped_product(args, kwargs) if _needs_own_fake(packet, args) else func(*args, **kwargs)
        n = flops_of(packet, args, kwargs, out)
        if n:
            self._attribute(n, args)
        elif packet in _COPIES and (name := self._name_of(args[0])):
            self._weights[out.untyped_storage()] = name
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._alive(tensor)
        return out

    @contextmanager
    def numbers_that_scale(self) -> Iterator[None]:
        """Inside, a number read from a tensor cannot change what is computed: while an optimizer is made or steps."""
        self._numbers_scale = True
        yield
        self._numbers_scale = False

    def restart(self) -> None:
        """Count from here; what is alive stays alive."""
        self.flops.clear()
        self.peak_bytes, self.host_peak_bytes = self.live_bytes, self.host_bytes

    @property
    def total_flops(self) -> int:
        """All that was counted."""
        return sum(self.flops.values())

    def _value_of(self, tensor: torch.Tensor) -> float:
        """A number that is read from a tensor without values: optimizers scale by it, and nothing else may."""
        if not self._numbers_scale:
            raise PlanError("the model reads a tensor's value, on which its cost depends: it cannot be planned")
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _attribute(self, n: int, args: tuple[Any, ...]) -> None:
        name = next((found for t in args if isinstance(t, torch.Tensor) and (found := self._name_of(t))), None)
        if (kind := gradient_kind()) is not None:  # of the head, on the way forward
            self.flops[name or self._last, kind] += n
            return
        node = torch._C._current_autograd_node()
        forward: Kind | None = "recomputed" if recomputing() else "forward" if node is None else None
        if name is not None:
            self._last = name
            self.flops[name, forward or "input gradients"] += n
        elif forward is not None:
            self.flops[f"{self._last}*", forward] += n
        elif (learned := self._weight_behind(node)) is not None:
            self._last = learned
            self.flops[learned, "weight gradients"] += n
        else:
            self.flops[f"{self._last}*", "input gradients"] += n

    def _name_of(self, tensor: Any) -> str | None:
        return self._weights.get(tensor.untyped_storage()) if isinstance(tensor, torch.Tensor) else None

    def _weight_behind(self, node: Any) -> str | None:
        """The matrix whose gradient a backward node computes, looked for through views and casts."""
        todo = deque((f, 0) for f, _ in node.next_functions if f is not None)
        while todo:
            found, depth = todo.popleft()
            variable = getattr(found, "variable", None)
            if variable is not None and variable.dim() > 1:
                return self._names.get(id(variable))
            if depth < 6 and _is_view(found.name()):
                todo.extend((f, depth + 1) for f, _ in found.next_functions if f is not None)
        return None

    def _alive(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._storages or storage in self._given:
            return
        if on_host():
            self._at_host(storage)
            return
        n = storage.nbytes() if self.device == "cpu" else allocated_bytes(storage.nbytes())
        self._storages[storage] = n
        self._last_dimension[storage] = tensor.shape[-1] if tensor.dim() > 1 else 0
        self.live_bytes += n
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, n)

    def _freed(self, n: int) -> None:
        self.live_bytes -= n

    def _at_host(self, storage: torch.UntypedStorage) -> None:
        """A tensor in the host's memory, where the model is on a device: it counts apart."""
        self._storages[storage] = n = storage.nbytes()
        self.host_bytes += n
        self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
        weakref.finalize(storage, self._freed_at_host, n)

    def _freed_at_host(self, n: int) -> None:
        self.host_bytes -= n

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before as alive."""
        for tensor in tensors:
            self._alive(tensor)

    def alive_over(self, n: int) -> int:
        """Bytes of the tensors that are alive and were made with a last dimension of `n`: logits, for a vocabulary."""
        return sum(size for storage, size in self._storages.items() if self._last_dimension.get(storage) == n)


def _is_view(name: str) -> bool:
    return name.startswith(
        ("TBackward", "Transpose", "View", "UnsafeView", "Permute", "ToCopy", "Expand", "Unsqueeze", "Clone")
    )


def _needs_own_fake(packet: Any, args: tuple[Any, ...]) -> bool:
    """torch refuses grouped products of fake tensors in fp32, and computes real ones."""
    return packet is aten._grouped_mm and isinstance(args[0], FakeTensor) and args[0].dtype == torch.float32


def _grouped_product(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The shape that `aten._grouped_mm` would return."""
    first, second = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    shape: tuple[int, ...]
    if first.dim() == second.dim() == 2:
        assert offsets is not None
        shape = (offsets.shape[0], first.shape[0], second.shape[1])
    else:
        shape = (*(second.shape[:1] if first.dim() == 3 else ()), first.shape[-2], second.shape[-1])
    return torch.Tensor.new_empty(first, shape)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages)
