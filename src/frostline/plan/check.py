"""The plan held against the run: one real step of every stage is metered. Read `StepMeters` first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from frostline.anatomy import named_tensors
from frostline.engine.compiled import Compiled
from frostline.engine.stage_switch import Active
from frostline.errors import PlanError
from frostline.plan.meter import Meter, storage_bytes
from frostline.plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCheck:
    """One stage, planned and measured: its second step, or its only one; uncompiled, as the plan is."""

    stage: str
    planned_flops: int
    measured_flops: int
    planned_peak_bytes: int
    measured_peak_bytes: int | None
    """None where blocks are compiled: they keep other tensors than the plan counts."""

    @property
    def flops_agree(self) -> bool:
        """Whether exactly what was planned was computed."""
        return self.planned_flops == self.measured_flops

    @property
    def peak_ratio(self) -> float | None:
        """Measured over planned."""
        return None if self.measured_peak_bytes is None else self.measured_peak_bytes / self.planned_peak_bytes


class StepMeters:
    """Meters one step of each stage; given to the training loop, which knows no plan."""

    def __init__(
        self,
        model: nn.Module,
        *,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        compiled: Compiled | None = None,
    ) -> None:
        """`around`: what a metered step is computed in, such as a cache that stands aside; `compiled`: the model's
        blocks, metered as they are."""
        self.model, self.around, self.compiled = model, around, compiled
        self.measured: dict[int, tuple[int, int | None]] = {}
        """Stage index → FLOPs and the peak of live tensor bytes."""

    @contextmanager
    def __call__(self, active: Active, step_of_stage: int) -> Iterator[None]:
        """Around one step (0-based in its stage); meters it where it is due."""
        if step_of_stage != min(1, active.stage.n_steps - 1):
            yield
            return
        tensors = named_tensors(self.model)
        on_cuda = any(t.is_cuda for t in tensors.values())
        meter = Meter(tensors, device="cuda" if on_cuda else "cpu")
        meter.adopt(_held(active))
        try:
            with self.compiled.lean() if self.compiled else nullcontext(), self.around(), meter:
                yield
        except PlanError:  # an operation without a formula: the plan has failed on it already, the run need not
            return
        if self.compiled and self.compiled.is_lean:
            again = sum(n for (_, kind), n in meter.flops.items() if kind == "recomputed")
            self.measured[active.stage.index] = (meter.total_flops - again, None)
            return
        weights = storage_bytes(tensors.values())
        self.measured[active.stage.index] = (meter.total_flops, weights + meter.peak_bytes)


def _held(active: Active) -> Iterator[torch.Tensor]:
    """What a stage holds beside the model, on its device, when a step begins: copies of slices and optimizer state."""
    for o in active.ownership.owned:
        if o.is_offloaded:  # in the host's memory
            continue
        if o.is_copy:
            yield o.value
        yield from (v for v in active.optimizer.state_of(o.value).values() if isinstance(v, torch.Tensor))


def check_plan(plan: Plan, meters: StepMeters) -> tuple[StageCheck, ...]:
    """Every stage of which a step was metered."""
    return tuple(
        StageCheck(
            stage=plan.stages[i].name,
            planned_flops=plan.stages[i].cost.total_flops,
            measured_flops=flops,
            planned_peak_bytes=plan.stages[i].cost.peak_bytes,
            measured_peak_bytes=peak,
        )
        for i, (flops, peak) in sorted(meters.measured.items())
    )


def checks_to_json(checks: tuple[StageCheck, ...]) -> list[dict[str, Any]]:
    """The checks as plain data."""
    return [{**asdict(c), "flops_agree": c.flops_agree, "peak_ratio": c.peak_ratio} for c in checks]
