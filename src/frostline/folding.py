"""Folding part names that differ only in their indices into one expression, such as `layers[0:5].attn.q`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from frostline.anatomy import parse_path


@dataclass(slots=True)
class Fold:
    """Component names that differ only in their indices: every combination of the indices that its title shows."""

    names: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """One expression for all of them; it can be pasted into a recipe."""
        paths = [parse_path(n) for n in self.names]
        out = []
        for steps in zip(*paths, strict=True):
            indices = sorted({i for _, i in steps if i is not None})
            out.append(steps[0][0] + (f"[{_index_text(indices)}]" if indices else ""))
        return ".".join(out)


def fold(items: Iterable[tuple[str, Hashable]]) -> list[Fold]:
    """Fold names, each given with what must be equal for two to be folded, in order of first appearance."""
    folds: dict[Hashable, Fold] = {}
    for name, alike in items:
        key = (tuple(step for step, _ in parse_path(name)), alike)
        folds.setdefault(key, Fold()).names.append(name)
    return [box for f in folds.values() for box in _boxes(f)]


def _boxes(fold: Fold) -> list[Fold]:
    """The fold cut so that each part is every combination of its indices: not of experts 0 and 1 in one layer and 2 in
    another."""
    by_index = {tuple(i for _, i in parse_path(name) if i is not None): name for name in fold.names}
    return [Fold([by_index[index] for index in sorted(box)]) for box in _products(frozenset(by_index))]


def _products(found: frozenset[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Index tuples of one length as products of sets, in the order of their first members."""
    if len(next(iter(found))) == 0:
        return [[()]]
    rests: dict[int, set[tuple[int, ...]]] = {}
    for head, *rest in found:
        rests.setdefault(head, set()).add(tuple(rest))
    heads: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head in sorted(rests):
        heads.setdefault(frozenset(rests[head]), []).append(head)
    return [
        [(head, *rest) for head in firsts for rest in box]
        for shared, firsts in heads.items()
        for box in _products(shared)
    ]


def folded(names: Iterable[str]) -> list[str]:
    """The names as few expressions."""
    return [f.title for f in fold((name, None) for name in names)]


def _index_text(indices: Sequence[int]) -> str:
    out, i = [], 0
    while i < len(indices):
        j = i
        while j + 1 < len(indices) and indices[j + 1] == indices[j] + 1:
            j += 1
        out.append(str(indices[i]) if i == j else f"{indices[i]}:{indices[j] + 1}")
        i = j + 1
    return ",".join(out)
