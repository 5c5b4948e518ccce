"""The report's figures, as SVG text: heat maps over layers and parts, loss curves with stage bands.

matplotlib draws them; text stays text, so that a page can be searched and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's style sheet puts its own font in
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
}
WIDTH_IN = 7.2
BANDS = ("#eef3f8", "#fbf3e6")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One part of one layer: a number, or frozen."""

    value: float | None
    """None: nothing to show."""
    frozen: bool


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Cell],
    *,
    label: str,
    description: str,
    limits: tuple[float, float],
    logarithmic: bool = False,
) -> str:
    """A heat map, frozen cells hatched, every number written into its cell; (row, column) pairs may be missing."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        height = 1.1 + 0.26 * len(rows)
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        axes = figure.subplots()
        norm: Normalize = LogNorm(*limits) if logarithmic else Normalize(0, limits[1])
        colors = mpl.colormaps["cividis"]
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                cell = cells.get((row, column))
                if cell is not None:
                    _draw_cell(axes, x, y, cell, norm, colors)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colors), ax=axes, shrink=0.9, aspect=14, pad=0.01)
        bar.set_label(label)
        bar.outline.set_visible(False)
        return to_svg(figure, description)


def _draw_cell(axes: Any, x: int, y: int, cell: Cell, norm: Normalize, colors: Any) -> None:
    if cell.frozen:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc="#ffffff", ec="#b9c2cc", lw=0.6, hatch="////"))
        return
    if cell.value is None or not math.isfinite(cell.value):
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc="#ffffff", ec="#b9c2cc", lw=0.6))
        axes.text(x, y, "–", ha="center", va="center", color="#555555", fontsize=8)
        return
    shade = float(norm(cell.value)) if cell.value > 0 else 0.0
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=colors(shade), ec="#ffffff", lw=0.8))
    color = "#ffffff" if shade < 0.55 else "#111111"
    axes.text(x, y, short(cell.value), ha="center", va="center", color=color, fontsize=8)


def short(value: float) -> str:
    """A number in at most five characters or so."""
    if value == 0:
        return "0"
    return f"{value:.2g}" if 1e-2 <= abs(value) < 1000 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def loss_curves(
    stages: Sequence[tuple[str, int, int]],
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    *,
    description: str,
) -> str:
    """Training loss and held-out loss over steps, a band per stage (name, first step, end)."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 3.1), layout="constrained")
        axes = figure.subplots()
        for i, (name, start, end) in enumerate(stages):
            axes.axvspan(start, end, color=BANDS[i % 2], lw=0)
            axes.text((start + end) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        if train:
            axes.plot(*zip(*train, strict=True), color="#9aa7b4", lw=0.9, label="training batch")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color="#0b5fa5", lw=1.6, marker="o", ms=3.5, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token (nats)")
        axes.margins(x=0)
        axes.legend(frameon=False)
        return to_svg(figure, description)


COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by everyone (Okabe and Ito)."""


def change_curves(
    stages: Sequence[tuple[str, int, int]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    description: str,
) -> str:
    """Change of a loss since the start, a line per set and a band per stage; below zero is learning."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 3.1), layout="constrained")
        axes = figure.subplots()
        for i, (_, start, end) in enumerate(stages):
            axes.axvspan(start, end, color=BANDS[i % 2], lw=0)
        axes.axhline(0, color="#55626f", lw=0.8)
        for i, (name, curve) in enumerate(curves.items()):
            style = "-" if i < len(COLORS) else "--"
            color = COLORS[(i + 1) % len(COLORS)]
            axes.plot(*zip(*curve, strict=True), color=color, ls=style, lw=1.6, marker="o", ms=3.5, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("change of loss (nats)")
        axes.margins(x=0)
        axes.legend(frameon=False)
        return to_svg(figure, description)


def rate_curves(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float], float | None]], start: float, *, title: str
) -> Figure:
    """Held-out loss over the learning rate, a line per part (name, rates, losses, suggestion); suggestions marked."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(start, color="#9aa7b4", lw=0.8, ls="--")
        low = min((x for _, _, losses, _ in curves for x in losses if math.isfinite(x)), default=start)
        room = max(start - low, 0.02 * start)
        for i, (name, rates, losses, suggestion) in enumerate(curves):
            color, shown = COLORS[i % len(COLORS)], [min(x, start + 3 * room) for x in losses]
            label = f"{name}: {short(suggestion)}" if suggestion else f"{name}: none"
            axes.plot(rates, shown, color=color, lw=1.4, label=label, ls="-" if i < len(COLORS) else ":")
            if suggestion:
                at = min(range(len(rates)), key=lambda k: abs(math.log(rates[k] / suggestion)))
                axes.plot([rates[at]], [shown[at]], marker="o", ms=5, color=color)
        axes.set_xscale("log")
        axes.set_ylim(low - 0.1 * room, start + room)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("held-out loss (nats)")
        axes.set_title(title, loc="left", fontsize=10)
        axes.text(0.0, start, " at the start", color="#5c6a77", va="bottom", transform=axes.get_yaxis_transform())
        axes.legend(frameon=False, title="suggested", alignment="left", fontsize=8.5)
        return figure


def to_svg(figure: Figure, description: str) -> str:
    """A figure as an `<svg>` element that names itself to screen readers and scales with its box."""
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    escaped = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
