"""The load of every expert at every step, as it was trained with: `evidence/load.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy
from frostline.engine.events import Event, Measured, Observer, RolledBack, StepDone
from frostline.engine.recompute import recomputing
from frostline.moe import Routed, Site, find_sites, keep_choice
from frostline.run_folder import RunFolder


@contextmanager
def log_load(model: nn.Module, anatomy: Anatomy, folder: RunFolder, *, wanted: bool) -> Iterator[list[Observer]]:
    """Inside, the observer that is yielded writes a line per step: the choices that went to each expert of each layer.

    Counted are forward passes with gradients, blocks that are computed again left out; all tokens count. Nothing is
    yielded unless `wanted`, or where experts are not told who visits them.
    """
    log = _LoadLog(folder)
    handles = []
    for site in find_sites(model, anatomy) if wanted else ():
        handles.append(site.experts.register_forward_pre_hook(log.hook(site), with_kwargs=True))
    try:
        yield [log] if handles else []
    finally:
        for handle in handles:
            handle.remove()


class _LoadLog:
    """Counts between events; an observer."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
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
            self.folder.append(self.folder.load, {"step": event.step, "stage": event.stage.index, "load": load})
        if isinstance(event, RolledBack) and self.load:
            self.folder.append(self.folder.load, {"step": event.step, "rolled_back_to": event.to})
        if isinstance(event, (StepDone, Measured, RolledBack)):
            self.load = {}
