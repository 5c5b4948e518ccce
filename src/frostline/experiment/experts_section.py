"""The report's section on experts: what `load.jsonl` and `likeness.jsonl` hold, made ready for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from frostline.moe import SiteHistory, entropy, histories
from frostline.run_folder import RunFolder

MAX_LAYERS = 12
"""Layers that figures show; of deeper stacks the first and the last are shown."""
BINS = 60
"""Steps are drawn in at most so many columns."""


def experts_section(folder: RunFolder, figures: Any) -> dict[str, Any] | None:
    """Warnings, a row per layer and the figures; None where no load was written down."""
    found = histories(folder.read_lines(folder.load))
    if not found:
        return None
    likeness = [(row["step"], row["sites"]) for row in folder.read_lines(folder.likeness)]
    shown = found if len(found) <= MAX_LAYERS else (*found[: MAX_LAYERS // 2], *found[-MAX_LAYERS // 2 :])
    return {
        "warnings": list(warnings(found, likeness)),
        "rows": [_row(h, [(step, sites[h.site]) for step, sites in likeness if h.site in sites]) for h in found],
        "load": figures.load_over_time(
            [(h.site, *_binned(h)) for h in shown],
            description="Each expert's share of its layer's choices over steps, one strip per layer",
        ),
        "entropy": figures.entropy_over_time(
            [(h.site, *_entropies(h)) for h in shown],
            description="Entropy of each layer's load over steps, as a share of ln N; 1 is balance",
        ),
        "hidden": len(found) - len(shown),
    }


def warnings(found: Sequence[SiteHistory], likeness: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """What a reader must not miss, in words."""
    out = []
    last = likeness[-1][1] if likeness else {}
    identical = [site for site, x in last.items() if x["identical"]]
    if identical:
        out.append(
            f"{_some(identical)}: experts are still identical to the bit, so which of them a token visits makes no "
            "difference."
        )
    uneven = [h.site for h in found if not h.balanced]
    if uneven:
        out.append(f"{_some(uneven)}: one expert had more than 2/N of the choices over the last fifth of the steps.")
    never = [
        f"{h.site} ({', '.join(map(str, h.never[:8]))}{', …' if len(h.never) > 8 else ''})" for h in found if h.never
    ]
    if never:
        out.append(f"{_some(never)}: experts that no token was ever sent to.")
    return out


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _row(history: SiteHistory, likeness: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    def alike(at: int) -> str:
        return f"{likeness[at][1]['smallest']:.4f} to {likeness[at][1]['largest']:.4f}" if likeness else "–"

    return {
        "site": history.site,
        "n": history.n_experts,
        "largest": f"{history.largest_share:.3f}",
        "limit": f"{2 / history.n_experts:.3f}",
        "balanced": history.balanced,
        "entropy": f"{entropy(history.shares(history.last_fifth)):.3f}",
        "never": len(history.never),
        "dropped": f"{100 * history.dropped_share:.2f} %" if any(history.dropped) else "–",
        "before": alike(0),
        "after": alike(-1),
    }


def _bins(n: int) -> list[slice]:
    """At most `BINS` runs of steps that follow one another."""
    many = min(n, BINS)
    edges = [i * n // many for i in range(many + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _binned(history: SiteHistory) -> tuple[tuple[int, int], list[tuple[float, ...]]]:
    """(first step, last step), and per bin each expert's share times N: 1 is its equal share."""
    n = history.n_experts
    columns = [tuple(n * s for s in history.shares(part)) for part in _bins(len(history.steps))]
    return (history.steps[0], history.steps[-1]), columns


def _entropies(history: SiteHistory) -> tuple[list[float], list[float]]:
    """Middle of each bin, and the entropy of its load."""
    parts = _bins(len(history.steps))
    middles = [sum(history.steps[p]) / len(history.steps[p]) for p in parts]
    return middles, [entropy(history.shares(p)) for p in parts]
