"""Buffers stay as they are: what a forward pass in training mode changes in one is put back.

Batch statistics and routers' correction bias move without any gradient. Only buffers that a plain forward pass without
gradients rewrites itself (rotary caches: *derived*) are left alone. Read `FrozenBuffers` first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from frostline.anatomy import fingerprint
from frostline.engine.compiled import as_it_is
from frostline.engine.step import Countable, LossFunction


class FrozenBuffers:
    """The buffers of a model, as they were."""

    def __init__(self, model: nn.Module, derived: tuple[str, ...]) -> None:
        kept = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in derived}
        # who holds each one: a walk through all modules in every step costs more than the comparison
        self._held = {n: (model.get_submodule(n.rpartition(".")[0])._buffers, n.rpartition(".")[2]) for n in kept}
        self._before = {n: (b, b.detach().clone()) for n, b in kept.items()}
        self._seen = {n: b._version for n, b in kept.items()}

    def accept(self, names: Iterable[str]) -> None:
        """Take these buffers as they are now for what they should be: a rule has moved them."""
        for name in names:
            tensor = self._current(name)
            assert tensor is not None
            self._before[name] = (tensor, tensor.detach().clone())
            self._seen[name] = tensor._version

    def _current(self, name: str) -> torch.Tensor | None:
        held, own = self._held[name]
        return held.get(own)

    def restore(self) -> list[str]:
        """Put back what has changed since the last call; returns the names.

        Values are compared: batch norm writes its statistics without counting up the tensor's version. Masks, which
        may be large, are compared only when their version says that something wrote to them.
        """
        changed = []
        for name, (tensor, values) in self._before.items():
            is_mask = tensor.dtype in (torch.bool, torch.uint8)
            current = self._current(name)
            if current is tensor and is_mask and tensor._version == self._seen[name]:
                continue
            if current is not tensor:
                held, own = self._held[name]
                held[own] = tensor
                changed.append(name)
            if not torch.equal(_bytes(tensor), _bytes(values)):
                with torch.no_grad():
                    tensor.copy_(values)
                changed.append(name)
            self._seen[name] = tensor._version
        return list(dict.fromkeys(changed))


def find_derived_buffers(model: nn.Module, batch: Countable, loss: LossFunction) -> tuple[str, ...]:
    """Names of the buffers that a plain forward pass without gradients rewrites itself (rotary caches and the like)."""
    before = {name: fingerprint(b) for name, b in model.named_buffers(remove_duplicate=False)}
    if not before:
        return ()
    model.eval()
    with as_it_is(), torch.no_grad():
        loss(model, batch)
    after = dict(model.named_buffers(remove_duplicate=False))
    return tuple(name for name, old in before.items() if name not in after or fingerprint(after[name]) != old)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN does not equal itself, and -0.0 equals 0.0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
