"""Whether a written mixture of experts computes what the dense model does, measured on random tokens.

Read `measure_change` first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import read_anatomy
from frostline.errors import ModelError
from frostline.model import load_model
from frostline.moe.fill import shared_share
from frostline.moe.pairs import Pair
from frostline.moe.sites import find_sites, watch_routers
from frostline.randomness import derive_seed

TOLERANCE = 1e-6
"""Largest ‖Δlogits‖₂/‖logits‖₂ of an upcycle that promises the same function."""
CHECK_ROWS, CHECK_LENGTH = 2, 64


def measure_change(dense: nn.Module, folder: str | Path, *, seed: int = 0) -> tuple[float, float]:
    """(‖Δlogits‖₂/‖logits‖₂, mean factor of an FFN's output) of a written mixture against its dense model.

    In fp32 with eager experts, on 2 rows of up to 64 seeded random tokens.
    """
    model = load_model(str(folder)).eval()
    model.set_experts_implementation("eager")  # type: ignore[operator]
    config: Any = dense.config
    length = min(CHECK_LENGTH, getattr(config, "max_position_embeddings", None) or CHECK_LENGTH)
    generator = torch.Generator().manual_seed(derive_seed(seed, "upcycle check"))
    ids = torch.randint(config.vocab_size, (CHECK_ROWS, length), generator=generator)
    anatomy = read_anatomy(model)
    sites = find_sites(model, anatomy)
    with torch.no_grad(), watch_routers(sites) as seen:
        before = dense(input_ids=ids, use_cache=False).logits.double()
        after = model(input_ids=ids, use_cache=False).logits.double()
    weights = torch.stack([r.weight.sum(-1).mean() for r in seen.values() if r.weight is not None])
    share = shared_share(anatomy.model_type)
    change = ((after - before).norm() / before.norm()).item()
    return change, share + (1 - share) * weights.double().mean().item()


def check_change(change: float, promised: bool, pair: Pair) -> None:
    """Raise `ModelError` for a function that is none, or that changed though it was promised not to."""
    if change != change:
        raise ModelError("the upcycled model gives NaN on random tokens; nothing was written")
    if promised and change > TOLERANCE:
        raise ModelError(
            f"the function changed: ‖Δlogits‖/‖logits‖ = {change:.2e}, more than {TOLERANCE:.0e}, so this {pair.dense} "
            f"has settings that '{pair.target}' does not compute the same; nothing was written"
        )
