"""What a person sees of plans in the terminal. Renders; never computes. Read `print_plan` first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from frostline.plan import StageCheck, StageCost
from frostline.planning import Alternative, Fit, Planned, Why
from frostline.units import format_bytes, format_count, format_flops


def print_plan(console: Console, planned: Planned) -> None:
    """A plan and its answers."""
    plan, batching = planned.plan, planned.plan.batching
    console.print(
        f"{plan.model_type}, {format_count(plan.n_parameters)} parameters; steps of {batching.rows} × "
        f"{batching.length} tokens; nothing was loaded or trained",
        highlight=False,
    )
    table = Table()
    for column in ("stage", "learns", "steps", "backward stops at"):
        table.add_column(column, overflow="fold")
    for column in ("FLOPs per step", "× forward", "weights", "gradients", "state", "activations", "peak"):
        table.add_column(column, justify="right")
    for s in plan.stages:
        table.add_row(
            s.name, f"{s.learn} ({format_count(s.n_learning)})", str(s.n_steps), s.cost.frontier, *_cost_cells(s.cost)
        )
    console.print(table)
    console.print(
        f"the whole run: {format_flops(plan.total_flops)}, at most {format_bytes(plan.peak_bytes)} of tensors, "
        f"{format_bytes(sum(s.evidence_bytes for s in plan.stages))} of evidence",
        highlight=False,
    )
    if planned.fit:
        console.print(_fit_line(planned.fit, batching.length), highlight=False)
    if planned.alternatives:
        console.print(_alternatives_table(planned.alternatives))


def _cost_cells(cost: StageCost) -> Iterator[str]:
    yield format_flops(cost.total_flops)
    yield f"{cost.total_flops / max(cost.of_kind('forward'), 1):.2f}"
    held = (cost.weight_bytes, cost.gradient_bytes, cost.state_bytes + cost.copy_bytes, cost.activation_bytes)
    yield from map(format_bytes, (*held, cost.peak_bytes))


def _fit_line(fit: Fit, length: int) -> str:
    says = "fits" if fit.fits else "DOES NOT FIT"
    most = (
        f"at most {fit.largest_rows} rows of {length} per micro-batch" if fit.largest_rows else "not even one row fits"
    )
    longest = f"one row of at most {fit.longest} tokens" if fit.longest else "no row at all"
    return f"{says} in {format_bytes(fit.memory_bytes)} (stage {fit.stage}, tensors only): {most}; {longest}"


def _alternatives_table(alternatives: Sequence[Alternative]) -> Table:
    """Selections side by side, against the first."""
    table = Table(title="what else could learn, one step each", title_justify="left", title_style="")
    for column in ("learns", "backward stops at"):
        table.add_column(column, overflow="fold")
    for column in (
        "FLOPs per step",
        "× forward",
        "weights",
        "gradients",
        "state",
        "activations",
        "peak",
        "against first",
    ):
        table.add_column(column, justify="right")
    first = alternatives[0].cost
    for a in alternatives:
        against = (
            f"{a.cost.total_flops / first.total_flops:.2f} × FLOPs, {a.cost.peak_bytes / first.peak_bytes:.2f} × peak"
        )
        table.add_row(a.learn, a.cost.frontier, *_cost_cells(a.cost), against)
    return table


def print_checks(console: Console, checks: Sequence[StageCheck]) -> None:
    """The plan against a metered step of every stage, in one line, and one more for each that differs."""
    if not checks:
        return
    low, high = (f(c.peak_ratio for c in checks) for f in (min, max))
    peak = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} – {high:.2f}"
    n = sum(c.flops_agree for c in checks)
    console.print(
        f"plan against one metered step per stage: FLOPs equal in {n} of {len(checks)} stages, peak of tensor bytes "
        f"{peak} × planned",
        highlight=False,
    )
    for c in checks:
        if not c.flops_agree:
            planned, real = format_flops(c.planned_flops), format_flops(c.measured_flops)
            console.print(f"  stage {c.stage}: planned {planned}, computed {real}", highlight=False)


def print_why(console: Console, found: Sequence[Why]) -> None:
    """What makes each stage cost what it costs, and what leaving a part out would save."""
    for w in found:
        console.print(
            f"stage {w.stage}: {w.learn}: backward stops at {w.cost.frontier}; "
            f"{format_flops(w.cost.total_flops)} and {format_bytes(w.cost.peak_bytes)} a step",
            highlight=False,
        )
        table = Table()
        for column in ("without", "backward stops at"):
            table.add_column(column)
        table.add_column("FLOPs saved", justify="right")
        table.add_column("peak saved", justify="right")
        for r in w.reasons:
            table.add_row(r.part, r.frontier, f"{100 * r.flops_saved:.1f} %", format_bytes(r.bytes_saved))
        console.print(table)
