"""Mixture of experts: dense models made sparse, balancing losses, and which experts are used. Read `upcycle.py`."""

from frostline.moe.balance import balance_sums, load_of, shares
from frostline.moe.pairs import PAIRS, Pair, known_pairs
from frostline.moe.sites import Routed, Site, choice_of, find_sites, logits_of, watch_routers
from frostline.moe.upcycle import Upcycled, upcycle, upcycled_to_json

__all__ = [
    "PAIRS",
    "Pair",
    "Routed",
    "Site",
    "Upcycled",
    "balance_sums",
    "choice_of",
    "find_sites",
    "known_pairs",
    "load_of",
    "logits_of",
    "shares",
    "upcycle",
    "upcycled_to_json",
    "watch_routers",
]
