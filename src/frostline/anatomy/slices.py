"""Slices: boxes of tensor elements, and the exact algebra on them. No torch here.

A slice is one tensor name and, per dimension, the indices it takes, as a tuple of ascending disjoint `range`s. A
slice is therefore a product of index sets: what a head, an expert or the q columns of a packed tensor are.
`intersect` and `subtract` return slices; everything a selection does is built on these two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import mul
from typing import Any

Indices = tuple[range, ...]
"""Ascending, disjoint, non-empty ranges of one dimension; written in the canonical form of `compress`."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements of one tensor: the product of one index set per dimension (none for a 0-dimensional tensor)."""

    tensor: str
    """Name of the parameter or buffer."""
    index: tuple[Indices, ...]
    """Per dimension, the indices taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of indices taken per dimension."""
        return tuple(sum(map(len, indices)) for indices in self.index)

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return reduce(mul, self.shape, 1)

    def __str__(self) -> str:
        if not self.index:
            return self.tensor
        return f"{self.tensor}[{', '.join('+'.join(map(_range_text, ranges)) for ranges in self.index)}]"


def whole(tensor: str, shape: Sequence[int]) -> Slice:
    """The slice that takes every element of a tensor of `shape`."""
    return Slice(tensor, tuple((range(n),) for n in shape))


def part(tensor: str, shape: Sequence[int], dim: int, indices: range) -> Slice:
    """`indices` along `dim`, everything along the other dimensions."""
    return Slice(tensor, tuple((indices,) if d == dim else (range(n),) for d, n in enumerate(shape)))


def intersect(a: Slice, b: Slice) -> Slice | None:
    """The elements in both, or None when there are none."""
    if a.tensor != b.tensor:
        return None
    index = []
    for x, y in zip(a.index, b.index, strict=True):
        common = _intersect_indices(x, y)
        if not common:
            return None
        index.append(common)
    return Slice(a.tensor, tuple(index))


def subtract(a: Slice, b: Slice) -> tuple[Slice, ...]:
    """The elements of `a` that are not in `b`, as disjoint slices (at most one per dimension)."""
    common = intersect(a, b)
    if common is None:
        return (a,)
    pieces = []
    for dim, (mine, shared) in enumerate(zip(a.index, common.index, strict=True)):
        rest = _subtract_indices(mine, shared)
        if rest:
            pieces.append(Slice(a.tensor, (*common.index[:dim], rest, *a.index[dim + 1 :])))
    return tuple(pieces)


def subtract_all(slices: Iterable[Slice], taken: Iterable[Slice]) -> tuple[Slice, ...]:
    """The elements of disjoint `slices` that none of `taken` holds."""
    taken = tuple(taken)
    same, near = set(taken), Neighbours(taken)
    out: list[Slice] = []
    for s in slices:
        if s in same:
            continue
        pieces: tuple[Slice, ...] = (s,)
        for t in near.of(s):
            pieces = tuple(p for piece in pieces for p in subtract(piece, t))
        out.extend(pieces)
    return tuple(out)


def intersect_all(slices: Iterable[Slice], other: Iterable[Slice]) -> tuple[Slice, ...]:
    """The elements of disjoint `slices` that one of the disjoint `other` holds too."""
    other = tuple(other)
    same, near = set(other), Neighbours(other)
    out: list[Slice] = []
    for s in slices:
        if s in same:
            out.append(s)
        else:
            out.extend(c for t in near.of(s) if (c := intersect(s, t)) is not None)
    return tuple(out)


def overlap(slices: Iterable[Slice]) -> bool:
    """Whether two of the slices share an element."""
    slices = tuple(slices)
    near = Neighbours(slices)
    return len(set(slices)) < len(slices) or any(
        t != s and intersect(s, t) is not None for s in slices for t in near.of(s)
    )


