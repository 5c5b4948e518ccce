"""What the benchmark promises: ratios to other systems in the same runs, each with a floor and a calibrated target.

A target is the median that was measured when it was written, with its range. A promise is met when the present median
reaches the floor, and is within 5 % of its target or better. Read `PROMISES`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from show import BASE, Line

TARGETS = Path(__file__).parent / "targets.json"
WITHIN = 0.05
OURS, OURS_BEST = "Frostline", "Frostline, compiled"
Values = list[float]
Found = dict[str, Line]
"""System → its line, of one cell."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A number of one cell, and what it has to be."""

    name: str
    cell: str
    value: Callable[[Found], Values | None]
    """One value per run; None where it was not measured."""
    floor: float
    up: bool = True
    """Whether more is better."""
    exact: bool = False
    """Whether only the floor counts: rounding has no target."""

    def reaches(self, value: float) -> bool:
        """Whether the floor holds."""
        return value >= self.floor if self.up else value <= self.floor

    def keeps(self, value: float, target: float) -> bool:
        """Whether the target does, nearly."""
        if self.exact:
            return True
        return value >= target * (1 - WITHIN) if self.up else value <= target * (1 + WITHIN)


def later(ours: str, theirs: str) -> Callable[[Found], Values | None]:
    """Tokens per second from the second epoch on, run by run."""
    return lambda found: _ratios(found, ours, theirs, lambda line: line.laters)


def first(ours: str, theirs: str) -> Callable[[Found], Values | None]:
    """Tokens per second in the first epoch."""
    return lambda found: _ratios(found, ours, theirs, lambda line: line.firsts)


def _ratios(found: Found, ours: str, theirs: str, of: Callable[[Line], Values]) -> Values | None:
    if ours not in found or theirs not in found:
        return None
    return paired(found[ours], found[theirs], of)


def paired(ours: Line, theirs: Line, of: Callable[[Line], Values]) -> Values:
    """The ratio of each of our runs to the one of theirs that was made nearest to it."""
    other = dict(zip(theirs.places, of(theirs), strict=True))
    return [a / other[min(other, key=lambda p: abs(p - at))] for at, a in zip(ours.places, of(ours), strict=True)]


def peers(found: Found) -> list[Line]:
    """What others made."""
    return [line for line in found.values() if not line.system.startswith(("Frostline", BASE))]


def _fastest(found: Found) -> Line | None:
    return max(peers(found), key=lambda line: line.later, default=None)


def against_fastest(of: Callable[[Line], Values], *, inverse: bool = False) -> Callable[[Found], Values | None]:
    """Our best settings against the fastest peer's."""

    def value(found: Found) -> Values | None:
        fastest = _fastest(found)
        if fastest is None or OURS_BEST not in found:
            return None
        ratios = paired(found[OURS_BEST], fastest, of)
        return [1 / r for r in ratios] if inverse else ratios

    return value


def both_better(found: Found) -> Values | None:
    """By how much some peer's setting is both faster and leaner than our best: the smaller of both; 1: by nothing."""
    if OURS_BEST not in found or not peers(found):
        return None
    us = found[OURS_BEST]
    return [max(min(line.later / us.later, us.peak / line.peak) for line in peers(found))]


def losses(system: str) -> Callable[[Found], Values | None]:
    """The largest relative difference of a step's loss from the bare loop's."""
    return lambda found: [found[system].loss_difference] if system in found and BASE in found else None


def share(system: str) -> Callable[[Found], Values | None]:
    """Of the rate of matrix products alone."""
    return lambda found: found[system].shares or None if system in found else None


