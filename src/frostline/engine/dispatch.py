"""What a stage does to the way tokens go to experts while it trains: capacity with dropping, jitter before routers.

Both are in force in training mode only, never in a measurement. Jitter reaches the router's input and nothing else,
and is drawn where dropout is: a function of seed, step and micro-batch. A dropped choice has weight 0. Read
`set_dispatch` first.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from frostline.engine.recompute import recomputing
from frostline.engine.router_loss import sites_of
from frostline.errors import ModelError
from frostline.moe import Routed, Site, capacity_of, choice_of, keep_choice, kept
from frostline.recipe import MoeSpec
from frostline.schedule import Stage

_installed: WeakKeyDictionary[nn.Module, Dispatch] = WeakKeyDictionary()


def set_dispatch(model: nn.Module, stage: Stage | None) -> None:
    """Put in force exactly what `stage` says, `None` for nothing. Raises `ModelError` where the model cannot do it."""
    spec = stage.spec.moe if stage else None
    wanted = spec if spec and (spec.capacity is not None or spec.jitter or spec.bias is not None) else None
    old = _installed.get(model)
    if old is not None and old.spec != wanted:
        _installed.pop(model).remove()
        old = None
    if stage is not None and wanted is not None and old is None:
        _installed[model] = Dispatch(model, sites_of(model, stage.selection.anatomy), wanted, _widths(stage))


def take_dropped(model: nn.Module) -> dict[str, int]:
    """Site → choices dropped since the last call, in forward passes with gradients; empty without a capacity."""
    installed = _installed.get(model)
    if installed is None or installed.spec.capacity is None:
        return {}
    dropped = {name: int(n) for name, n in installed.dropped.items()}
    installed.dropped = {}
    return dropped


def _widths(stage: Stage) -> dict[str, int]:
    """Site → the length of its correction bias, where the stage moves it: experts that compute nothing count too."""
    owner = stage.selection.anatomy.owner
    return {owner[s].name.rpartition(".")[0]: s.n_elements for s in stage.by_rule}


def take_load(model: nn.Module) -> dict[str, torch.Tensor]:
    """Site → choices that went to each expert since the last call, in forward passes with gradients; for `bias`."""
    installed = _installed[model]
    load, installed.load = installed.load, {}
    return load


class Dispatch:
    """Hooks on a model's routers and experts; `remove` takes them away."""

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], spec: MoeSpec, widths: dict[str, int]) -> None:
        self.spec, self.training = spec, False
        self.counts = torch.empty(0)
        """(rows, length), of the pass in progress: 1 for a token, 0 for padding."""
        self.dropped: dict[str, torch.Tensor] = {}
        self.load: dict[str, torch.Tensor] = {}
        self.handles = [model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for site in sites:
            if spec.jitter:
                self._check_router(site)
                self.handles.append(site.router.register_forward_pre_hook(self._jitter))
            if site.name in widths:
                count = self._count(site, widths[site.name])
                self.handles.append(site.experts.register_forward_pre_hook(count, with_kwargs=True))
            if spec.capacity is not None:
                self.handles.append(site.experts.register_forward_pre_hook(self._drop(site), with_kwargs=True))

    def remove(self) -> None:
        """Nothing is in force any more."""
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def _check_router(site: Site) -> None:
        if any(m is site.experts for m in site.router.modules()):
            raise ModelError(
                f"moe.jitter: {type(site.router).__name__} is router and experts in one module, so jitter cannot reach "
                f"the router of {site.name} alone"
            )

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.training = model.training
        ids, mask = kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs.get("attention_mask")
        is_padding = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
        self.counts = mask.long() if is_padding else torch.ones_like(ids)  # type: ignore[union-attr]

    def _jitter(self, _router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.training or not args:
            return None
        noise = torch.empty_like(args[0]).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)
        return (args[0] * noise, *args[1:])

    def _count(self, site: Site, width: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.training and torch.is_grad_enabled() and not recomputing():
                routed = Routed()
                keep_choice(routed)(module, args, kwargs)
                index = choice_of(routed, site)
                zeros = torch.zeros(width, dtype=torch.int64, device=index.device)
                counts = self.counts.reshape(-1, 1).expand_as(index)
                here = zeros.index_add(0, index.flatten(), counts.flatten())
                self.load[site.name] = self.load[site.name] + here if site.name in self.load else here

        return count

    def _drop(self, site: Site) -> Any:
        def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.training:
                return None
            routed = Routed()
            keep_choice(routed)(module, args, kwargs)
            index, weight = choice_of(routed, site), routed.weight
            if weight is None:
                raise ModelError(f"moe.capacity: {site.name}.experts is not given the weights of its outputs")
            assert self.spec.capacity is not None
            n, lengths = site.n_experts, self.counts.sum(1)
            room = capacity_of(self.spec.capacity, lengths=lengths, chosen=index.shape[1], n_experts=n)
            keep = kept(index.masked_fill(self.counts.reshape(-1, 1) == 0, n), n_experts=n, capacity=room)
            if torch.is_grad_enabled() and not recomputing():
                self.dropped[site.name] = (~keep).sum() + self.dropped.get(site.name, 0)
            masked = weight * keep.to(weight.dtype)
            swap = [masked if a is weight else a for a in args]
            return tuple(swap), {k: masked if v is weight else v for k, v in kwargs.items()}

        return drop
