"""What a person sees of schedules in the terminal. Renders; never computes. Read `print_schedule` first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frostline.expansion import AlwaysOn, always_on
from frostline.lr_range import HOW, RangeTest
from frostline.prepared import Prepared, unresolved
from frostline.recipe.shipped import summary
from frostline.schedule.spectrum import Ranked
from frostline.units import format_bytes, format_count, format_share


def print_schedule(console: Console, prepared: Prepared) -> None:
    """The stages of a recipe, and where they come from."""
    expansion, schedule, anatomy = prepared.expansion, prepared.schedule, prepared.anatomy
    n = len(schedule.stages)
    origin = f"schedule {expansion.name}: {n} stage{'s' * (n != 1)}" if expansion else f"{n} stage{'s' * (n != 1)}"
    console.print(
        f"{origin}, {schedule.n_steps} steps; {anatomy.model_type}, {anatomy.n_layers} layers", highlight=False
    )
    if expansion and expansion.ranking:
        console.print(ranking_table(expansion.ranking))
    table = Table()
    for column in ("stage", "learns"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "steps", "from step", "lr"):
        table.add_column(column, justify="right")
    still_open = unresolved(prepared)
    for s in schedule.stages:
        rates = dict.fromkeys(f"{g.lr:.3g}" for g in s.groups)
        count = f"{format_count(s.selection.n_elements)} ({format_share(s.selection.n_elements, anatomy.n_parameters)})"
        shown = (
            [*rates] if len(rates) < 3 else [f"{min(g.lr for g in s.groups):.3g} … {max(g.lr for g in s.groups):.3g}"]
        )
        learns = still_open[s.index].learn if s.index in still_open else s.selection.expression
        table.add_row(s.name, escape(learns), count, str(s.n_steps), str(s.start), ", ".join(shown))
    console.print(table)
    for index, waiting in still_open.items():
        line = f"stage {schedule.stages[index].name}: {waiting.waits_for}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print_always_on(console, always_on(expansion, schedule))


def print_always_on(console: Console, found: AlwaysOn | None) -> None:
    """What is always on and what it costs, if anything is."""
    if found is not None:
        console.print(
            f"always on: {found.expression}, {format_count(found.n_elements)} of the "
            f"{format_count(found.stage_elements)} parameters that learn at a time; "
            f"{format_bytes(found.n_bytes)} of {format_bytes(found.stage_bytes)} of gradients and optimizer state "
            f"({100 * found.share:.0f} %)",
            highlight=False,
        )


def ranking_table(ranking: Sequence[Ranked]) -> Table:
    """Spectrum's ranking: per kind, what was chosen and the best of what was not."""
    table = Table(title="signal to noise, by kind of matrix", title_justify="left", title_style="")
    table.add_column("kind")
    for column in ("chosen", "not chosen"):
        table.add_column(column, overflow="fold")
    for kind in dict.fromkeys(r.kind for r in ranking):
        of_kind = [r for r in ranking if r.kind == kind]
        cells = []
        for chosen in (True, False):
            names = [f"{r.component.partition('.')[0]} {r.snr:.4g}" for r in of_kind if r.chosen == chosen]
            cells.append(", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else ""))
        table.add_row(kind, *cells)
    return table


def print_range_test(console: Console, test: RangeTest) -> None:
    """What rates each part tolerates."""
    console.print(
        f"stage {test.stage}: {test.learn}; {test.optimizer}, {test.n_steps} rising rates; the recipe has "
        f"{test.stage_lr:.3g}",
        highlight=False,
    )
    table = Table()
    for column in (
        "part",
        "parameters",
        "loss at the start",
        "lowest",
        "at rate",
        "steepest at",
        "above the start from",
    ):
        table.add_column(column, justify="left" if column == "part" else "right", overflow="fold")
    table.add_column("suggested", justify="right", style="bold")
    for p in test.parts:
        lowest = min((x for x in p.losses if math.isfinite(x)), default=math.nan)
        shown = [f"{r:.1e}" if r is not None else "–" for r in (p.lowest_rate, p.steepest_rate, p.diverges_at)]
        suggestion = f"{p.suggestion:.1e}" if p.suggestion is not None else "–"
        table.add_row(p.part, format_count(p.n_elements), f"{p.start_loss:.4f}", f"{lowest:.4f}", *shown, suggestion)
    console.print(table)
    for p in test.parts:
        if p.note:
            console.print(f"{p.part}: {p.note}", highlight=False)
    for line in (*test.notes, HOW):
        console.print(line, highlight=False)


def print_recipes(console: Console, recipes: dict[str, str]) -> None:
    """The recipes of the package."""
    table = Table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("does", overflow="fold")
    for name, text in recipes.items():
        table.add_row(name, summary(text))
    console.print(table)
    console.print(
        "read one: frostline recipes NAME; run one: frostline train NAME --set model=… --set data.train=… --out RUN",
        highlight=False,
    )