FFN, FFN_32K, FFN_BF16 = "ffn llama-8k 512 fp32", "ffn llama-32k 512 fp32", "ffn llama-8k 512 bf16"
INSTRUCTIONS = "ffn llama-8k instructions fp32"
DEPTH = {"last-4": 1.15, "last-2": 1.45, "last-1": 1.8, "head": 3.0}
PROMISES: list[Promise] = [
    *(
        promise
        for cell, memory in ((FFN, 0.95), (FFN_32K, 0.75))
        for promise in (
            Promise(name="a peer's setting both faster and leaner", cell=cell, value=both_better, floor=1.03, up=False),
            Promise(name="time, × the fastest peer's", cell=cell, floor=1.03, up=False,
                    value=against_fastest(lambda line: line.laters, inverse=True)),
            Promise(name="memory, × the fastest peer's", cell=cell, floor=memory, up=False,
                    value=against_fastest(lambda line: line.peaks)),
        )
    ),
    *(
        Promise(name=f"tokens/s, × {peer} as it comes", cell=FFN, value=later(OURS_BEST, peer), floor=1.35)
        for peer in ("TRL", "LLaMA-Factory", "ms-swift")
    ),
    *(
        Promise(name=f"memory, × {peer} as it comes", cell=FFN, floor=1.05, up=False,
                value=lambda found, peer=peer: _ratios(found, OURS_BEST, peer, lambda line: line.peaks))
        for peer in ("TRL", "LLaMA-Factory", "ms-swift")
    ),
    Promise(name="time, × the fastest peer's", cell=FFN_BF16, floor=1.03, up=False,
            value=against_fastest(lambda line: line.laters, inverse=True)),
    Promise(name="memory, × the fastest peer's", cell=FFN_BF16, floor=0.98, up=False,
            value=against_fastest(lambda line: line.peaks)),
    *(
        promise
        for job, floor in DEPTH.items()
        for promise in (
            Promise(name="tokens/s from epoch 2 on, × a bare loop", cell=f"{job} llama-8k 512 fp32", floor=floor,
                    value=later(OURS, BASE)),
            Promise(name="tokens/s in epoch 1, × a bare loop", cell=f"{job} llama-8k 512 fp32", floor=0.95,
                    value=first(OURS, BASE)),
        )
    ),
    Promise(name="tokens/s, × default collation", cell=INSTRUCTIONS, value=later(OURS, "HF Trainer"), floor=1.8),
    *(
        Promise(name="tokens/s, × the fastest peer", cell=f"experts {model} 512 fp32", floor=1.0,
                value=against_fastest(lambda line: line.laters))
        for model in ("mixtral-8k", "qwen3_moe-8k")
    ),
    Promise(name="of the rate of products", cell=FFN, value=share(OURS_BEST), floor=0.8),
    Promise(name="of the rate of products", cell=FFN_BF16, value=share(OURS_BEST), floor=0.6),
    *(
        Promise(name=f"losses of {system}, from the bare loop's", cell=FFN, value=losses(system), floor=1e-5, up=False,
                exact=True)
        for system in (OURS, OURS_BEST)
    ),
]  # fmt: skip


def _by_cell(lines: Iterable[Line]) -> dict[str, Found]:
    out: dict[str, Found] = {}
    for line in lines:
        out.setdefault(line.cell, {})[line.system] = line
    return out


def write_targets(lines: Sequence[Line]) -> None:
    """Add a target for every promise that has none and was measured; those that are there stay."""
    there = json.loads(TARGETS.read_text()) if TARGETS.exists() else {}
    found = _by_cell(lines)
    for promise in PROMISES:
        values = promise.value(found.get(promise.cell, {}))
        key = f"{promise.cell}: {promise.name}"
        if values and key not in there:
            command = f"python benchmarks/bench/run.py cell {promise.cell} --reps {len(values)}"
            there[key] = {"value": round(statistics.median(values), 9), "runs": len(values), "command": command,
                          "range": [round(min(values), 9), round(max(values), 9)]}  # fmt: skip
    TARGETS.write_text(json.dumps(there, indent=1) + "\n")


def report(lines: Sequence[Line]) -> str:
    """Markdown: every promise, its floor, its target and what is measured now."""
    targets, found = json.loads(TARGETS.read_text()) if TARGETS.exists() else {}, _by_cell(lines)
    out = ["| cell | | floor | target | measured (range, runs) | |", "|---|---|---|---|---|---|"]
    for promise in PROMISES:
        values = promise.value(found.get(promise.cell, {}))
        target = targets.get(f"{promise.cell}: {promise.name}", {}).get("value")
        sign = "≥" if promise.up else "≤"
        if not values:
            said, verdict = "not measured", ""
        else:
            value = statistics.median(values)
            said = f"{value:.3g} ({min(values):.3g}–{max(values):.3g}, {len(values)})"
            verdict = "met" if promise.reaches(value) and (target is None or promise.keeps(value, target)) else "missed"
        shown = f"{target:.3g}" if target is not None else "–"
        out.append(f"| {promise.cell} | {promise.name} | {sign} {promise.floor:g} | {shown} | {said} | {verdict} |")
    return "\n".join(out)
