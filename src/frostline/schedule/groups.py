"""Settings that differ by part: which slices of a stage learn with which rate, decay and betas. Read `make_groups`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import TypeVar

from frostline.anatomy import Anatomy, Component, Slice, intersect_all, subtract_all
from frostline.errors import SelectionError
from frostline.recipe import StageSpec
from frostline.selection import Selection, select

T = TypeVar("T")
Slices = tuple[Slice, ...]
REST = "rest"
"""The key that stands for everything the other keys do not name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Slices that learn with the same settings."""

    slices: Slices
    """Disjoint; those of all groups together are the stage's selection."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    betas: tuple[float, float] | None
    """None: the optimizer's own."""


def make_groups(selection: Selection, spec: StageSpec) -> tuple[Group, ...]:
    """The groups of a stage, in the order of its settings. Raises `SelectionError` naming the setting and the part."""
    anatomy, optimizer = selection.anatomy, spec.optimizer
    plain = set() if optimizer.decay_norms_and_biases else norms_and_biases(anatomy)
    rates = _by_part(spec.lr, selection.slices, anatomy, "lr")
    factors = _by_depth(spec.layer_decay, selection.slices, anatomy)
    decays = _by_part(optimizer.weight_decay, selection.slices, anatomy, "weight_decay")
    betas = _by_part(optimizer.betas, selection.slices, anatomy, "betas")
    found: dict[tuple[float, float, tuple[float, float] | None], list[Slice]] = {}
    for (lr, a), (factor, b), (decay, c), (beta, d) in product(rates, factors, decays, betas):
        for s in reduce(intersect_all, (b, c, d), a):
            found.setdefault((lr * factor, 0.0 if s.tensor in plain else decay, beta), []).append(s)
    return tuple(
        Group(slices=tuple(slices), lr=lr, weight_decay=decay, betas=betas)
        for (lr, decay, betas), slices in found.items()
    )


def norms_and_biases(anatomy: Anatomy) -> set[str]:
    """Names of the tensors that hold norms and biases."""
    return {s.tensor for c in anatomy.components for s in c.slices if c.is_norm or anatomy.is_bias(s)}


def _by_part(value: T | Mapping[str, T], slices: Slices, anatomy: Anatomy, setting: str) -> list[tuple[T, Slices]]:
    """(value, slices it holds for); slices without a value, and values without slices, are errors."""
    if not isinstance(value, Mapping):
        return [(value, slices)]
    left, out = slices, []
    for expression, one in value.items():
        if expression == REST:
            continue
        try:
            named = select(anatomy, expression, ties="together").slices
        except SelectionError as error:
            message = f"{setting}: {error.problem}"
            raise SelectionError(message, expression=error.expression, column=error.column) from None
        mine = intersect_all(left, named)
        if not mine:
            taken = bool(intersect_all(slices, named))
            why = "what it names has a value already" if taken else "nothing of it learns in this stage"
            raise SelectionError(f"{setting}: '{expression}': {why}", expression=expression, column=0)
        if intersect_all(subtract_all(slices, left), named):
            message = f"{setting}: '{expression}' overlaps with a part before it"
            raise SelectionError(message, expression=expression, column=0)
        out.append((one, mine))
        left = subtract_all(left, mine)
    if left and REST not in value:
        lacking = ", ".join(dict.fromkeys(c.name for c in anatomy.components if intersect_all(c.slices, left)))
        short = lacking if len(lacking) <= 200 else lacking[:200] + " …"
        message = f"{setting}: no value for {short}; add '{REST}: …' for what the other keys do not name"
        raise SelectionError(message, expression=", ".join(value), column=0)
    if left:
        out.append((value[REST], left))
    return out


def _by_depth(decay: float | None, slices: Slices, anatomy: Anatomy) -> list[tuple[float, Slices]]:
    """(factor, slices) by how far before the last layer they stand."""
    if decay is None:
        return [(1.0, slices)]
    by_distance: dict[int, list[Slice]] = {}
    for c in anatomy.components:
        by_distance.setdefault(_distance(c, anatomy.n_layers), []).extend(intersect_all(c.slices, slices))
    return [(decay**n, tuple(found)) for n, found in sorted(by_distance.items()) if found]


def _distance(component: Component, n_layers: int) -> int:
    """Layers from a part to the last layer: 0 in it and after it, `n_layers` before the first."""
    name, index = component.path[0]
    if name == "layers" and index is not None:
        return n_layers - 1 - index
    return n_layers if name in ("embed", "embed_norm", "position") else 0
