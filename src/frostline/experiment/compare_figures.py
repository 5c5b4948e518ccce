"""The figures of a comparison, as SVG text: held-out losses over steps and over FLOPs, and differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from frostline.experiment.figures import COLORS, STYLE, WIDTH_IN, to_svg

MARKERS = "osD^vPX"


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The curves of one strategy, over steps or FLOPs."""

    name: str
    mean: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]]
    """x, lowest, highest."""
    seeds: Sequence[Sequence[tuple[float, float]]]
    """Where there is no mean, every run by itself."""


def curves(series: Sequence[Series], *, x_label: str, description: str, unit: str | None = None) -> str:
    """Held-out loss over steps, or over a cost of this unit: mean over seeds, shaded from the lowest to the highest.

    What lies above the losses after the start is cut off.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, s in enumerate(series):
            look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 3.5}
            if s.mean:
                x, low, high = zip(*s.band, strict=True)
                axes.fill_between(x, low, high, color=look["color"], alpha=0.18, lw=0)
                axes.plot(*zip(*s.mean, strict=True), lw=1.5, label=s.name, **look)
            for k, curve in enumerate(() if s.mean else s.seeds):
                axes.plot(*zip(*curve, strict=True), lw=0.9, label=None if k else s.name, **look)
        _cut_off_the_start(axes, series)
        if unit is not None:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(unit=unit))
        axes.set_xlabel(x_label)
        axes.set_ylabel("held-out loss (nats)")
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return to_svg(figure, description)


def _cut_off_the_start(axes: Any, series: Sequence[Series]) -> None:
    later = [y for s in series for curve in ([s.mean] if s.mean else s.seeds) for _, y in curve[1:]]
    if later and min(later) < max(later):
        room = 0.06 * (max(later) - min(later))
        axes.set_ylim(min(later) - room, max(later) + room)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One difference: every seed, the mean, and the interval where there is one."""

    name: str
    by_seed: Sequence[float]
    mean: float
    ends: tuple[float, float] | None


def differences(bars: Sequence[Bar], *, baseline: str, description: str) -> str:
    """Differences to the baseline, a line each; left of zero is better."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 0.36 * len(bars)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#55626f", lw=0.8)
        for y, bar in enumerate(bars):
            if bar.ends is not None:
                axes.plot(bar.ends, (y, y), color="#0b5fa5", lw=2.2, solid_capstyle="butt")
            axes.plot(bar.by_seed, [y] * len(bar.by_seed), "o", ms=3.5, mfc="none", mec="#55626f", mew=0.8)
            axes.plot([bar.mean], [y], "D", ms=5, color="#0b5fa5")
        axes.set_yticks(range(len(bars)), [b.name for b in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlabel(f"held-out loss less that of {baseline} (nats; left is better)")
        axes.tick_params(axis="y", length=0)
        return to_svg(figure, description)
