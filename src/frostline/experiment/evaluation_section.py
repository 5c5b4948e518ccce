"""Learning against forgetting: every set that was measured, from start to end. Renders numbers of `metrics.jsonl`."""

from __future__ import annotations

import math
from typing import Any

from frostline.run_folder import RunFolder

Curve = list[tuple[int, float]]


def evaluation_section(folder: RunFolder, stages: list[tuple[str, int, int]], figures: Any) -> dict[str, Any] | None:
    """What the template shows; None where nothing was measured."""
    curves, bits = _curves(folder)
    if not curves:
        return None
    others = {name: curve for name, curve in curves.items() if name != "held out"}
    figure = figures.change_curves(
        stages,
        {name: [(step, loss - curve[0][1]) for step, loss in curve] for name, curve in curves.items()},
        description="Change of the loss of every measured set since its first measurement; below zero is learning",
    )
    return {
        "rows": [_row(name, curve, bits[name]) for name, curve in curves.items()],
        "figure": figure if others else None,
    }


def _curves(folder: RunFolder) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Set → its losses, and set → its bits per byte where they are known."""
    curves: dict[str, Curve] = {}
    bits: dict[str, Curve] = {}
    for row in folder.read_lines(folder.metrics):
        name, loss = (
            ("held out", row["held_out_loss"]) if "held_out_loss" in row else (row.get("set"), row.get("set_loss"))
        )
        if name is None or loss is None:
            continue
        curves.setdefault(name, []).append((row["step"], loss))
        bits.setdefault(name, [])
        if row.get("bits_per_byte") is not None:
            bits[name].append((row["step"], row["bits_per_byte"]))
    return curves, bits


def _row(name: str, curve: Curve, bits: Curve) -> dict[str, Any]:
    first, last = curve[0][1], curve[-1][1]
    return {
        "name": name,
        "first": f"{first:.4f}",
        "last": f"{last:.4f}",
        "change": f"{last - first:+.4f}",
        "perplexity": f"{_perplexity(first)} → {_perplexity(last)}",
        "bits": f"{bits[0][1]:.3f} → {bits[-1][1]:.3f}" if bits else "–",
        "verdict": "learnt" if last < first else "forgot" if last > first else "unchanged",
    }


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "beyond e^50"
