"""What a comparison comes to: every strategy's losses over seeds, its cost, and how it differs from the baseline.

Pure: it reads no files. Read `evaluate` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from frostline.experiment.compare_measures import Outcome, Point
from frostline.experiment.statistics import CONFIDENCE, Difference, Summary, paired, summary

Axis = Literal["steps", "flops"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What is known of a strategy before anything is trained."""

    name: str
    changes: tuple[str, ...]
    """What differs from the common recipe."""
    stages: tuple[tuple[str, str, int, int], ...]
    """Name, what learns, steps and learning parameters of each."""
    planned_flops: int | None
    """Of a whole run; None where its cost cannot be predicted."""
    planned_peak_bytes: int | None
    held_out: str
    """Hash of the tokens that its held-out loss is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualCost:
    """A strategy and the baseline when both had spent what the cheaper of the two spent in all."""

    axis: Axis
    spent: int
    """Steps or FLOPs."""
    own: Summary
    """Its held-out losses then; between two measurements, on the line from one to the other."""
    baseline: Summary
    between: tuple[int, int]
    """What the dearer one had spent at the measurements around that; of the first seed."""
    difference: Difference
    """Told apart only if it also is with each of those two measurements in place of the line between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanPoint:
    """Held-out loss over seeds at a step that every run measured."""

    step: int
    flops: int | None
    """None where the runs had not spent the same."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyResult:
    """One strategy over all seeds."""

    outlook: Outlook
    outcomes: tuple[Outcome, ...]
    curve: tuple[MeanPoint, ...]
    """Of the runs that count."""
    loss: Summary
    """Held-out loss at the end."""
    best: Summary
    """The lowest measured on the way: chosen by the same data, so a little too low."""
    difference: Difference | None
    """To the baseline, at the end of both; None for the baseline, and where the two were not measured on the same."""
    equal_steps: EqualCost | None
    """None where both have the same number of steps: `difference` says it."""
    equal_flops: EqualCost | None
    """None where both have the same FLOPs, and where these are not known."""
    flops: int | None
    tokens: float | None
    peak_bytes: int | None
    flops_as_planned: bool | None
    """Whether every metered step computed what the plan said; None where nothing was planned."""
    peak_ratio: float | None
    """Measured over planned."""
    seconds: Summary
    tokens_per_s: Summary

    @property
    def losses(self) -> dict[int, float]:
        """Seed → held-out loss at the end, of the runs that count."""
        return losses(self.outcomes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A comparison, as far as it has come."""

    name: str
    budget: str | None
    baseline: str
    seeds: tuple[int, ...]
    strategies: tuple[StrategyResult, ...]
    notes: tuple[str, ...]
    """What a reader has to know about the numbers."""

    @property
    def finished(self) -> bool:
        """Whether no run is left to be done."""
        return all(o.state in ("finished", "failed") for s in self.strategies for o in s.outcomes)

    @property
    def sound(self) -> bool:
        """Whether every run that was made finished and passed its audit."""
        return not any(troubled(o) for s in self.strategies for o in s.outcomes)

    def of(self, name: str) -> StrategyResult:
        """A strategy by its name."""
        return next(s for s in self.strategies if s.outlook.name == name)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "name": self.name,
            "budget": self.budget,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "confidence": CONFIDENCE,
            "finished": self.finished,
            "sound": self.sound,
            "notes": list(self.notes),
            "strategies": [{"losses": {str(k): v for k, v in s.losses.items()}, **asdict(s)} for s in self.strategies],
        }


def troubled(outcome: Outcome) -> bool:
    """Whether a run failed, or its audit did."""
    return outcome.state == "failed" or outcome.audit == "failed"


