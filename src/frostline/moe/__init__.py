"""Mixture of experts: dense models made sparse, balancing losses, and which experts are used. Read `upcycle.py`."""

from frostline.moe.balance import balance_sums, load_of, shares
from frostline.moe.capacity import capacity_of, kept
from frostline.moe.history import SiteHistory, entropy, histories, histories_to_json
from frostline.moe.pairs import PAIRS, Pair, known_pairs
from frostline.moe.sites import Routed, Site, choice_of, find_sites, keep_choice, logits_of, watch_routers
from frostline.moe.upcycle import Upcycled, mixture_of, upcycle, upcycled_to_json
from frostline.moe.usage import (
    SiteUsage,
    Usage,
    cover,
    esft_expression,
    likeness_of,
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
    "SiteHistory",
    "SiteUsage",
    "Upcycled",
    "Usage",
    "balance_sums",
    "capacity_of",
    "choice_of",
    "cover",
    "entropy",
    "esft_expression",
    "find_sites",
    "histories",
    "histories_to_json",
    "keep_choice",
    "kept",
    "known_pairs",
    "likeness_of",
    "load_of",
    "logits_of",
    "measure_usage",
    "mixture_of",
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
