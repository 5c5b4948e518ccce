"""What the names in an expression may stand for in one anatomy: the parts and the cuts that a path fits, and groups.

A path that fits nothing is no error here: `path_checks.py` says what is wrong with it. Read `Names.matched`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from frostline.anatomy import Anatomy, Component, Cut, Slice, families
from frostline.anatomy.component import Segment
from frostline.selection.grammar import Item, Path, PathSegment, Ranked

Group = Callable[[Anatomy, Component, Slice], bool]
Held = Component | Cut
"""What a path may name."""
Steps = tuple[PathSegment, ...]

GROUPS: dict[str, Group] = {
    "all": lambda _a, c, _s: not c.is_other,
    "norm": lambda _a, c, _s: c.is_norm,
    "bias": lambda a, _c, s: a.is_bias(s),
    "mixer": lambda _a, c, _s: any(name in families.MIXERS for name, _ in c.path),
    "qk": lambda _a, c, _s: _in_attention(c, "q", "k"),
    "vo": lambda _a, c, _s: _in_attention(c, "v", "o"),
}
"""Names in expressions that are no components: which slices of which components belong to each."""


def known_names(anatomy: Anatomy) -> list[str]:
    """Every name that may stand in an expression over `anatomy`: its parts, its cuts, then the groups."""
    held: tuple[Held, ...] = (*anatomy.components, *anatomy.cuts)
    parts = dict.fromkeys(name for h in held for name, _ in h.path)
    return [*parts, *(g for g in GROUPS if g not in parts)]


class Names:
    """The names of one anatomy, and what fits them; remembered, because every check of a leaf asks again."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.parts = {name for c in anatomy.components for name, _ in c.path}
        self.cuts = {cut.path[-1][0] for cut in anatomy.cuts}
        self.counts = _counts(anatomy)
        self._fitting: dict[str, list[Held]] = {}
        self._named: dict[frozenset[str], Sequence[Held]] = {}

    def split(self, path: Path) -> tuple[Steps, Group | None]:
        """The steps that name parts, and the group that the last one names, unless a part has its name."""
        *steps, last = path.segments
        if len(last.names) != 1 or last.names[0] in self.parts or last.names[0] not in GROUPS:
            return path.segments, None
        return tuple(steps), GROUPS[last.names[0]]

    def matched(self, steps: Steps, group: Group | None) -> list[Slice]:
        """The slices of what fits that are in the group, buffers included."""
        found: list[Slice] = []
        for held in self.fitting(steps):
            if isinstance(held, Cut):
                found += held.members(_members(held, steps[-1]))
            else:
                found += (s for s in held.slices if group is None or group(self.anatomy, held, s))
        return found

    def fitting(self, steps: Steps) -> list[Held]:
        """The components and cuts that fit."""
        text = written(steps)
        if text not in self._fitting:
            candidates = self._by_names(frozenset(steps[-1].names)) if steps else self.anatomy.components
            self._fitting[text] = [held for held in candidates if self._fits(held, steps)]
        return self._fitting[text]

    def _by_names(self, names: frozenset[str]) -> Sequence[Held]:
        """The components of whose path one of `names` is a step, and the cuts that end with one."""
        if names not in self._named:
            components = [c for c in self.anatomy.components if any(name in names for name, _ in c.path)]
            self._named[names] = [*components, *(c for c in self.anatomy.cuts if c.path[-1][0] in names)]
        return self._named[names]

    def _fits(self, held: Held, steps: Steps) -> bool:
        """Whether a name contains the steps in a row; a cut's name must end with them."""
        path = held.path
        last = len(path) - len(steps)
        starts = range(last + 1) if isinstance(held, Component) else range(max(last, 0), last + 1)
        return any(all(self._step_fits(path, at + k, step) for k, step in enumerate(steps)) for at in starts)

    def _step_fits(self, path: tuple[Segment, ...], at: int, step: PathSegment) -> bool:
        """Whether one step of a name is what one step of a path says."""
        name, index = path[at]
        if name not in step.names:
            return False
        if step.items is None:
            return True
        n = self.counts.get((path[:at], name))
        if n is None:
            return False
        return any(in_range(i, n) and (index is None or index in indices(i, n)) for i in step.items)

    def after(self, steps: Steps) -> list[str]:
        """The names that stand directly after `steps` in the name of some part or cut."""
        out: dict[str, None] = {}
        named: tuple[Held, ...] = (*self.anatomy.components, *self.anatomy.cuts)
        for held in named:
            for at in range(len(held.path) - len(steps)):
                if all(self._step_fits(held.path, at + k, s) for k, s in enumerate(steps)):
                    out[held.path[at + len(steps)][0]] = None
        return list(out)


def written(steps: Iterable[PathSegment]) -> str:
    """Steps of a path as they are written."""
    return ".".join(step.text for step in steps)


def in_range(item: Item, n: int) -> bool:
    """Whether an index, or both ends of a range, exist among `n`; ranges must not be empty."""
    assert not isinstance(item.value, Ranked)
    if isinstance(item.value, int):
        return -n <= item.value < n
    ends = [e for e in (item.value.start, item.value.stop) if e is not None]
    return all(-n <= e <= n for e in ends) and len(indices(item, n)) > 0


def indices(item: Item, n: int) -> range:
    """The indices that an item means among `n`."""
    assert not isinstance(item.value, Ranked)
    if isinstance(item.value, int):
        at = item.value % n
        return range(at, at + 1)
    return range(*item.value.indices(n))


def _members(cut: Cut, step: PathSegment) -> Iterable[int]:
    """The members of a cut that the last step of a path chooses."""
    if step.items is None:
        return range(cut.n)
    return (i for item in step.items if in_range(item, cut.n) for i in indices(item, cut.n))


def _in_attention(component: Component, *parts: str) -> bool:
    path = component.path
    return any(name == "attn" and path[i + 1][0] in parts for i, (name, _) in enumerate(path[:-1]))


def _counts(anatomy: Anatomy) -> dict[tuple[tuple[Segment, ...], str], int]:
    """(path of the parent, name) → how many such parts it has, for every part or cut with an index."""
    counts: dict[tuple[tuple[Segment, ...], str], int] = {}
    for c in anatomy.components:
        for at, (name, index) in enumerate(c.path):
            if index is not None:
                key = (c.path[:at], name)
                counts[key] = max(counts.get(key, 0), index + 1)
    return counts | {(cut.path[:-1], cut.path[-1][0]): cut.n for cut in anatomy.cuts}
