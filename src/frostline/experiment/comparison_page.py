"""One self-contained page about a comparison. Renders what `compare` found; computes nothing of its own.

No network, no scripts; everything that comes from data is escaped by the template. Read `write_comparison` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from frostline.experiment.compare_folder import ComparisonFolder
from frostline.experiment.compare_measures import Point
from frostline.experiment.compare_results import Compared, EqualCost, MeanPoint, StrategyResult, troubled
from frostline.experiment.compare_words import agreed, cost, interval, learning, mean_sd, run_line, verdict
from frostline.storage import write_text
from frostline.units import format_bytes, format_count, format_duration, format_flops

Page = dict[str, Any]


def write_comparison(compared: Compared, out: str | Path) -> Path | None:
    """Write `comparison.html` into the comparison's folder; None where the report extra is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from frostline.experiment import compare_figures

    folder = ComparisonFolder(out)
    environment = Environment(
        loader=PackageLoader("frostline.experiment"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    source = folder.source.read_text(encoding="utf-8")
    page = {**_page(compared), **_figures(compared, compare_figures), "source": source}
    write_text(folder.page, environment.get_template("comparison.html.j2").render(page))
    return folder.page


def _page(compared: Compared) -> Page:
    """Everything the template shows, figures apart."""
    return {
        "name": compared.name,
        "budget": compared.budget,
        "baseline": compared.baseline,
        "seeds": compared.seeds,
        "sound": compared.sound,
        "finished": compared.finished,
        "notes": compared.notes,
        "rows": [_row(s, compared) for s in compared.strategies],
        "equal": [_equal(s, e) for s in compared.strategies for e in (s.equal_steps, s.equal_flops) if e is not None],
        "runs": [
            {"strategy": o.strategy, "seed": o.seed, "line": run_line(o), "bad": troubled(o)}
            for s in compared.strategies
            for o in s.outcomes
        ],
    }


def _row(s: StrategyResult, compared: Compared) -> Page:
    return {
        "name": s.outlook.name,
        "changes": s.outlook.changes,
        "learns": [f"{learn} ({n_steps:,} steps)" for _, learn, n_steps, _ in s.outlook.stages[:6]],
        "more": max(0, len(s.outlook.stages) - 6),
        "n": f"{s.loss.n} of {len(s.outcomes)}",
        "loss": mean_sd(s.loss),
        "by_seed": [f"{s.losses[seed]:.4f}" if seed in s.losses else "–" for seed in compared.seeds],
        "best": mean_sd(s.best),
        "difference": interval(s.difference),
        "verdict": verdict(s, compared),
        "learning": learning(s.outlook),
        "tokens": format_count(round(s.tokens)) if s.tokens else "–",
        "planned": format_flops(s.outlook.planned_flops) if s.outlook.planned_flops else "–",
        "flops": format_flops(s.flops) if s.flops else "–",
        "agreed": agreed(s),
        "peak": format_bytes(s.peak_bytes) if s.peak_bytes else "–",
        "peak_ratio": f"{s.peak_ratio:.3f}" if s.peak_ratio else "–",
        "seconds": format_duration(s.seconds.mean) if s.seconds.mean is not None else "–",
        "speed": f"{s.tokens_per_s.mean:,.0f}" if s.tokens_per_s.mean is not None else "–",
    }


def _equal(s: StrategyResult, e: EqualCost) -> Page:
    return {
        "name": s.outlook.name,
        "at": cost(e),
        "own": mean_sd(e.own),
        "baseline": mean_sd(e.baseline),
        "difference": interval(e.difference),
        "verdict": e.difference.verdict,
        "why": e.difference.why,
    }


def _figures(compared: Compared, figures: Any) -> Page:
    bars = [
        figures.Bar(
            name=s.outlook.name,
            by_seed=list(d.by_seed.values()),
            mean=d.mean,
            ends=None if d.low is None else (d.low, d.high),
        )
        for s in compared.strategies
        if (d := s.difference) is not None and d.mean is not None
    ]
    over_flops = _series(compared.strategies, figures, lambda p: p.flops)
    return {
        "over_steps": _curves(figures, _series(compared.strategies, figures, lambda p: p.step), "step"),
        "over_flops": _curves(figures, over_flops, "spent in training", unit="FLOP"),
        "differences": figures.differences(
            bars, baseline=compared.baseline, description=f"Difference of the held-out loss to {compared.baseline}"
        )
        if bars
        else None,
    }


def _curves(figures: Any, series: Sequence[Any], x_label: str, *, unit: str | None = None) -> str | None:
    if not series:
        return None
    description = f"Held-out loss by {unit or x_label}, a line per strategy"
    drawn: str = figures.curves(series, x_label=x_label, description=description, unit=unit)
    return drawn


def _series(
    strategies: Sequence[StrategyResult], figures: Any, x_of: Callable[[Point | MeanPoint], int | None]
) -> list[Any]:
    """The curves of every strategy that has some, over what `x_of` says."""
    out = []
    for s in strategies:
        runs = [o.measures.curve for o in s.outcomes if o.counts and o.measures is not None]
        seeds = [[(x, p.loss) for p in curve if (x := x_of(p)) is not None] for curve in runs]
        shown = [(x, p) for p in s.curve if (x := x_of(p)) is not None]
        whole = len(shown) == len(s.curve) and len(s.curve) == max(map(len, runs), default=0)
        if any(seeds):
            out.append(
                figures.Series(
                    name=s.outlook.name,
                    mean=[(x, p.mean) for x, p in shown] if whole else [],
                    band=[(x, p.low, p.high) for x, p in shown] if whole else [],
                    seeds=[c for c in seeds if c],
                )
            )
    return out