class Neighbours:
    """Slices by where they lie, so that what cannot overlap is not compared: a layer may have 512 of one tensor."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._all: dict[str, list[Slice]] = {}
        self._at: dict[tuple[str, int], list[Slice]] = {}
        self._spread: dict[str, list[Slice]] = {}
        for s in slices:
            self._all.setdefault(s.tensor, []).append(s)
            row = _single_row(s)
            if row is None:
                self._spread.setdefault(s.tensor, []).append(s)
            else:
                self._at.setdefault((s.tensor, row), []).append(s)

    def of(self, s: Slice) -> Sequence[Slice]:
        """The slices of the same tensor that may overlap `s`."""
        row = _single_row(s)
        if row is None:
            return self._all.get(s.tensor, ())
        here, spread = self._at.get((s.tensor, row), []), self._spread.get(s.tensor, [])
        return [*here, *spread] if spread else here


def _single_row(s: Slice) -> int | None:
    """The one index that a slice takes of the first dimension, if it is one."""
    if not s.index or len(s.index[0]) != 1 or len(s.index[0][0]) != 1:
        return None
    return s.index[0][0].start


def refine(pieces: Iterable[Slice], cutter: Iterable[Slice]) -> tuple[Slice, ...]:
    """The same elements, cut so that each piece lies wholly inside or wholly outside the disjoint `cutter`."""
    near = Neighbours(cutter)
    out: list[Slice] = []
    for piece in pieces:
        inside = intersect_all((piece,), near.of(piece))
        out += [*inside, *subtract_all((piece,), inside)]
    return tuple(out)


def merge(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """The same elements in fewer slices: neighbours that differ in one dimension only become one."""
    merged = tuple(dict.fromkeys(slices))
    n_dims = max((len(s.index) for s in merged), default=0)
    for dim in range(n_dims):
        groups: dict[tuple[str, tuple[Indices, ...]], list[Indices]] = {}
        untouched = []
        for s in merged:
            if dim < len(s.index):
                key = (s.tensor, s.index[:dim] + s.index[dim + 1 :])
                groups.setdefault(key, []).append(s.index[dim])
            else:
                untouched.append(s)
        joined = [
            Slice(tensor, (*rest[:dim], compress(i for ranges in found for r in ranges for i in r), *rest[dim:]))
            if len(found) > 1
            else Slice(tensor, (*rest[:dim], found[0], *rest[dim:]))
            for (tensor, rest), found in groups.items()
        ]
        merged = (*joined, *untouched)
    return tuple(sorted(merged, key=lambda s: (s.tensor, _order(s))))


def _order(s: Slice) -> tuple[int, ...]:
    return tuple(ranges[0].start for ranges in s.index)


def compress(indices: Iterable[int]) -> Indices:
    """Ascending ranges that hold exactly `indices`: runs of equal steps, those above one from three on."""
    todo = sorted(set(indices))
    out: list[range] = []
    i = 0
    while i < len(todo):
        step = todo[i + 1] - todo[i] if i + 1 < len(todo) else 1
        j = i + 1
        while j < len(todo) and todo[j] - todo[j - 1] == step:
            j += 1
        if step > 1 and j - i < 3:
            out.append(range(todo[i], todo[i] + 1))
            i += 1
        else:
            out.append(range(todo[i], todo[j - 1] + 1, step))
            i = j
    return tuple(out)


def _intersect_indices(a: Indices, b: Indices) -> Indices:
    if a == b:
        return a
    if len(a) == len(b) == 1 and a[0].step == b[0].step:
        if (a[0].start - b[0].start) % a[0].step:
            return ()
        common = range(max(a[0].start, b[0].start), min(a[0].stop, b[0].stop), a[0].step)
        if a[0].step == 1 or len(common) > 2:
            return (common,) if len(common) else ()
        return compress(common)
    return _intersect_sets(a, b)


@lru_cache(maxsize=4096)
def _intersect_sets(a: Indices, b: Indices) -> Indices:
    """Remembered, because thousands of experts and layers are cut alike."""
    return compress(_members(a) & _members(b))


@lru_cache(maxsize=4096)
def _subtract_sets(a: Indices, b: Indices) -> Indices:
    return compress(_members(a) - _members(b))


def _subtract_indices(a: Indices, b: Indices) -> Indices:
    if a == b:
        return ()
    if len(a) == len(b) == 1 and a[0].step == b[0].step == 1:
        left = range(a[0].start, min(a[0].stop, b[0].start))
        right = range(max(a[0].start, b[0].stop), a[0].stop)
        return tuple(r for r in (left, right) if len(r))
    return _subtract_sets(a, b)


def _members(indices: Indices) -> set[int]:
    return {i for r in indices for i in r}


def _range_text(r: range) -> str:
    return f"{r.start}:{r.stop}" if r.step == 1 else f"{r.start}:{r.stop}:{r.step}"


def slice_to_json(piece: Slice) -> dict[str, object]:
    """`{"tensor": name, "index": [[[start, stop, step], …] per dimension]}`; the ranges are Python's."""
    return {
        "tensor": piece.tensor,
        "index": [[[r.start, r.stop, r.step] for r in dim] for dim in piece.index],
    }


def slice_from_json(data: Mapping[str, Any]) -> Slice:
    """The inverse of `slice_to_json`."""
    return Slice(data["tensor"], tuple(tuple(range(*r) for r in dim) for dim in data["index"]))