def evaluate(
    outlooks: Sequence[Outlook],
    outcomes: Mapping[tuple[str, int], Outcome],
    *,
    name: str,
    baseline: str,
    seeds: tuple[int, ...],
    budget: str | None = None,
    notes: Sequence[str] = (),
) -> Compared:
    """The comparison of what the runs came to; a run without an outcome has not been made."""
    of = {o.name: tuple(outcomes.get((o.name, s)) or _not_run(o.name, s) for s in seeds) for o in outlooks}
    base = next(o for o in outlooks if o.name == baseline)
    results = tuple(_result(o, of[o.name], base, of[baseline]) for o in outlooks)
    return Compared(
        name=name,
        budget=budget,
        baseline=baseline,
        seeds=seeds,
        strategies=results,
        notes=(*notes, *_notes(results, base, seeds)),
    )


def _not_run(name: str, seed: int) -> Outcome:
    return Outcome(strategy=name, seed=seed, state="not run", audit=None)


def _last(curve: Sequence[Point]) -> float:
    return curve[-1].loss


def losses(outcomes: Sequence[Outcome], pick: Callable[[Sequence[Point]], float] = _last) -> dict[int, float]:
    """Seed → a loss of its curve, the last one unless `pick` says otherwise; of the runs that count."""
    return {o.seed: pick(o.measures.curve) for o in outcomes if o.counts and o.measures is not None}


def _result(
    outlook: Outlook, outcomes: tuple[Outcome, ...], base: Outlook, of_base: tuple[Outcome, ...]
) -> StrategyResult:
    counting = [o.measures for o in outcomes if o.counts and o.measures is not None]
    own, other = losses(outcomes), losses(of_base)
    held_against = outlook.name != base.name and outlook.held_out == base.held_out
    axes: list[Axis] = ["steps", "flops"]
    equal = {a: equal_cost(outcomes, of_base, a) if held_against else None for a in axes}
    flops = [m.flops for m in counting if m.flops is not None]
    checked = [m for m in counting if m.flops is not None and m.planned_flops is not None]
    peaks = [m.peak_bytes for m in counting if m.peak_bytes is not None]
    ratios = [m.peak_bytes / m.planned_peak_bytes for m in counting if m.peak_bytes and m.planned_peak_bytes]
    return StrategyResult(
        outlook=outlook,
        outcomes=outcomes,
        curve=mean_curve([m.curve for m in counting]),
        loss=summary(list(own.values())),
        best=summary(list(losses(outcomes, lambda curve: min(p.loss for p in curve)).values())),
        difference=paired(own, other) if held_against else None,
        equal_steps=equal["steps"],
        equal_flops=equal["flops"],
        flops=max(flops, default=None),
        tokens=sum(m.tokens for m in counting) / len(counting) if counting else None,
        peak_bytes=max(peaks, default=None),
        flops_as_planned=all(m.flops == m.planned_flops for m in checked) if checked else None,
        peak_ratio=max(ratios, default=None),
        seconds=summary([m.clock.seconds for m in counting]),
        tokens_per_s=summary([m.clock.tokens_per_s for m in counting if m.clock.tokens_per_s]),
    )


def mean_curve(curves: Sequence[Sequence[Point]]) -> tuple[MeanPoint, ...]:
    """Mean, lowest and highest of several curves at the steps that all of them have."""
    at = [{p.step: p for p in curve} for curve in curves]
    out = []
    for step in [s for s in (at[0] if at else {}) if all(s in points for points in at)]:
        found = [points[step].loss for points in at]
        flops = {points[step].flops for points in at}
        spent = flops.pop() if len(flops) == 1 else None
        mean = sum(found) / len(found)
        out.append(MeanPoint(step=step, flops=spent, mean=mean, low=min(found), high=max(found)))
    return tuple(out)


