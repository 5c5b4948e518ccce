"""Figures of measured gradients: through the stack, through one block, and their bias over time. Read `flow_figure`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from frostline.experiment.figures import BANDS, STYLE, WIDTH_IN, short, to_svg

STREAM, ATTENTION, FFN, CUT = "#33475b", "#0b5fa5", "#b3640b", "#c0182b"
MAX_WIDTH_PT = 11.0


def flow_figure(
    row: dict[str, Any],
    cuts: set[tuple[int, str]],
    *,
    description: str,
    names: tuple[str, str] = ("embed", "norm, head,\nloss"),
) -> str:
    """The stack of one measurement, embedding on the left: the loss's gradient comes in on the right.

    `row`: a line of `flow.jsonl`. `cuts`: (layer, point) where the stage stops gradients; (-1, `embed.out`) for the
    embedding. Widths are norms, on one scale.
    """
    blocks = row["blocks"]
    values = [row["embed"], *(v for b in blocks for v in (b["out"], b["into"], *b["through"].values()))]
    top = max((v for v in values if v), default=1.0)
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 2.5), layout="constrained")
        axes = figure.subplots()
        n = len(blocks)
        for i, block in enumerate(blocks):
            incoming = block["out"]
            _line(axes, (i + 1.45, 0), (i + 1.05, 0), incoming, top, STREAM)
            axes.text(i + 1.24, -0.16, _label(incoming), ha="center", va="top", fontsize=7.5, color=STREAM)
            _branches(axes, i, block, cuts, top, n)
            axes.add_patch(
                mpl.patches.Rectangle((i + 0.45, -1.05), 0.6, 2.1, fc=BANDS[0], ec="#b9c2cc", lw=0.6, zorder=0)
            )
            if n > 1:
                axes.text(i + 0.75, -1.12, f"layer {i}", ha="center", va="top", fontsize=8)
            if (i, "block.in") in cuts:
                _cross(axes, i + 0.45, 0)
        _line(axes, (0.45, 0), (0.05, 0), None if (-1, "embed.out") in cuts else row["embed"], top, STREAM)
        axes.text(0.24, -0.16, _label(row["embed"]), ha="center", va="top", fontsize=7.5, color=STREAM)
        axes.text(0.0, 0, names[0], ha="right", va="center", fontsize=8)
        if (-1, "embed.out") in cuts:
            _cross(axes, 0.24, 0)
        axes.text(n + 0.47, -0.5, "← gradient", ha="left", va="center", fontsize=7.5, color=STREAM)
        axes.text(n + 0.47, 0, names[1], ha="left", va="center", fontsize=8)
        axes.set_xlim(-0.45, n + 1.0)
        axes.set_ylim(-1.45, 1.25)
        axes.axis("off")
        return to_svg(figure, description)


def _branches(
    axes: Any, layer: int, block: dict[str, Any], cuts: set[tuple[int, str]], top: float, n_blocks: int
) -> None:
    """What comes back through each branch of a block, and what of its skips is cut."""
    for reader, value in block["through"].items():
        above = reader.startswith("ffn")
        side, color, name = (1, FFN, "ffn") if above else (-1, ATTENTION, reader.split("_")[0])
        name = {"shared": "both"}.get(name, name)
        branch = "ffn" if above else "attn"
        start, end = (layer + 1.05, 0), (layer + 0.45, 0)
        stopped = (layer, f"{branch}.out") in cuts
        _line(axes, start, end, None if stopped else value, top, color, bend=0.9 * side)
        height = 0.72 if n_blocks > 1 else 0.5
        axes.text(layer + 0.75, height * side, f"{name} {_label(None if stopped else value)}", ha="center",
                  va="center", fontsize=7.5, color=color)  # fmt: skip
        if stopped:
            _cross(axes, layer + 0.75, 0.5 * side)
    skips = [p for at, p in cuts if at == layer and p.endswith(".skip")]
    _line(axes, (layer + 1.05, 0), (layer + 0.45, 0), None if skips else block["into"], top, STREAM)
    for x, skip in zip((0.62, 0.88), sorted(skips), strict=False):
        _cross(axes, layer + x, 0)
        axes.text(layer + x, 0.13, skip, ha="center", va="bottom", fontsize=6.5, color=CUT)


def _line(
    axes: Any, start: tuple[float, float], end: tuple[float, float], value: float | None, top: float, color: str,
    *, bend: float = 0.0,
) -> None:  # fmt: skip
    """A line as wide as its norm; a thin dotted one where nothing arrives."""
    width = 0.8 if not value else max(MAX_WIDTH_PT * value / top, 0.8)
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-", connectionstyle=f"arc3,rad={bend}", lw=width, capstyle="butt",
            color=color if value else "#9aa7b4", ls="-" if value else ":", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def _cross(axes: Any, x: float, y: float) -> None:
    axes.plot([x], [y], marker="x", ms=9, mew=2.2, color=CUT, zorder=5)


def _label(value: float | None) -> str:
    return "none" if value is None else short(value)


def bias_figure(series: dict[str, Sequence[tuple[int, float, float, float]]], *, description: str) -> str:
    """Cosine between routed and true gradient: per kind of part (step, mean, lowest, highest) over its layers."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(WIDTH_IN, 2.7), layout="constrained")
        axes = figure.subplots()
        colors = mpl.colormaps["tab10"]
        for i, (name, points) in enumerate(series.items()):
            steps, mean, low, high = zip(*points, strict=True)
            axes.fill_between(steps, low, high, color=colors(i % 10), alpha=0.12, lw=0)
            axes.plot(steps, mean, color=colors(i % 10), lw=1.4, marker="o", ms=3, label=name)
        axes.axhline(1, color="#555555", lw=0.6, ls=":")
        axes.set_xlabel("step")
        axes.set_ylabel("cosine to the true gradient")
        lowest = min((p[2] for points in series.values() for p in points), default=0.0)
        axes.set_ylim(min(-0.05, 1.05 * lowest), 1.05)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return to_svg(figure, description)


def block_figure(row: dict[str, Any], cuts: set[tuple[int, str]], *, description: str) -> str:
    """One block, larger: the same drawing as the stack's."""
    return flow_figure(row, cuts, description=description, names=("from before", "from after"))
