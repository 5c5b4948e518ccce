"""What a person sees of plans in the terminal. Renders; never computes. Read `print_plan` first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from frostline.folding import folded
from frostline.levers import Outlook
from frostline.plan import Plan, StageCheck, StageCost, StagePlan
from frostline.planning import Alternative, Duration, Fit, Planned, Setting
from frostline.units import format_bytes, format_count, format_duration, format_flops
from frostline.why import Why

FEW = 8
"""So many stages are shown one by one; of more, those that cost the same are one row."""
COST_COLUMNS = ("FLOPs per step", "× forward", "weights", "gradients", "state", "activations", "peak")


def print_plan(console: Console, planned: Planned) -> None:
    """A plan and its answers."""
    plan, batching = planned.plan, planned.plan.batching
    console.print(
        f"{plan.model_type}, {format_count(plan.n_parameters)} parameters; steps of {batching.rows} × "
        f"{batching.length} tokens{'' if planned.duration else '; nothing was loaded or trained'}",
        highlight=False,
    )
    table = Table()
    for column in ("stage", "learns", "steps", "backward stops at"):
        table.add_column(column, overflow="fold")
    for column in COST_COLUMNS:
        table.add_column(column, justify="right")
    for row in _stage_rows(plan.stages):
        table.add_row(*row)
    console.print(table)
    grown = max(s.cost.resident_bytes for s in plan.stages)
    resident = f" (a process grows by about {format_bytes(grown)})" if batching.device == "cpu" else ""
    console.print(
        f"the whole run: {format_flops(plan.total_flops)}, at most {format_bytes(plan.peak_bytes)} of tensors"
        f"{resident}; "
        f"{format_bytes(sum(s.evidence_bytes for s in plan.stages))} of evidence on disk and "
        f"{format_bytes(plan.hashed_bytes)} to hash",
        highlight=False,
    )
    if len(plan.stages) > 1:
        console.print(_switch_line(plan), highlight=False)
    outlooks: dict[str, Outlook] = {o.stage: o for o in planned.prefixes}
    for s in plan.stages if len(plan.stages) <= FEW else ():
        if s.cost.prefix_flops:
            console.print(_prefix_line(s, outlooks.get(s.name)), highlight=False)
    for s in plan.stages if len(plan.stages) <= FEW else ():
        if s.cost.host_bytes:
            console.print(_host_line(s), highlight=False)
    for s in plan.stages:
        for part in folded(s.cost.unreached):
            console.print(f"stage {s.name}: {part} is to learn, and no gradient reaches it", highlight=False)
    if planned.duration:
        console.print(_duration_line(planned.duration), highlight=False)
    if planned.fit:
        console.print(_fit_line(planned.fit, batching.length), highlight=False)
    if planned.alternatives:
        console.print(_alternatives_table(planned.alternatives))
    if planned.settings:
        console.print(_settings_table(planned.settings))
    if batching.device == "cuda":
        console.print("bytes for CUDA are by a table of its kernels; context and workspaces come on top", style="dim")


def _stage_rows(stages: Sequence[StagePlan]) -> Iterator[tuple[str, ...]]:
    """A row per stage; where there are many, one for all that cost the same."""
    alike: dict[tuple[str, ...], list[StagePlan]] = {}
    for s in stages:
        cells = (str(s.n_steps), s.cost.frontier, *_cost_cells(s.cost))
        alike.setdefault(cells if len(stages) > FEW else (s.name, *cells), []).append(s)
    for cells, found in alike.items():
        first, more = found[0], len(found) - 1
        learns = f"{first.learn} ({format_count(first.n_learning)})"
        selections = len({s.learn for s in found}) - 1
        yield (
            first.name + (f" and {more} more" if more else ""),
            learns + (f"; {selections} other selection{'s' * (selections > 1)} alike" if selections else ""),
            *cells[-2 - len(COST_COLUMNS) :],
        )


def _switch_line(plan: Plan) -> str:
    """What it costs to go from one stage to the next, beside the optimizer that is made anew."""

    def spread(values: list[int]) -> str:
        low, high = format_bytes(min(values)), format_bytes(max(values))
        return low if low == high else f"{low} to {high}"

    hashed, written = [s.hashed_bytes for s in plan.stages[:-1]], [s.evidence_bytes for s in plan.stages[1:]]
    return (
        f"each of {len(hashed)} switches hashes {spread(hashed)} and writes {spread(written)} of entry values, and a "
        "checkpoint of what has learned with its optimizer state"
    )


def _prefix_line(stage: StagePlan, outlook: Outlook | None) -> str:
    share = stage.cost.prefix_flops / stage.cost.total_flops
    held = f"for all rows {format_bytes(stage.prefix_bytes)}" if stage.prefix_bytes else "the data is not known"
    return (
        f"stage {stage.name}: {100 * share:.0f} % of a step lies below {stage.cost.frontier} and repeats every epoch; "
        f"to keep its result takes {format_bytes(stage.cost.prefix_bytes_per_token)} per token, {held}"
        + (f"; {says_outlook(outlook)}" if outlook else "")
    )


def _host_line(stage: StagePlan) -> str:
    return (
        f"stage {stage.name}: gradients, copies and optimizer state are in the host's memory, at most "
        f"{format_bytes(stage.cost.host_bytes)}; the peak is the device's alone"
    )


def says_outlook(outlook: Outlook) -> str:
    """Whether a prefix will be kept."""
    if not outlook.kept:
        return f"it will not be kept: {outlook.why}"
    return f"it will be kept ({outlook.why}), if the trial at the stage's start finds it exact"


def _duration_line(duration: Duration) -> str:
    steps = ", ".join(f"{s:.3g} s" for s in dict.fromkeys(duration.stage_seconds))
    return (
        f"about {format_duration(duration.seconds)} at {format_flops(duration.flops_per_s)}/s ({duration.basis}): "
        f"{steps} a step; evaluation and evidence come on top"
    )


def _settings_table(settings: Sequence[Setting]) -> Table:
    """The heaviest stage under other settings."""
    table = Table(title="the heaviest stage under other settings, one step each", title_justify="left", title_style="")
    for column in ("precision", "recompute"):
        table.add_column(column)
    for column in COST_COLUMNS:
        table.add_column(column, justify="right")
    for s in settings:
        table.add_row(s.precision, "blocks" if s.recompute else "off", *_cost_cells(s.cost))
    return table


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
    for column in (*COST_COLUMNS, "against first"):
        table.add_column(column, justify="right")
    first = alternatives[0].cost
    for a in alternatives:
        against = (
            f"{a.cost.total_flops / first.total_flops:.2f} × FLOPs, {a.cost.peak_bytes / first.peak_bytes:.2f} × peak"
        )
        table.add_row(a.learn, a.cost.frontier, *_cost_cells(a.cost), against)
    return table


def print_checks(console: Console, checks: Sequence[StageCheck], *, has_experts: bool = False) -> None:
    """The plan against a metered step of every stage, in one line, and one more for each that differs."""
    if not checks:
        return
    n = sum(c.flops_agree for c in checks)
    said = f"plan against one metered step per stage: FLOPs equal in {n} of {len(checks)} stages"
    if peaks := [f"{c.peak_ratio:.2f}" for c in checks if c.peak_ratio is not None]:
        low, high = min(peaks), max(peaks)
        said += f", peak of tensor bytes {low if low == high else f'{low} – {high}'} × planned"
    console.print(said, highlight=False)
    for c in checks:
        if not c.flops_agree:
            planned, real = format_flops(c.planned_flops), format_flops(c.measured_flops)
            console.print(f"  stage {c.stage}: planned {planned}, computed {real}", highlight=False)
    if has_experts and n < len(checks):
        console.print(
            "  where only some experts learn, a plan takes their share of the tokens for equal", highlight=False
        )


def print_why(console: Console, found: Sequence[Why]) -> None:
    """What makes each stage cost what it costs, and what leaving a part out would save."""
    for w in found:
        console.print(
            f"stage {w.stage}: {w.learn}: backward stops at {w.cost.frontier}; "
            f"{format_flops(w.cost.total_flops)} and {format_bytes(w.cost.peak_bytes)} a step",
            highlight=False,
            markup=False,
        )
        if w.unresolved:
            console.print(f"  {w.unresolved}", highlight=False, markup=False, soft_wrap=True)
        if w.against_all:
            saved = w.against_all
            console.print(
                f"  against `all`: {100 * saved.flops:.1f} % of the arithmetic saved, {format_bytes(saved.peak_bytes)} "
                f"of the peak; {saved.bytes_per_frozen_parameter:.1f} bytes of gradient and optimizer state per frozen "
                "parameter",
                highlight=False,
            )
        if w.cost.prefix_flops and w.prefix:
            held = f", which takes {format_bytes(w.prefix.n_bytes)}" if w.prefix.n_bytes else ""
            share = w.cost.prefix_flops / w.cost.total_flops
            console.print(
                f"  what lies below {w.cost.frontier} ({100 * share:.0f} % of a step{held}): {says_outlook(w.prefix)}",
                highlight=False,
            )
        for no_op in w.no_ops:
            console.print(f"  cannot learn: {no_op}", highlight=False, style="yellow")
        if not w.reasons:
            continue
        table = Table()
        for column in ("without", "backward stops at"):
            table.add_column(column)
        table.add_column("FLOPs saved", justify="right")
        table.add_column("peak saved", justify="right")
        for r in w.reasons:
            table.add_row(r.part, r.frontier, f"{100 * r.flops_saved:.1f} %", format_bytes(r.bytes_saved))
        console.print(table)
