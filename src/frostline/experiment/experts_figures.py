"""Figures of how tokens were spread over experts: load over time, a strip per layer, and its entropy."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from frostline.experiment.figures import STYLE, WIDTH_IN, to_svg


def load_over_time(sites: Sequence[tuple[str, tuple[int, int], Sequence[Sequence[float]]]], *, description: str) -> str:
    """A strip per layer: (name, first and last step, per column every expert's load in equal shares)."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        n = len(sites)
        columns = 1 if n == 1 else 2 if n <= 4 else 3
        lines = -(-n // columns)
        figure = Figure(figsize=(WIDTH_IN, 0.75 + 1.15 * lines), layout="constrained")
        norm, colors = Normalize(0, 2), mpl.colormaps["cividis"]
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[n:]:
            axes.axis("off")
        for axes, (name, (first, last), loads) in zip(grid.flat, sites, strict=False):
            by_expert = list(zip(*loads, strict=True))
            extent = (first - 0.5, last + 0.5, len(by_expert) - 0.5, -0.5)
            axes.imshow(by_expert, aspect="auto", cmap=colors, norm=norm, extent=extent, interpolation="nearest")
            axes.set_title(name, fontsize=8.5, pad=3)
            axes.set_yticks([0, len(by_expert) - 1])
            axes.tick_params(labelsize=7.5, length=2)
            axes.spines[:].set_visible(False)
        figure.supxlabel("step", fontsize=9)
        figure.supylabel("expert", fontsize=9)
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, colors), ax=grid, shrink=0.9, aspect=22, pad=0.01, extend="max"
        )
        bar.set_label("load (1: equal share)")
        bar.outline.set_visible(False)
        return to_svg(figure, description)


def entropy_over_time(sites: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, description: str) -> str:
    """A line per layer: (name, steps, entropy over ln N)."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 2.6), layout="constrained")
        axes = figure.subplots()
        colors = mpl.colormaps["viridis"]
        for i, (name, steps, values) in enumerate(sites):
            shade = colors(0.85 * i / max(len(sites) - 1, 1))
            axes.plot(steps, values, color=shade, lw=1.3, label=name, marker="o" if len(steps) == 1 else None)
        low = min(min(values) for _, _, values in sites)
        axes.set_ylim(max(0.0, low - 0.1 * (1 - low) - 0.005), 1.005)
        axes.set_xlabel("step")
        axes.set_ylabel("entropy / ln N")
        axes.margins(x=0.01)
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(sites) > 4 else 1)
        return to_svg(figure, description)
