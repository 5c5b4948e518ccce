"""How numbers are written for people: counts, bytes, durations, shares. Nothing here computes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def _scaled(value: float, suffixes: tuple[str, ...], base: float) -> str:
    suffix, *larger = suffixes
    while abs(value) >= base and larger:
        value, suffix = value / base, larger.pop(0)
    return f"{value:.3g} {suffix}".rstrip() if abs(value) < 100 else f"{value:.0f} {suffix}".rstrip()


def format_count(n: int) -> str:
    """`1234567` → `1.23 M` (decimal thousands)."""
    return _scaled(n, ("", "k", "M", "G", "T"), 1000.0)


def format_bytes(n: float) -> str:
    """`1536` → `1.5 KiB`."""
    return _scaled(n, ("B", "KiB", "MiB", "GiB", "TiB"), 1024.0)


def parse_bytes(text: str) -> int:
    """`80GB` → 80,000,000,000; `24GiB` → 24 · 2³⁰. Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    if match is None:
        raise ValueError(f"'{text}' is no size: write it as in 80GB or 24GiB")
    power = " KMGT".index(match[2].upper() or " ")
    if len(match[1]) > 20:
        raise ValueError(f"'{text[:20]}…' is no size of any memory")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def format_flops(n: float) -> str:
    """`2.5e12` → `2.5 TFLOP`."""
    return _scaled(n, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"), 1000.0)


def parse_flops(text: str) -> float:
    """FLOPs per second: `150T`, `150 TFLOP/s`, `1.2PFLOPS` → a number. Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]?)(?:FLOPS?(?:/s)?)?\s*", text)
    if match is None or not float(match[1]):
        raise ValueError(f"'{text}' is no rate: write it as in 150TFLOPS or 90 GFLOP/s")
    return float(match[1]) * 1000.0 ** " KMGTP".index(match[2].upper() or " ")


def format_duration(seconds: float) -> str:
    """`75.2` seconds → `1m15s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def format_share(part: int, whole: int) -> str:
    """`(1, 8)` → `12.5 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def format_change(relative: float) -> str:
    """A relative change as a percentage in two digits: `0.0731` → `7.3 %`; an infinite one is `from zero`."""
    if not math.isfinite(relative):
        return "from zero"
    percent = 100 * relative
    return f"{percent:.2g} %" if percent < 99.5 else f"{percent:.0f} %"


def format_changes(relatives: Sequence[float]) -> str:
    """The smallest to the largest of several relative changes: `3.6 % – 7 %`; empty for none."""
    if not relatives:
        return ""
    low, high = format_change(min(relatives)), format_change(max(relatives))
    return low if low == high else f"{low} – {high}"
