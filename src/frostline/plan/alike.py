"""Stages that cost the same because their layers are the same: drawn layers need not be traced draw by draw.

Two stages cost the same FLOPs and the same bytes when one is the other with layers of one build exchanged above the
frontier: as many layers lie below it, and the layers from it on learn the same parts as often. (The peak may differ by
one or two hundredths, because gradients of later layers are there earlier.) Read `Layout`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from frostline.anatomy import Anatomy
from frostline.plan.cost import StageCost
from frostline.schedule import Stage

Build = tuple[Any, ...]
"""What a layer is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the cost of a stage depends on, and which layers play which role."""

    key: tuple[Any, ...]
    roles: tuple[tuple[Any, ...], ...]
    """Of every layer: where it stands to the frontier, its build, and what of it learns."""


def builds(anatomy: Anatomy, layer_types: tuple[str, ...] | None) -> tuple[Build, ...]:
    """The build of every layer: its parts and their shapes, and its type where the configuration tells them apart."""
    found: list[list[Any]] = [[] for _ in range(anatomy.n_layers)]
    for c in anatomy.components:
        name, index = c.path[0]
        if name == "layers" and index is not None:
            found[index].append((c.name.partition(".")[2], tuple(s.shape for s in c.slices)))
    types = layer_types if layer_types and len(layer_types) == len(found) else ("",) * len(found)
    return tuple((kind, *parts) for kind, parts in zip(types, found, strict=True))


def layout(stage: Stage, layers: tuple[Build, ...], settings: str) -> Layout:
    """The layout of a stage. `settings`: everything else that its cost depends on, as text."""
    learns: list[list[Any]] = [[] for _ in layers]
    outside = []
    for c, slices in stage.selection.by_component():
        name, index = c.path[0]
        here = (c.name.partition(".")[2], sum(s.n_elements for s in slices))
        if name == "layers" and index is not None:
            learns[index].append(here)
        else:
            outside.append((c.name, *here))
    frontier, _ = next(stage.selection.by_component())
    inside = frontier.path[0][0] == "layers" or not any(learns)
    first = next((i for i, parts in enumerate(learns) if parts), len(layers)) if inside else -1
    where = ["below" if i < first else "at" if i == first else "above" for i in range(len(layers))]
    roles = tuple((w, build, *parts) for w, build, parts in zip(where, layers, learns, strict=True))
    key = (settings, tuple(outside), frozenset(Counter(roles).items()))
    return Layout(key=key, roles=roles)


def exchanged(cost: StageCost, of: Layout, to: Layout) -> StageCost:
    """The cost of a stage of layout `of`, for another of the same key: layers renamed by their roles."""
    free: dict[tuple[Any, ...], list[int]] = {}
    for i, role in enumerate(to.roles):
        free.setdefault(role, []).append(i)
    place = {i: free[role].pop(0) for i, role in enumerate(of.roles)}

    def renamed(part: str) -> str:
        return re.sub(r"^layers\[(\d+)\]", lambda m: f"layers[{place[int(m[1])]}]", part)

    return replace(
        cost,
        flops={renamed(part): kinds for part, kinds in cost.flops.items()},
        frontier=renamed(cost.frontier),
        unreached=tuple(map(renamed, cost.unreached)),
    )
