"""One step: forward and backward over the micro-batches of one global batch. There is no second description of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from frostline.randomness import derive_seed


class Countable(Protocol):
    """A micro-batch: anything that knows how many targets count in its loss."""

    @property
    def n_targets(self) -> int:
        """Targets that count."""
        ...


LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""(model, micro-batch) → the *sum* of the loss over the micro-batch's targets, shape ()."""


@runtime_checkable
class StepLoss(Protocol):
    """A loss that depends on all micro-batches of its step, and may look at them before the first backward pass."""

    def for_step(
        self, model: nn.Module, batches: Sequence[Any], replay: Callable[[int], AbstractContextManager[None]]
    ) -> LossFunction:
        """The loss of this step. Inside `replay(i)`, micro-batch i is computed with its own dropout and precision."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step computed."""

    loss: torch.Tensor
    """Mean over all targets of the step, fp64, shape (); on the device: reading it waits for the device."""
    n_targets: int


def seed_dropout(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does for the CPU and this device; for all kinds of devices it takes a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def step(
    model: nn.Module,
    micro_batches: Sequence[Countable],
    loss: LossFunction,
    *,
    seed: int,
    device: torch.device,
    bf16: bool = False,
) -> StepRecord:
    """Add the gradient of the mean loss over all targets of the micro-batches to what learns.

    Every target weighs the same, however targets are spread over micro-batches. Dropout is a function of `seed` and
    the micro-batch's position. `bf16`: matrix products in bf16 (autocast), weights as they are.
    """

    @contextmanager
    def replay(i: int) -> Iterator[None]:
        seed_dropout(derive_seed(seed, "micro-batch", i), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield

    n_targets = sum(m.n_targets for m in micro_batches)
    objective = loss.for_step(model, micro_batches, replay) if isinstance(loss, StepLoss) else loss
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro_batch in enumerate(micro_batches):
        with replay(i):
            summed = objective(model, micro_batch)
        if summed.requires_grad:
            (summed / max(n_targets, 1)).backward()
        total += summed.detach()
    return StepRecord(loss=total / max(n_targets, 1), n_targets=n_targets)
