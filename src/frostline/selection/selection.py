"""Selections: an expression over one anatomy → an immutable set of parameter slices.

`select` parses, resolves and checks ties. Every leaf must match something, an empty result is an error, and so is a
`-` that removes nothing. Selections range over parameters: buffers never learn. Read `select`, then `Selection`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from frostline.anatomy import Anatomy, Component, Neighbours, Slice, intersect_all, slice_to_json, subtract_all
from frostline.selection.grammar import parse
from frostline.selection.resolve import Match, Resolver, Slices, layers_of
from frostline.selection.ties import PulledIn, Ties, with_ties
from frostline.units import format_count, format_share


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """An immutable set of parameter slices of one anatomy, with the expression it came from."""

    expression: str
    anatomy: Anatomy
    slices: Slices
    """Disjoint, in the anatomy's order; tied storage under the name that owns it."""
    matches: tuple[Match, ...]
    """What each leaf matched, in the order of the expression."""
    pulled_in: PulledIn = ()
    """(part that was named, part that learns with it because the two are one tensor)."""

    @property
    def n_elements(self) -> int:
        """Parameters selected."""
        return sum(s.n_elements for s in self.slices)

    @property
    def n_bytes(self) -> int:
        """Bytes of the parameters selected."""
        return sum(s.n_elements * self.anatomy.tensor[s.tensor].element_bytes for s in self.slices)

    @property
    def n_tensors(self) -> int:
        """Tensors of which something is selected."""
        return len({s.tensor for s in self.slices})

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers (0-based) of which something is selected."""
        return layers_of(c for c, _ in self.by_component())

    def by_component(self) -> Iterator[tuple[Component, Slices]]:
        """Every component of which something is selected, with what is selected of it."""
        for component in self.anatomy.components:
            found = tuple(s for piece in component.slices for s in self.within(piece))
            if found:
                yield component, found

    def within(self, piece: Slice) -> Slices:
        """What is selected of one slice."""
        if piece in self._whole:
            return (piece,)
        return intersect_all((piece,), self._near.of(piece))

    @cached_property
    def _whole(self) -> frozenset[Slice]:
        return frozenset(self.slices)

    @cached_property
    def _near(self) -> Neighbours:
        return Neighbours(self.slices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return not subtract_all(self.slices, other.slices) and not subtract_all(other.slices, self.slices)

    def __hash__(self) -> int:
        return hash((self.n_elements, self.n_tensors))

    def __str__(self) -> str:
        total = self.anatomy.n_parameters
        return (
            f"{self.expression}: {format_count(self.n_elements)} of {format_count(total)} parameters "
            f"({format_share(self.n_elements, total)}) in {self.n_tensors} tensors, "
            f"{len(self.layers)} of {self.anatomy.n_layers} layers"
        )


def select(anatomy: Anatomy, expression: str, *, ties: Ties = "error") -> Selection:
    """The selection that `expression` means in `anatomy`.

    `ties`: when one of two tied parts is selected without the other, refuse (`error`) or take both (`together`).
    Raises `SelectionError` with the column and what to do.
    """
    tree = parse(expression)
    resolver = Resolver(anatomy, expression)
    named = resolver.resolve(tree)
    if not named:
        raise resolver.error("this selects nothing", 0)
    slices, pulled_in = with_ties(anatomy, named, expression=expression, ties=ties)
    return Selection(
        expression=expression,
        anatomy=anatomy,
        slices=tuple(sorted(slices, key=resolver.order)),
        matches=tuple(resolver.matches),
        pulled_in=pulled_in,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What two selections take of one component, in elements."""

    component: str
    only_first: int
    only_second: int
    both: int


def compare(first: Selection, second: Selection) -> tuple[Difference, ...]:
    """What each of two selections over one anatomy takes of every component that one of them touches."""
    taken: list[dict[str, Slices]] = [{c.name: s for c, s in selection.by_component()} for selection in (first, second)]
    out = []
    for name in (c.name for c in first.anatomy.components if c.name in taken[0] or c.name in taken[1]):
        here, there = (t.get(name, ()) for t in taken)
        both = _n(intersect_all(here, there))
        out.append(Difference(component=name, only_first=_n(here) - both, only_second=_n(there) - both, both=both))
    return tuple(out)


def shared_heads(selection: Selection) -> tuple[int, int] | None:
    """(query heads, key/value heads) of a model whose query heads share keys and values, when a term names `heads`."""
    if not any(re.search(r"(?<!kv_)\bheads\b", m.text) for m in selection.matches):
        return None
    n = {c.name: c.n for c in selection.anatomy.cuts}
    pairs = ((n[name], n.get(f"{name.removesuffix('heads')}kv_heads", 0)) for name in n if name.endswith(".heads"))
    return next(((heads, kv) for heads, kv in pairs if kv and kv != heads), None)


def _n(slices: Slices) -> int:
    return sum(s.n_elements for s in slices)


def selection_to_json(selection: Selection) -> dict[str, Any]:
    """The selection as plain data: what each leaf matched, and the slices per component."""
    return {
        "expression": selection.expression,
        "n_elements": selection.n_elements,
        "n_bytes": selection.n_bytes,
        "n_tensors": selection.n_tensors,
        "pulled_in": [{"named": a, "learns_too": b} for a, b in selection.pulled_in],
        "layers": list(selection.layers),
        "matches": [asdict(m) for m in selection.matches],
        "components": [
            {
                "name": c.name,
                "n_elements": sum(s.n_elements for s in found),
                "slices": [slice_to_json(s) for s in found],
            }
            for c, found in selection.by_component()
        ],
    }
