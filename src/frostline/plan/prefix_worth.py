"""Whether keeping what the frozen prefix gives pays, by the plan. Read `why_not_worth`."""

from __future__ import annotations

from frostline.plan.plan import Plan
from frostline.schedule import Schedule, Stage

RATES = {"cpu": (1.5e11, 1.5e9, 1.5e9), "cuda": (2e14, 4e9, 7e8)}
"""Device → FLOPs per second of products, and bytes per second that rows are read and written at, checked and put on
disk; rough (CUDA's are of one H200, `docs/performance.md`), and enough to tell blocks of a small model, which are
computed as fast as they are read, from the rest."""
STEP_SECONDS = 1e-3
"""What looking up the rows of a step takes, whatever their size."""
LEAST = 0.05
"""The share of a stage's time that has to be saved."""


def why_not_worth(plan: Plan | None, schedule: Schedule, stage: Stage) -> str | None:
    """Why a stage's frozen prefix is not kept; None where that pays."""
    if plan is None or schedule.step_size is None:
        return "this model cannot be planned, so what it would save is not known (`cache: {prefix: on}` keeps it)"
    cost = plan.stages[stage.index].cost
    if not cost.prefix_flops:
        return "nothing is computed below what learns"
    size = schedule.step_size
    n_steps = _steps_alike(plan, schedule, stage)
    once = -(-size.n_rows // size.rows)
    again = n_steps - once
    if again <= 0:
        return f"no row comes again ({n_steps} steps, an epoch has {once})"
    flops_per_s, read_per_s, written_per_s = RATES[plan.batching.device]
    step = cost.total_flops / flops_per_s
    n_bytes = cost.prefix_bytes_per_token * plan.batching.tokens
    saved = again * (cost.prefix_flops / flops_per_s - n_bytes / read_per_s - STEP_SECONDS)
    saved -= once * n_bytes / written_per_s
    if saved < LEAST * n_steps * step:
        return f"it would save about {max(saved / (n_steps * step), 0):.0%} of the stage"
    return None


def _steps_alike(plan: Plan, schedule: Schedule, stage: Stage) -> int:
    """Steps of the stage and of those right after it that have the same prefix."""
    n = 0
    for later in schedule.stages[stage.index :]:
        same = plan.stages[later.index].cost.prefix_flops == plan.stages[stage.index].cost.prefix_flops
        if not same or later.spec.accumulate != stage.spec.accumulate:
            break
        n += later.n_steps
    return n
