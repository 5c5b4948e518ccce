"""One stage executed abstractly: two optimizer steps of the engine itself, on tensors that have shapes and no values.

There is no second description of a step: `trace_stage` calls `engine.step`, the stage switch and the optimizer as
training does. On real tensors the same function measures what the plan predicts. Read `trace_stage` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from frostline.anatomy import Anatomy, Slice, find_blocks, module_of, named_tensors, parse_path
from frostline.engine import Points, loss_of, next_token_loss, set_routes, step
from frostline.engine.optimizers import FOREIGN
from frostline.engine.owned import model_elsewhere
from frostline.engine.recompute import recomputing
from frostline.engine.rounding import Rounding, stepped_bytes
from frostline.engine.routes import enter_routes
from frostline.engine.stage_bytes import state_bytes
from frostline.engine.stage_switch import Active, set_modes, switch
from frostline.engine.step import LossFunction, StepLoss
from frostline.plan.cost import StageCost, by_part, parts_of
from frostline.plan.cuda import cuda_kernels
from frostline.plan.meter import Device, Meter, storage_bytes
from frostline.plan.shapes import StepShape, micro_batches
from frostline.schedule import Stage

CPU = torch.device("cpu")


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
    tensors = named_tensors(model)
    meter = Meter(tensors, device=device)
    by_formula = mode is not None and stage.spec.optimizer.name in FOREIGN
    frontier = next(c.name for c, _ in stage.selection.by_component())
    watch = _Watch(meter, n_vocabulary, loss_of(stage, points, language))
    with _as_planned(mode, shape, device), watch.entry(_at_frontier(model, anatomy, frontier)), meter:
        with meter.numbers_that_scale(), model_elsewhere() if device == "cuda" else nullcontext():
            active = entered(model, anatomy, stage, rounding, points)
        batches = micro_batches(rows, length, stage.spec.accumulate, shape=shape)
        gradients = _two_steps(model, active, batches, watch, by_formula=by_formula, bf16=bf16)
        state = _state_by_formula(anatomy, stage, rounding) if by_formula else _state_bytes(active)
        offloaded = active.ownership.is_offloaded
        copies = sum(o.value.nbytes for o in active.ownership.owned if o.is_copy)
        active.ownership.release()
        if points is not None:
            set_routes(points, ())
    n_tokens = shape.computed if shape else rows * length
    unreached = parts_of(anatomy, gradients.missing)
    weights = storage_bytes(tensors.values())
    return StageCost(
        flops=by_part(meter.flops, anatomy),
        frontier=next((c.name for c, _ in stage.selection.by_component() if c.name not in unreached), frontier),
        weight_bytes=weights,
        gradient_bytes=gradients.n_bytes,
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


@contextmanager
def _as_planned(mode: AbstractContextManager[Any] | None, shape: StepShape | None, device: Device) -> Iterator[None]:
    """Inside, tensors have values or not, as `mode` says; kernels and masks are those of the training on `device`."""
    masks = _masks_as_in_training(shape) if mode else nullcontext()
    with mode or nullcontext(), masks, cuda_kernels() if device == "cuda" else nullcontext():
        yield


def entered(model: nn.Module, anatomy: Anatomy, stage: Stage, rounding: Rounding, points: Points | None) -> Active:
    """The model switched into a stage, as training does it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, anatomy, stage, memory={}, leaving=None, rounding=rounding)
    enter_routes(points, stage)
    set_modes(model, stage)
    return active


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What a backward pass left to the leaves."""

    n_bytes: int
    missing: tuple[Slice, ...]
    """Pieces that no gradient reached."""


def _two_steps(
    model: nn.Module, active: Active, batches: Sequence[Any], watch: _Watch, *, by_formula: bool, bf16: bool
) -> _Gradients:
    """Two optimizer steps, of which the second is metered; its gradients, before the update."""
    meter, owned = watch.meter, active.ownership.owned
    for _ in range(2):  # the optimizer makes its state in the first
        meter.restart()
        step(model, batches, watch, seed=0, device=CPU, bf16=bf16)
        gradients = _Gradients(
            sum(o.value.grad.nbytes for o in owned if o.value.grad is not None),
            tuple(o.piece for o in owned if o.value.grad is None),
        )
        with meter.numbers_that_scale():
            update(active, by_formula=by_formula)
    return gradients


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


def _state_by_formula(anatomy: Anatomy, stage: Stage, rounding: Rounding) -> int:
    return state_bytes(stage, lambda tensor: stepped_bytes(anatomy.tensor[tensor].element_bytes, rounding))
