"""Tied tensors in a selection: one tensor under two names learns under both of them, or under neither.

Read `with_ties`.
"""

from __future__ import annotations

from typing import Literal

from frostline.anatomy import Anatomy, Slice, subtract_all, whole
from frostline.errors import SelectionError

Ties = Literal["error", "together"]
PulledIn = tuple[tuple[str, str], ...]
"""(part that was named, part that learns with it because they are tied)."""


def with_ties(
    anatomy: Anatomy, named: tuple[Slice, ...], *, expression: str, ties: Ties
) -> tuple[tuple[Slice, ...], PulledIn]:
    """What is selected under the names that own it, each tied pair checked, and what that pulled in.

    Raises `SelectionError` for one name without the other, unless `ties` lets both learn.
    """
    pulled_in = []
    own = tuple(s for s in named if s.tensor not in anatomy.ties)
    for alias, source in anatomy.ties.items():
        as_source = tuple(Slice(source, s.index) for s in named if s.tensor == alias)
        of_source = tuple(s for s in own if s.tensor == source)
        lacking = subtract_all(as_source, of_source)
        extra = subtract_all(of_source, as_source)
        if lacking or extra:
            one, other = (_part_of(anatomy, t) for t in ((alias, source) if lacking else (source, alias)))
            if ties == "error":
                partly = (lacking or extra) != (whole(source, anatomy.tensor[source].shape),)
                raise _one_without_the_other(one, other, source, partly=partly, expression=expression)
            pulled_in.append((one, other))
        own = (*own, *lacking)
    return own, tuple(pulled_in)


def _part_of(anatomy: Anatomy, tensor: str) -> str:
    """The name of a component that holds something of a tensor."""
    return next(c.name for c in anatomy.components if any(s.tensor == tensor for s in c.slices))


def _one_without_the_other(taken: str, lacking: str, source: str, *, partly: bool, expression: str) -> SelectionError:
    both = f"the same of '{lacking}' too" if partly else f"both ('{taken} | {lacking}')"
    return SelectionError(
        f"'{taken}' and '{lacking}' are tied (one tensor, {source}), and this selects '{taken}' without "
        f"'{lacking}'.\n"
        f"  Select {both} or neither, or set `ties: together` to let both learn,\n"
        f"  or `ties: untie` to give each weights of its own first.",
        expression=expression,
        column=max(expression.find(taken), 0),
    )