def equal_cost(own: Sequence[Outcome], baseline: Sequence[Outcome], axis: Axis) -> EqualCost | None:
    """Both at what the cheaper one spent in all; None where they spent the same, where the cost is not known, or where
    one of them has no run that counts."""
    totals = [t for of in (own, baseline) if (t := _spent(of, axis)) is not None]
    if len(totals) < 2 or totals[0] == totals[1]:
        return None
    spent = min(totals)

    def values(of: Sequence[Outcome], which: int) -> dict[int, float]:
        return losses(of, lambda curve: at_cost(curve, spent, axis)[which])

    line = paired(values(own, 0), values(baseline, 0))
    around = [paired(values(own, k), values(baseline, k)).verdict for k in (1, 2)]
    if any(v != line.verdict for v in around):
        why = "it hangs on the loss between two measurements: measure more often (eval.every)"
        line = replace(line, verdict="not told apart", why=line.why or why)
    dearer = baseline if (_spent(baseline, axis) or 0) > spent else own
    curve = next(o.measures.curve for o in dearer if o.counts and o.measures)
    return EqualCost(
        axis=axis,
        spent=spent,
        own=summary(list(values(own, 0).values())),
        baseline=summary(list(values(baseline, 0).values())),
        between=_around(curve, spent, axis),
        difference=line,
    )


def at_cost(curve: Sequence[Point], spent: int, axis: Axis) -> tuple[float, float, float]:
    """The loss at a cost on the line between the measurements around it, and those two losses."""
    before = [p for p in curve if _at(p, axis) <= spent][-1]
    after = next((p for p in curve if _at(p, axis) >= spent), before)
    width = _at(after, axis) - _at(before, axis)
    share = (spent - _at(before, axis)) / width if width else 0.0
    return before.loss + share * (after.loss - before.loss), before.loss, after.loss


def _around(curve: Sequence[Point], spent: int, axis: Axis) -> tuple[int, int]:
    costs = [_at(p, axis) for p in curve]
    return max(c for c in costs if c <= spent), min((c for c in costs if c >= spent), default=spent)


def _at(point: Point, axis: Axis) -> int:
    cost = point.step if axis == "steps" else point.flops
    assert cost is not None  # a run whose FLOPs are known in all has them at every measurement
    return cost


def _spent(outcomes: Sequence[Outcome], axis: Axis) -> int | None:
    """What the runs that count have spent; the least of them, where a plateau ended some earlier."""
    counting = [o.measures for o in outcomes if o.counts and o.measures is not None]
    values = [m.steps if axis == "steps" else m.flops for m in counting]
    known = [v for v in values if v is not None]
    return min(known) if known and len(known) == len(values) else None


def _notes(results: Sequence[StrategyResult], base: Outlook, seeds: tuple[int, ...]) -> list[str]:
    notes = []
    n_compared = sum(r.difference is not None and r.difference.low is not None for r in results)
    if len(seeds) < 3:
        notes.append(
            f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}: too few for an interval; nothing can be told apart"
        )
    elif n_compared > 1:
        notes.append(
            f"each interval by itself is at {100 * CONFIDENCE:.0f} %: were all {n_compared} differences zero, one or "
            f"more would seem real in up to {min(100.0, 100 * (1 - CONFIDENCE) * n_compared):.0f} % of comparisons"
        )
    made = [o.measures.made_with for r in results for o in r.outcomes if o.counts and o.measures is not None]
    values = {key: list(dict.fromkeys(m.get(key, "–") for m in made)) for m in made[:1] for key in m}
    unlike = [f"{key} ({', '.join(found)})" for key, found in values.items() if len(found) > 1]
    if unlike:
        notes.append(f"the runs were not all made alike: {'; '.join(unlike)}")
    for r in results:
        if r.outlook.held_out != base.held_out:
            notes.append(
                f"{r.outlook.name} is measured on other held-out tokens than {base.name} (its data, tokenizer or "
                "eval.batches differ): their losses are not compared"
            )
        lost = [o for o in r.outcomes if troubled(o)]
        if lost:
            notes.append(
                f"{r.outlook.name}: {len(lost)} of {len(r.outcomes)} runs are not in the statistics, which are of "
                "those that went well"
            )
    return notes
