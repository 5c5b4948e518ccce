"""One stage executed abstractly: two optimizer steps of the engine itself, on tensors that have shapes and no values.

There is no second description of a step: `trace_stage` calls `engine.step`, the stage switch and the optimizer as
training does. On real tensors the same function measures what the plan predicts. Read `trace_stage` first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.engine import next_token_loss, step
from frostline.engine.optimizers import FOREIGN, state_bytes
from frostline.engine.stage_switch import Active, set_modes, switch
from frostline.plan.meter import KINDS, Kind, Meter
from frostline.schedule import Stage

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeRows:
    """A micro-batch of rows without values: every target counts."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    n_targets: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one optimizer step of a stage computes and holds. Bytes are of tensors, without the allocator's own."""

    flops: dict[str, dict[Kind, int]]
    """Part → kind → FLOPs; what is between two weights (attention's scores) counts with the part."""
    frontier: str
    """The first part that learns: backward stops there."""
    weight_bytes: int
    """Parameters and buffers."""
    gradient_bytes: int
    """Of what learns."""
    state_bytes: int
    """Optimizer state."""
    copy_bytes: int
    """Leaves of slices, beside the packed tensors."""
    activation_bytes: int
    """Alive between the forward and the backward pass of one micro-batch, logits included."""
    logit_bytes: int
    """Of these, tensors over the vocabulary."""
    peak_bytes: int
    """The most that is alive at once, weights included."""

    @property
    def total_flops(self) -> int:
        """FLOPs of a step."""
        return sum(sum(kinds.values()) for kinds in self.flops.values())

    def of_kind(self, kind: Kind) -> int:
        """FLOPs of one kind."""
        return sum(kinds.get(kind, 0) for kinds in self.flops.values())

    @property
    def transient_bytes(self) -> int:
        """What the peak holds beyond everything named: gradients on their way, packed gradients, scratch."""
        named = self.weight_bytes + self.gradient_bytes + self.state_bytes + self.copy_bytes + self.activation_bytes
        return max(self.peak_bytes - named, 0)


def trace_stage(
    model: nn.Module,
    anatomy: Anatomy,
    stage: Stage,
    *,
    rows: int,
    length: int,
    n_vocabulary: int,
    bf16: bool = False,
    mode: AbstractContextManager[Any] | None = None,
) -> StageCost:
    """The cost of an optimizer step of `rows` rows of `length` tokens, its micro-batches as the stage says.

    `mode`: the fake mode that the model's tensors were made in; None for a real model, which is then trained for two
    steps. Raises `PlanError` for arithmetic without a formula.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    everything = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    meter = Meter(everything)
    by_formula = mode is not None and stage.spec.optimizer.name in FOREIGN

    def element_bytes(tensor: str) -> int:
        return anatomy.tensor[tensor].element_bytes

    alive: list[int] = []
    logits: list[int] = []

    def watched(model: nn.Module, batch: Any) -> torch.Tensor:
        before = meter.live_bytes
        loss = next_token_loss(model, batch)
        alive.append(meter.live_bytes - before)
        logits.append(meter.alive_over(n_vocabulary))
        return loss

    with mode or nullcontext(), _masks_as_in_training() if mode else nullcontext(), meter:
        meter.numbers_only_scale = True
        active = switch(parameters, anatomy, stage, memory={}, leaving=None)
        meter.numbers_only_scale = False
        set_modes(model, stage)
        batches = _micro_batches(rows, length, stage.spec.accumulate)
        for _ in range(2):  # the optimizer makes its state in the first
            meter.flops.clear()
            meter.peak_bytes = meter.live_bytes
            step(model, batches, watched, seed=0, device=CPU, bf16=bf16)
            gradients = sum(o.value.grad.nbytes for o in active.ownership.owned if o.value.grad is not None)
            meter.numbers_only_scale = True
            _update(active, by_formula=by_formula)
            meter.numbers_only_scale = False
        state = state_bytes(stage, element_bytes) if by_formula else _state_bytes(active)
        copies = sum(o.value.nbytes for o in active.ownership.owned if o.is_copy)
        active.ownership.release()
    weights = sum({t.untyped_storage(): t.untyped_storage().nbytes() for t in everything.values()}.values())
    return StageCost(
        flops=_by_part(meter.flops, anatomy),
        frontier=next(c.name for c, _ in stage.selection.by_component()),
        weight_bytes=weights,
        gradient_bytes=gradients,
        state_bytes=state,
        copy_bytes=copies,
        activation_bytes=max(alive),
        logit_bytes=max(logits),
        peak_bytes=weights + meter.peak_bytes + (state if by_formula else 0),
    )


@contextmanager
def _masks_as_in_training() -> Iterator[None]:
    """Inside, transformers chooses the mask of whole rows of one document each, as it does when it sees their values.

    For fake tensors it would build a mask, copy keys and values for every query head and leave the causal kernel.
    """
    with (
        patch("transformers.masking_utils.is_tracing", lambda *_: False),
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None),
    ):
        yield


def _micro_batches(rows: int, length: int, accumulate: int) -> Sequence[FakeRows]:
    each = rows // accumulate
    ids = torch.zeros((each, length), dtype=torch.long)
    return [FakeRows(input_ids=ids, labels=ids, n_targets=each * length)] * accumulate


def _update(active: Active, *, by_formula: bool) -> None:
    """What training does between two backward passes; a foreign library's kernels cannot run without values."""
    active.ownership.clip(active.stage.spec.clip or math.inf)
    active.optimizer.set_rate(1.0)
    if not by_formula:
        active.optimizer.step()
    active.ownership.write_back()
    active.optimizer.zero_grad()


def _state_bytes(active: Active) -> int:
    states = (active.optimizer.state_of(o.value) for o in active.ownership.owned)
    return sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.dim())


def _by_part(flops: Counter[tuple[str, Kind]], anatomy: Anatomy) -> dict[str, dict[Kind, int]]:
    """FLOPs of tensors as FLOPs of parts: a tensor of several parts counts for what they have in common."""
    part_of: dict[str, str] = {}
    for c in anatomy.components:
        for s in c.slices:
            part_of[s.tensor] = _common(part_of[s.tensor], c.name) if s.tensor in part_of else c.name
    out: dict[str, dict[Kind, int]] = {}
    for (tensor, kind), n in flops.items():
        part = part_of.get(tensor.rstrip("*"), "other")
        if tensor.endswith("*"):
            part = part.rpartition(".")[0] or part
        kinds = out.setdefault(part, dict.fromkeys(KINDS, 0))
        kinds[kind] += n
    return out


def _common(first: str, second: str) -> str:
    """The steps that two names begin with; indices that differ are dropped."""
    steps = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            if a.split("[")[0] == b.split("[")[0]:
                steps.append(a.split("[")[0])
            break
        steps.append(a)
    return ".".join(steps)
