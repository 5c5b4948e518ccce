"""What a stage does that costs more than its selection looks like."""

from __future__ import annotations

from torch import nn

from frostline.grouped import own_modules
from frostline.schedule import Stage


def notes_on(model: nn.Module, stage: Stage) -> tuple[str, ...]:
    """Sentences for a person, when the stage begins."""
    if not learns_some_experts(stage) or own_modules(model):
        return ()
    kind = stage.selection.anatomy.model_type
    return (
        f"{kind} computes its experts in a way of its own: the weight gradients of all of them are computed, and those "
        "of experts that do not learn are left out afterwards",
    )


def learns_some_experts(stage: Stage) -> bool:
    """Whether in some layer some experts learn and others do not."""
    there: dict[str, set[str]] = {}
    for component in stage.selection.anatomy.components:
        site, _, rest = component.name.partition(".experts[")
        if rest:
            there.setdefault(site, set()).add(rest.partition("]")[0])
    learning: dict[str, set[str]] = {}
    for component, _ in stage.selection.by_component():
        site, _, rest = component.name.partition(".experts[")
        if rest:
            learning.setdefault(site, set()).add(rest.partition("]")[0])
    return any(experts != there[site] for site, experts in learning.items())
