"""What was measured, as lines, a table and a plot. Read `lines_of`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
BASE = "bare loop"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One system in one cell, over the runs that count; lists are by run, in the order they were made."""

    cell: str
    system: str
    voids: int
    places: list[int]
    """Where the runs stand among all: what was made when."""
    firsts: list[float]
    """Tokens per second in the first epoch, its first step left out."""
    laters: list[float]
    """Tokens per second afterwards."""
    peaks: list[float]
    """Bytes."""
    loss_difference: float
    """The largest relative one from the bare loop."""
    shares: list[float]
    """Of the rate of matrix products alone."""

    @property
    def later(self) -> float:
        """Tokens per second, the median."""
        return statistics.median(self.laters)

    @property
    def first(self) -> float:
        """Tokens per second in the first epoch, the median."""
        return statistics.median(self.firsts)

    @property
    def peak(self) -> float:
        """Bytes, the median."""
        return statistics.median(self.peaks)

    @property
    def share(self) -> float | None:
        """The median, where products were replayed."""
        return statistics.median(self.shares) if self.shares else None


def lines_of(rows: Iterable[Row], *, void_too: bool = False) -> list[Line]:
    """The table's lines, cell by cell as they were first measured."""
    good: dict[tuple[str, str], list[Row]] = {}
    voids: Counter[tuple[str, str]] = Counter()
    for place, row in enumerate(rows):
        key = (row["cell"], row["system"])
        good.setdefault(key, [])
        if row["void"] and not void_too:
            voids[key] += 1
        elif "error" not in row:
            good[key].append({**row, "place": place})
    return [
        _line(cell, system, found, voids[cell, system], good.get((cell, BASE), []))
        for (cell, system), found in good.items()
        if found
    ]


def _line(cell: str, system: str, found: list[Row], voids: int, bare: list[Row]) -> Line:
    speeds = [_speeds(r) for r in found]
    base = (bare or found)[0]["losses"]
    rates = [(r, s[1]) for r, s in zip(found, speeds, strict=True) if r.get("flops")]
    return Line(
        cell=cell,
        system=system,
        voids=voids,
        places=[r["place"] for r in found],
        firsts=[s[0] for s in speeds],
        laters=[s[1] for s in speeds],
        peaks=[r["peak_bytes"] for r in found],
        loss_difference=max(abs(a - b) / abs(b) for r in found for a, b in zip(r["losses"], base, strict=False)),
        shares=[later / r["tokens"][0] * r["flops"] / r["products_rate"] for r, later in rates],
    )


def _speeds(row: Row) -> tuple[float, float]:
    """Tokens per second in the first epoch (without its first step) and afterwards."""
    steps = len(row["seconds"]) // row["job"]["epochs"]
    first, later = slice(1, steps), slice(steps, None)
    rate = _by_median if len(set(row["tokens"])) == 1 else _by_sum
    return rate(row, first), rate(row, later if row["seconds"][later] else first)


def _by_median(row: Row, steps: slice) -> float:
    return float(row["tokens"][0] / statistics.median(row["seconds"][steps]))


def _by_sum(row: Row, steps: slice) -> float:
    return float(sum(row["tokens"][steps]) / sum(row["seconds"][steps]))


def table(lines: Iterable[Line]) -> str:
    """Markdown."""
    columns = ("job, model, lengths", "system", "tokens/s, epoch 1", "later", "(range)", "× bare", "peak MB", "× bare")
    columns += ("of products", "loss", "runs")
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines = list(lines)
    bare = {line.cell: line for line in lines if line.system == BASE}
    order = list(dict.fromkeys(line.cell for line in lines))
    for line in sorted(lines, key=lambda x: order.index(x.cell)):
        base = bare.get(line.cell, line)
        out.append(
            f"| {line.cell} | {line.system} | {line.first:,.0f} | {line.later:,.0f} | "
            f"{min(line.laters):,.0f}–{max(line.laters):,.0f} | {line.later / base.later:.2f} | "
            f"{line.peak / 1e6:,.0f} | {line.peak / base.peak:.2f} | "
            f"{'–' if line.share is None else f'{line.share:.0%}'} | {line.loss_difference:.0e} | "
            f"{len(line.laters)}{f' ({line.voids} void)' if line.voids else ''} |"
        )
    return "\n".join(out)


def plot(lines: list[Line], to: Path) -> None:
    """Speed and memory, both relative to the bare loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bare = {line.cell: line for line in lines if line.system == BASE}
    cells = [c for c in dict.fromkeys(line.cell for line in lines) if c in bare]
    systems = list(dict.fromkeys(line.system for line in lines))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.13 * len(lines) + 0.25 * len(cells)), sharey=True)
    ours, others = iter(("#2f9e44", "#0b5d1e")), iter(pyplot.get_cmap("Set3").colors * 2)
    colours = {s: next(ours if s.startswith("Frostline") else others) for s in systems}
    ticks, at = [], 0.0
    for cell in cells:
        mine = [line for line in lines if line.cell == cell]
        ticks.append(at + (len(mine) - 1) / 2)
        for line in mine:
            for axis, value in zip(axes, (line.later / bare[cell].later, line.peak / bare[cell].peak), strict=True):
                axis.barh(at, value, height=0.9, color=colours[line.system])
                axis.text(value, at, f" {value:.2f}", va="center", fontsize=6)
            at += 1
        at += 1.5
    for axis, title in zip(axes, ("tokens/s from epoch 2 on, × bare loop", "peak memory, × bare loop"), strict=True):
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(ticks, [c.removesuffix(" fp32") for c in cells], fontsize=8)
    axes[0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[s]) for s in systems]
    figure.legend(handles, systems, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(to, dpi=130)
