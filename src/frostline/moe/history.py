"""How a run's tokens were spread over its experts, read from what it wrote down. Read `histories` first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteHistory:
    """One layer's experts over a run."""

    site: str
    """Such as `layers[3].ffn`."""
    steps: tuple[int, ...]
    """Steps (1-based) of which the load was written down."""
    load: tuple[tuple[int, ...], ...]
    """Per step: choices that went to each expert."""
    dropped: tuple[int, ...]
    """Per step: choices dropped for lack of room; 0 where the stage had no capacity."""

    @property
    def n_experts(self) -> int:
        """Experts of the layer."""
        return len(self.load[0])

    def shares(self, part: slice = slice(None)) -> tuple[float, ...]:
        """Each expert's share of the choices in some of the steps."""
        totals = [sum(step[e] for step in self.load[part]) for e in range(self.n_experts)]
        return tuple(n / (sum(totals) or 1) for n in totals)

    @property
    def first_fifth(self) -> slice:
        """The first fifth of the steps, at least one."""
        return slice(0, max(len(self.steps) // 5, 1))

    @property
    def last_fifth(self) -> slice:
        """The last fifth of the steps, at least one."""
        return slice(len(self.steps) - max(len(self.steps) // 5, 1), None)

    @property
    def largest_share(self) -> float:
        """The busiest expert's share over the last fifth; 1/N is balance, 1 is collapse."""
        return max(self.shares(self.last_fifth))

    @property
    def balanced(self) -> bool:
        """Whether no expert had more than twice its equal share over the last fifth."""
        return self.largest_share <= 2 / self.n_experts

    @property
    def never(self) -> tuple[int, ...]:
        """Experts that no token was sent to in the whole run."""
        return tuple(e for e, share in enumerate(self.shares()) if share == 0)

    @property
    def dropped_share(self) -> float:
        """Of all choices of the run."""
        return sum(self.dropped) / max(sum(map(sum, self.load)), 1)

    def entropies(self) -> tuple[float, ...]:
        """Per step: the entropy of the load over ln N; 1 is balance, 0 is one expert."""
        return tuple(entropy(self.shares(slice(i, i + 1))) for i in range(len(self.steps)))


def entropy(shares: Sequence[float]) -> float:
    """Of shares that sum to 1, over ln N."""
    return -sum(s * math.log(s) for s in shares if s > 0) / math.log(max(len(shares), 2))


def histories(rows: Sequence[Mapping[str, Any]]) -> tuple[SiteHistory, ...]:
    """The lines of `load.jsonl`, by layer; steps that the run went back from do not count."""
    rows = _gone_on(rows)
    sites = dict.fromkeys(site for row in rows for site in row["load"])
    out = []
    for site in sites:
        mine = [row for row in rows if site in row["load"]]
        out.append(
            SiteHistory(
                site=site,
                steps=tuple(row["step"] for row in mine),
                load=tuple(tuple(row["load"][site]) for row in mine),
                dropped=tuple(row.get("dropped", {}).get(site, 0) for row in mine),
            )
        )
    return tuple(out)


def _gone_on(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        if "rolled_back_to" in row:
            kept = [k for k in kept if k["step"] <= row["rolled_back_to"]]
        else:
            kept.append(row)
    return kept


def histories_to_json(found: Sequence[SiteHistory]) -> list[dict[str, Any]]:
    """What is read off the histories, as plain data."""
    return [
        {
            "site": h.site,
            "n_experts": h.n_experts,
            "steps": len(h.steps),
            "shares_first_fifth": list(h.shares(h.first_fifth)),
            "shares_last_fifth": list(h.shares(h.last_fifth)),
            "largest_share_last_fifth": h.largest_share,
            "balanced": h.balanced,
            "entropy_last_fifth": entropy(h.shares(h.last_fifth)),
            "never": list(h.never),
            "dropped_share": h.dropped_share,
        }
        for h in found
    ]
