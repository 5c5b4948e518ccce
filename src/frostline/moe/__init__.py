"""Mixture of experts: dense models made sparse, balancing losses, and which experts are used. Read `upcycle.py`."""

from frostline.moe.balance import balance_sums, load_of, shares
from frostline.moe.pairs import PAIRS, Pair, known_pairs
from frostline.moe.sites import Routed, Site, choice_of, find_sites, keep_choice, logits_of, watch_routers
from frostline.moe.upcycle import Upcycled, upcycle, upcycled_to_json
from frostline.moe.usage import (
    SiteUsage,
    Usage,
    cover,
    esft_expression,
    measure_usage,
    read_esft,
    scores_of,
    top,
    usage_from_json,
    usage_to_json,
    write_esft,
)

__all__ = [
    "PAIRS",
    "Pair",
    "Routed",
    "Site",
    "SiteUsage",
    "Upcycled",
    "Usage",
    "balance_sums",
    "choice_of",
    "cover",
    "esft_expression",
    "find_sites",
    "keep_choice",
    "known_pairs",
    "load_of",
    "logits_of",
    "measure_usage",
    "read_esft",
    "scores_of",
    "shares",
    "top",
    "upcycle",
    "upcycled_to_json",
    "usage_from_json",
    "usage_to_json",
    "watch_routers",
    "write_esft",
]
