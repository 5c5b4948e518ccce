"""Where a NaN or an infinity began: the step is computed once more, every module watched. Read `find_nonfinite`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostline.engine.compiled import as_it_is
from frostline.engine.owned import Ownership
from frostline.engine.step import Countable, LossFunction, seed_dropout
from frostline.randomness import derive_seed
from frostline.selection import Selection


def find_nonfinite(
    model: nn.Module,
    selection: Selection,
    ownership: Ownership,
    micro_batches: Sequence[Countable],
    loss: LossFunction,
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
) -> str:
    """The first module whose output is not finite, with its micro-batch; else the parts whose gradients are not."""
    for i, micro_batch in enumerate(micro_batches):
        seed_dropout(derive_seed(seed, "micro-batch", i), device)
        found: list[str] = []
        with (
            as_it_is(),
            _watching(model, found),
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            summed = loss(model, micro_batch)
        at = f"(micro-batch {i + 1} of {len(micro_batches)})"
        if found:
            return f"first in the output of {found[0]} {at}"
        if not bool(summed.isfinite()):
            return f"first in the loss itself {at}"
    parts = {
        c.name: None for c, slices in selection.by_component() for s in slices if not _finite(ownership.gradient(s))
    }
    last = list(parts)[-5:]  # backward begins at the end of the model
    return f"the forward pass is finite, gradients are not in {', '.join(last)}" if last else "gradients alone"


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Inside, names of modules go to `found` whose output is not finite, the innermost first."""
    handles = []
    for name, module in model.named_modules():

        def look(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, torch.Tensor) and not _finite(first):
                found.append(name or type(_module).__name__)

        handles.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all())
