"""What a person sees of mixtures of experts. Renders; never computes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from frostline.moe import SiteHistory, Upcycled, Usage, entropy
from frostline.units import format_count

BARS = " ▁▂▃▄▅▆▇█"


def print_upcycled(console: Console, made: Upcycled) -> None:
    """What an upcycle made, what it measured, what to know."""
    kept = "the same function" if made.promised else "another function"
    console.print(
        f"{made.dense} → {made.target}: {made.experts} experts, {made.top_k} per token, in {len(made.layers)} layers\n"
        f"parameters: {format_count(made.n_dense)} → {format_count(made.n_parameters)}, of which a token meets "
        f"{format_count(made.n_active)}\n"
        f"{kept}: ‖Δlogits‖/‖logits‖ = {made.change:.2e} in fp32, on random tokens",
        highlight=False,
    )
    if made.top1 == "switch":
        console.print(f"each FFN's output is multiplied by {made.ffn_factor:.3f} on average", highlight=False)
    for note in made.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"written: {made.out}", highlight=False, soft_wrap=True)


def print_usage(console: Console, usage: Usage) -> None:
    """Load and weight per layer, with what is alike and what is never used."""
    table = Table(title=f"{format_count(usage.n_tokens)} tokens", title_justify="left", title_style="")
    table.add_column("layer")
    table.add_column("load per expert")
    for name in ("busiest", "entropy", "experts alike (cosine)"):
        table.add_column(name, justify="right")
    table.add_column("never used")
    alike = {x.site: f"{x.smallest:.3f} to {x.largest:.3f}" for x in usage.likeness}
    for s in usage.sites:
        never = ", ".join(map(str, s.never))
        table.add_row(
            s.site,
            _bars(s.scores("tokens")),
            f"{s.largest_share:.3f}",
            f"{s.entropy:.3f}",
            alike.get(s.site, ""),
            never,
        )
    console.print(table)
    same = [x for x in usage.likeness if x.identical]
    if same:
        console.print(
            f"warning: {len(same)} of {len(usage.likeness)} layers have identical experts (the first: {same[0].site}, "
            f"experts {same[0].identical[0][0]} and {same[0].identical[0][1]}): which of them a token visits makes no "
            "difference",
            highlight=False,
        )


def print_histories(console: Console, found: Sequence[SiteHistory]) -> None:
    """How a run's tokens were spread, over the first and the last fifth of its steps."""
    table = Table(title=f"load in training, {len(found[0].steps)} steps", title_justify="left", title_style="")
    for name in ("layer", "first fifth", "last fifth"):
        table.add_column(name)
    for name in ("largest share", "2/N", "entropy", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("never used")
    for h in found:
        last, dropped = h.shares(h.last_fifth), f"{100 * h.dropped_share:.2f} %" if any(h.dropped) else "–"
        table.add_row(
            h.site, _bars(h.shares(h.first_fifth)), _bars(last), f"{h.largest_share:.3f}{'' if h.balanced else ' !'}",
            f"{2 / h.n_experts:.3f}", f"{entropy(last):.3f}", dropped,
            ", ".join(map(str, h.never)),
        )  # fmt: skip
    console.print(table)
    uneven = [h.site for h in found if not h.balanced]
    if uneven:
        console.print(
            f"warning: in {len(uneven)} of {len(found)} layers one expert had more than 2/N of the choices over the "
            f"last fifth of the steps (the first: {uneven[0]})",
            highlight=False,
        )


def _bars(shares: Sequence[float]) -> str:
    """One bar per expert, full at twice the balanced share."""
    n = len(shares)
    return "".join(BARS[min(round(s * n / 2 * (len(BARS) - 1)), len(BARS) - 1)] for s in shares)
