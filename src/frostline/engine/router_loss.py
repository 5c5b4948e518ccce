"""A loss with the routers' balancing losses added, the same however a step is divided into micro-batches.

`over: step` takes each expert's share of the load from all micro-batches of the step: where there are several, all
of them are passed through the model once before the first backward pass, with the same dropout and without a graph.
`over: row` takes it from each row by itself and needs no such pass. Read `RouterLoss.__call__` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.engine.step import LossFunction
from frostline.errors import ModelError
from frostline.moe import Routed, Site, balance_sums, choice_of, find_sites, load_of, logits_of, shares, watch_routers
from frostline.recipe import MoeSpec

Load = dict[str, torch.Tensor]
"""Site → choices that went to each expert, (experts,)."""

_sites: WeakKeyDictionary[nn.Module, tuple[Site, ...]] = WeakKeyDictionary()


class RouterLoss:
    """(model, micro-batch) → another loss plus `balance` · N·Σ f·P plus `z` · logsumexp², each the mean over layers.

    All are sums over tokens that are targets, as the other loss is. Raises `ModelError` for a model without a router.
    """

    def __init__(self, inner: LossFunction, spec: MoeSpec, anatomy: Anatomy, *, load: Load | None = None) -> None:
        self.inner, self.spec, self.anatomy = inner, spec, anatomy
        self.load = load
        """The load of the whole step, where it is known; else that of the micro-batch is taken for it."""

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss, summed over the micro-batch's targets."""
        sites = sites_of(model, self.anatomy)
        with watch_routers(sites) as seen:
            loss = self.inner(model, batch)
        counts = batch.labels.flatten() != -100
        for site in sites:
            logits, share = logits_of(seen[site.name], site), self.share(seen[site.name], site, batch, counts)
            balance, z = balance_sums(logits, share, counts)
            loss = loss + (self.spec.balance * balance + self.spec.z * z) / len(sites)
        return loss

    def share(self, routed: Routed, site: Site, batch: Any, counts: torch.Tensor) -> torch.Tensor:
        """f: each expert's share of the choices, (experts,) or, over rows, (tokens, experts)."""
        index, n = choice_of(routed, site), logits_of(routed, site).shape[-1]
        if self.spec.over == "step":
            return shares(load_of(index, counts, n) if self.load is None else self.load[site.name])
        rows, length = batch.input_ids.shape
        of_rows = [load_of(i, c, n) for i, c in zip(index.chunk(rows), counts.chunk(rows), strict=True)]
        return shares(torch.stack(of_rows)).repeat_interleave(length, dim=0)

    def for_step(
        self, model: nn.Module, batches: Sequence[Any], replay: Callable[[int], AbstractContextManager[None]]
    ) -> LossFunction:
        """The loss of one step: with the load of all its micro-batches, where that is not the load of the only one."""
        if len(batches) == 1 or self.spec.over == "row" or not self.spec.balance:
            return self
        sites, load = sites_of(model, self.anatomy), Load()
        for i, batch in enumerate(batches):
            with replay(i), torch.no_grad(), watch_routers(sites) as seen:
                self.inner(model, batch)
            for site in sites:
                n, index = logits_of(seen[site.name], site).shape[-1], choice_of(seen[site.name], site)
                here = load_of(index, batch.labels.flatten() != -100, n)
                load[site.name] = load[site.name] + here if site.name in load else here
        return RouterLoss(self.inner, self.spec, self.anatomy, load=load)


def sites_of(model: nn.Module, anatomy: Anatomy) -> tuple[Site, ...]:
    """The model's routers; found once for each model. Raises `ModelError` when it has none."""
    if model not in _sites:
        found = find_sites(model, anatomy)
        if not found:
            raise ModelError("a stage has balancing losses (`moe`), but this model has no router; leave them out")
        _sites[model] = found
    return _sites[model]
