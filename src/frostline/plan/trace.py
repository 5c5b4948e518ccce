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

from frostline.anatomy import Anatomy, Component, Slice, find_blocks, intersect, module_of, named_tensors, parse_path
from frostline.engine import Points, loss_of, next_token_loss, set_routes, step
from frostline.engine.optimizers import FOREIGN, state_bytes
from frostline.engine.owned import model_elsewhere
from frostline.engine.recompute import recomputing
from frostline.engine.rounding import Rounding, stepped_bytes
from frostline.engine.stage_switch import Active, set_modes, switch
from frostline.engine.step import LossFunction, StepLoss
from frostline.engine.train import enter_routes
from frostline.plan.cuda import cuda_kernels
from frostline.plan.meter import KINDS, Device, Kind, Meter
from frostline.plan.shapes import StepShape, micro_batches
from frostline.schedule import Stage

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one optimizer step of a stage computes and holds. Bytes are of tensors, without the allocator's own."""

    flops: dict[str, dict[Kind, int]]
    """Part → kind → FLOPs; what is between two weights (attention's scores) counts with the part."""
    frontier: str
    """The first part that learns and gets a gradient: backward stops there."""
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
    """The most that is alive at once, weights included; what is in the host's memory is not, for a device."""
    host_bytes: int
    """The most that offloaded leaves, their gradients and their state hold of the host's memory; 0 without them."""
    prefix_flops: int
    """Forward FLOPs below the frontier: what activations kept from another epoch would save."""
    prefix_bytes_per_token: int
    """What would be kept for it: the activations that enter the part at the frontier."""
    unreached: tuple[str, ...]
    """Parts that are to learn and that no gradient reaches: the loss does not depend on them."""

    @property
    def total_flops(self) -> int:
        """FLOPs of a step."""
        return sum(sum(kinds.values()) for kinds in self.flops.values())

    def of_kind(self, kind: Kind) -> int:
        """FLOPs of one kind."""
        return sum(kinds.get(kind, 0) for kinds in self.flops.values())

    @property
    def resident_bytes(self) -> int:
        """By about how much a process on the CPU grows: the peak, a fifth of it for the allocator and scratch of
        kernels, and 150 MB for libraries loaded late (fitted to `benchmarks/plan_memory.py`)."""
        return int(1.2 * self.peak_bytes + 150e6)

    @property
    def transient_bytes(self) -> int:
        """What the peak holds beyond everything named: gradients on their way, packed gradients, scratch."""
        kept = 0 if self.host_bytes else self.gradient_bytes + self.state_bytes + self.copy_bytes
        named = self.weight_bytes + kept + self.activation_bytes
        return max(self.peak_bytes - named, 0)


