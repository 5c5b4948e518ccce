"""The statistics of a comparison: mean and spread over seeds, differences paired by seed, losses at equal cost.

Nothing is called better or worse unless the interval of the paired difference leaves out zero. Read `paired` first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

CONFIDENCE = 0.95
FEWEST = 3
"""Pairs that an interval needs: of two, one would be 12.7 standard errors wide to each side."""

Verdict = Literal["better", "worse", "not told apart"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One number over seeds."""

    n: int
    mean: float | None
    """None of no values."""
    sd: float | None
    """Of the sample (n - 1); None below two values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A strategy's loss less the baseline's, seed by seed; below zero the strategy is better."""

    by_seed: dict[int, float]
    """Of the seeds that both have."""
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    """Ends of the interval; None where there is none."""
    verdict: Verdict
    why: str
    """Why there is no interval; empty where there is one."""

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.by_seed)


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of a sample."""
    return Summary(
        n=len(values),
        mean=statistics.fmean(values) if values else None,
        sd=statistics.stdev(values) if len(values) > 1 else None,
    )


def paired(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """The difference of two strategies by seed, with Student's interval for its mean.

    mean ± t · sd / √n with t of n - 1 degrees of freedom: right for differences that scatter normally over seeds, which
    a handful of seeds cannot show to be so. Of fewer than three pairs no interval is given.
    """
    differences = {seed: own[seed] - baseline[seed] for seed in own if seed in baseline}
    values = list(differences.values())
    found = summary(values)
    low = high = None
    why = ""
    if found.n < FEWEST:
        why = f"{found.n} pair{'' if found.n == 1 else 's'} of seeds: too few for an interval, which needs {FEWEST}"
    elif not found.sd:
        why = "every seed gave the same difference: it has no spread to judge it by"
    else:
        assert found.mean is not None
        half = t_quantile(CONFIDENCE, found.n - 1) * found.sd / math.sqrt(found.n)
        low, high = found.mean - half, found.mean + half
    return Difference(
        by_seed=differences, mean=found.mean, sd=found.sd, low=low, high=high, verdict=_verdict(low, high), why=why
    )


def _verdict(low: float | None, high: float | None) -> Verdict:
    if high is not None and high < 0:
        return "better"
    return "worse" if low is not None and low > 0 else "not told apart"


@lru_cache
def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = `confidence` for Student's T of so many degrees of freedom.

    P(|T| > t) is the regularised incomplete beta function I_x(degrees/2, 1/2) at x = degrees / (degrees + t²)
    (Abramowitz and Stegun 26.7.1), solved for x.
    """
    from mpmath import betainc, findroot  # takes 0.1 s, for this alone

    def beyond(x: float) -> float:
        return float(betainc(degrees / 2, 0.5, 0, x, regularized=True)) - (1 - confidence)

    x = float(findroot(beyond, (1e-12, 1 - 1e-12), solver="bisect", maxsteps=200, verify=False))
    return math.sqrt(degrees * (1 / x - 1))
