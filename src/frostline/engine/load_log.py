"""The load of every expert at every step, as it was trained with, and how alike experts are before and after stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.engine.dispatch import take_dropped
from frostline.engine.events import Event, Measured, Observer, RolledBack, RunStarted, StageEnded, StepDone
from frostline.engine.recompute import recomputing
from frostline.moe import Routed, Site, find_sites, keep_choice, likeness_of
from frostline.run_folder import RunFolder


@contextmanager
def log_load(model: nn.Module, anatomy: Anatomy, folder: RunFolder, *, wanted: bool) -> Iterator[list[Observer]]:
    """Inside, the observer that is yielded writes a line per step: the choices that went to each expert of each layer.

    Counted are forward passes with gradients, blocks that are computed again left out; all tokens count. Nothing is
    yielded unless `wanted`, or where experts are not told who visits them.
    """
    sites = find_sites(model, anatomy) if wanted else ()
    log = _LoadLog(model, anatomy, sites, folder)
    handles = []
    for site in sites:
        handles.append(site.experts.register_forward_pre_hook(log.hook(site), with_kwargs=True))
    try:
        yield [log] if handles else []
    finally:
        for handle in handles:
            handle.remove()


class _LoadLog:
    """Counts between events; an observer."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, sites: tuple[Site, ...], folder: RunFolder) -> None:
        self.model, self.anatomy, self.sites, self.folder = model, anatomy, sites, folder
        self.load: dict[str, torch.Tensor] = {}

    def hook(self, site: Site) -> Callable[..., None]:
        """A pre-hook of the site's experts that counts its tokens."""

        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled() or recomputing():
                return
            routed = Routed()
            keep_choice(routed)(module, args, kwargs)
            if routed.index is not None:
                chosen = routed.index.detach().flatten()
                here = torch.bincount(chosen, minlength=site.n_experts)[: site.n_experts]
                self.load[site.name] = self.load[site.name] + here if site.name in self.load else here

        return count

    def __call__(self, event: Event) -> None:
        """Write the step's counts; forget what a measurement between steps has counted."""
        if isinstance(event, StepDone) and self.load:
            load = {name: counts.tolist() for name, counts in self.load.items()}
            row = {"step": event.step, "stage": event.stage.index, "load": load}
            dropped = take_dropped(self.model)
            self.folder.append(self.folder.load, {**row, "dropped": dropped} if dropped else row)
        if isinstance(event, RolledBack) and self.load:
            take_dropped(self.model)
            self.folder.append(self.folder.load, {"step": event.step, "rolled_back_to": event.to})
        if isinstance(event, (StepDone, Measured, RolledBack)):
            self.load = {}
        # a run may be resumed from a checkpoint before its first step: then its start is in the log already
        if isinstance(event, StageEnded) or (isinstance(event, RunStarted) and not self.folder.likeness.exists()):
            self._write_likeness(event.step if isinstance(event, StageEnded) else 0)

    def _write_likeness(self, step: int) -> None:
        with torch.no_grad():
            found = {x.site: x for x in likeness_of(self.model, self.anatomy, self.sites)}
        rows = {
            site: {"smallest": x.smallest, "mean": x.mean, "largest": x.largest, "identical": len(x.identical)}
            for site, x in found.items()
        }
        if rows:
            self.folder.append(self.folder.likeness, {"step": step, "sites": rows})