def trace_stage(
    model: nn.Module,
    anatomy: Anatomy,
    stage: Stage,
    *,
    rows: int,
    length: int,
    n_vocabulary: int,
    shape: StepShape | None = None,
    bf16: bool = False,
    rounding: Rounding = "nearest",
    device: Device = "cpu",
    points: Points | None = None,
    language: LossFunction = next_token_loss,
    mode: AbstractContextManager[Any] | None = None,
) -> StageCost:
    """The cost of an optimizer step of `rows` rows of `length` tokens, or of `shape`; micro-batches as the stage says.

    `language`: the next-token loss. `mode`: the fake mode that the model's tensors were made in; None for a real model,
    which is then trained for two steps, on the CPU. `device`: whose kernels and allocator the bytes are of. Raises
    `PlanError` for arithmetic without a formula.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    everything = named_tensors(model)
    meter = Meter(everything, device=device)
    by_formula = mode is not None and stage.spec.optimizer.name in FOREIGN

    def stepped(tensor: str) -> int:
        return stepped_bytes(anatomy.tensor[tensor].element_bytes, rounding)

    frontier = next(c.name for c, _ in stage.selection.by_component())
    watch = _Watch(meter, n_vocabulary, loss_of(stage, points, language))
    watched_entry = watch.entry(_at_frontier(model, anatomy, frontier))
    as_trained = _masks_as_in_training(shape) if mode else nullcontext()
    kernels = cuda_kernels() if device == "cuda" else nullcontext()
    with mode or nullcontext(), as_trained, kernels, watched_entry, meter:
        meter.numbers_only_scale = True
        with model_elsewhere() if device == "cuda" else nullcontext():
            active = switch(parameters, anatomy, stage, memory={}, leaving=None, rounding=rounding)
        meter.numbers_only_scale = False
        enter_routes(points, stage)
        set_modes(model, stage)
        batches = micro_batches(rows, length, stage.spec.accumulate, shape=shape)
        for _ in range(2):  # the optimizer makes its state in the first
            meter.flops.clear()
            meter.peak_bytes, meter.host_peak_bytes = meter.live_bytes, meter.host_bytes
            step(model, batches, watch, seed=0, device=CPU, bf16=bf16)
            gradients = sum(o.value.grad.nbytes for o in active.ownership.owned if o.value.grad is not None)
            unreached = _parts(anatomy, [o.piece for o in active.ownership.owned if o.value.grad is None])
            meter.numbers_only_scale = True
            update(active, by_formula=by_formula)
            meter.numbers_only_scale = False
        state = state_bytes(stage, stepped) if by_formula else _state_bytes(active)
        offloaded = active.ownership.is_offloaded
        copies = sum(o.value.nbytes for o in active.ownership.owned if o.is_copy)
        active.ownership.release()
        if points is not None:
            set_routes(points, ())
    n_tokens = shape.computed if shape else rows * length
    weights = sum({t.untyped_storage(): t.untyped_storage().nbytes() for t in everything.values()}.values())
    return StageCost(
        flops=_by_part(meter.flops, anatomy),
        frontier=next((c.name for c, _ in stage.selection.by_component() if c.name not in unreached), frontier),
        weight_bytes=weights,
        gradient_bytes=gradients,
        state_bytes=state,
        copy_bytes=copies,
        activation_bytes=max(watch.alive),
        logit_bytes=max(watch.logits),
        peak_bytes=weights + meter.peak_bytes + (state if by_formula and not offloaded else 0),
        host_bytes=meter.host_peak_bytes + (state if by_formula and offloaded else 0),
        prefix_flops=watch.prefix_flops * stage.spec.accumulate,
        prefix_bytes_per_token=watch.entering_bytes * stage.spec.accumulate // n_tokens,
        unreached=unreached,
    )


class _Watch:
    """Looks at the meter at three moments of a micro-batch: before, where learning begins, and before its backward."""

    def __init__(self, meter: Meter, n_vocabulary: int, loss: LossFunction) -> None:
        self.meter, self.n_vocabulary, self._loss, self._of_step = meter, n_vocabulary, loss, loss
        self.alive: list[int] = []
        self.logits: list[int] = []
        self.prefix_flops = 0
        self.entering_bytes = 0
        self._flops_before = 0

    def for_step(self, model: nn.Module, batches: Sequence[Any], replay: Any) -> LossFunction:
        """The engine's loss of one step, watched; what it looks at first counts as the step's."""
        loss = self._loss
        self._of_step = loss.for_step(model, batches, replay) if isinstance(loss, StepLoss) else loss
        return self

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The engine's loss, watched."""
        before, self._flops_before = self.meter.live_bytes, self.meter.total_flops
        loss = self._of_step(model, batch)
        self.alive.append(self.meter.live_bytes - before)
        self.logits.append(self.meter.alive_over(self.n_vocabulary))
        return loss

    @contextmanager
    def entry(self, module: nn.Module | None) -> Iterator[None]:
        """Inside, note what is computed before `module` and what enters it; of one micro-batch."""

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recomputing():
                return
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            self.entering_bytes = given[0].nbytes if given else 0
            self.prefix_flops = self.meter.total_flops - self._flops_before

        if module is None:
            yield
            return
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _at_frontier(model: nn.Module, anatomy: Anatomy, frontier: str) -> nn.Module | None:
    """The block or module whose input is the last activation that needs no gradient; None where there is none."""
    (first, index), *_ = parse_path(frontier)
    if first == "layers" and index is not None:
        return find_blocks(model)[index][1]
    return module_of(model, anatomy, frontier) if first in ("final_norm", "head") else None


def _parts(anatomy: Anatomy, pieces: Sequence[Slice]) -> tuple[str, ...]:
    """Names of the parts that the pieces belong to."""
    wanted: dict[str, list[Slice]] = {}
    for piece in pieces:
        wanted.setdefault(piece.tensor, []).append(piece)

    def holds_one(component: Component) -> bool:
        return any(intersect(s, piece) is not None for s in component.slices for piece in wanted.get(s.tensor, ()))

    return tuple(c.name for c in anatomy.components if wanted and holds_one(c))


@contextmanager
def _masks_as_in_training(shape: StepShape | None = None) -> Iterator[None]:
    """Inside, transformers makes the masks that it makes when it sees values: for rows of one document each none.

    For fake tensors it would build one, copy keys and values for every query head and leave the causal kernel.
    """
    if shape is not None and shape.kept_by is None:  # padded: there is a mask whatever its values
        yield
        return

    def documents_of(positions: torch.Tensor) -> torch.Tensor | None:
        if shape is None or shape.kept_by == "calls":
            return None
        begins = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
        return (begins != 1).cumsum(-1)

    with (
        patch("transformers.masking_utils.is_tracing", lambda *_: False),
        patch("transformers.masking_utils.find_packed_sequence_indices", documents_of),
    ):
        yield


def update(active: Active, *, by_formula: bool = False) -> None:
    """What training does between two backward passes; a foreign library's kernels cannot run without values."""
    active.ownership.clip(active.stage.spec.clip or math.inf)
    active.optimizer.set_rate(1.0)
    if by_formula:
        active.ownership.write_back()
    else:
        active.update()
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
