"""From a syntax tree to slices: what each leaf matches in one anatomy, and how leaves combine.

A leaf must match something, and so must every name and every index in it; a `-` that removes nothing and an `&` of
nothing are errors. Errors point at the column and say what there is instead. Read `Resolver.resolve` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from frostline.anatomy import (
    Anatomy,
    Component,
    Cut,
    Neighbours,
    Slice,
    families,
    intersect,
    intersect_all,
    subtract_all,
    whole,
)
from frostline.anatomy.component import Segment
from frostline.errors import SelectionError, did_you_mean
from frostline.selection.grammar import Binary, Complement, Esft, Expr, Item, Leaf, Param, Path, PathSegment, Ranked

Slices = tuple[Slice, ...]
Ties = Literal["error", "together"]
Group = Callable[[Anatomy, Component, Slice], bool]
Held = Component | Cut
"""What a path may name."""

GROUPS: dict[str, Group] = {
    "all": lambda _a, c, _s: not c.is_other,
    "norm": lambda _a, c, _s: c.is_norm,
    "bias": lambda a, _c, s: a.is_bias(s),
    "mixer": lambda _a, c, _s: any(name in families.MIXERS for name, _ in c.path),
    "qk": lambda _a, c, _s: _in_attention(c, "q", "k"),
    "vo": lambda _a, c, _s: _in_attention(c, "v", "o"),
}
"""Names in expressions that are no components: which slices of which components belong to each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What one leaf of an expression matched."""

    text: str
    n_components: int
    n_tensors: int
    n_elements: int
    n_bytes: int
    layers: tuple[int, ...]
    """Layers (0-based) in which it matched."""


def known_names(anatomy: Anatomy) -> list[str]:
    """Every name that may stand in an expression over `anatomy`: its parts, its cuts, then the groups."""
    held: tuple[Held, ...] = (*anatomy.components, *anatomy.cuts)
    parts = dict.fromkeys(name for h in held for name, _ in h.path)
    return [*parts, *(g for g in GROUPS if g not in parts)]


class Resolver:
    """Resolves the leaves of one expression against one anatomy, and combines them."""

    def __init__(self, anatomy: Anatomy, expression: str) -> None:
        self.anatomy, self.expression = anatomy, expression
        self.matches: list[Match] = []
        self.pulled_in: list[tuple[str, str]] = []
        """(part that was named, part that learns with it because they are tied)."""
        self.parts = {name for c in anatomy.components for name, _ in c.path}
        self.cuts = {cut.path[-1][0] for cut in anatomy.cuts}
        self.position = {t.name: i for i, t in enumerate(anatomy.tensors)}
        # what is not the decoder's (`other`) learns only when it is named
        own = (c for c in anatomy.components if not c.is_other)
        self.learnable = tuple(s for c in own for s in c.slices if anatomy.learnable(s))
        self.counts = _counts(anatomy)
        self.fits_found: dict[str, list[Held]] = {}
        self.name_found: dict[frozenset[str], Sequence[Held]] = {}

    def order(self, piece: Slice) -> tuple[int, tuple[int, ...]]:
        """Where a slice stands in the model, for sorting."""
        return self.position[piece.tensor], tuple(ranges[0].start for ranges in piece.index)

    def error(self, message: str, column: int) -> SelectionError:
        """An error that points at a column of the expression."""
        return SelectionError(message, expression=self.expression, column=column)

    def resolve(self, tree: Expr) -> Slices:
        """The disjoint slices that an expression names; tied storage under the name that was used."""
        chain: list[Binary] = []  # a row of terms is walked, not descended: it may be long
        while isinstance(tree, Binary):
            chain.append(tree)
            tree = tree.left
        if isinstance(tree, Complement):
            value = subtract_all(self.learnable, self.resolve(tree.operand))
        else:
            value = self.leaf(tree)
        for node in reversed(chain):
            value = self.combine(node, value, self.resolve(node.right))
        return value

    def combine(self, node: Binary, left: Slices, right: Slices) -> Slices:
        """What `left op right` selects."""
        if node.op == "|":
            return (*left, *subtract_all(right, left))
        if node.op == "&":
            both = intersect_all(left, right)
            if not both:
                raise self.error("the two sides of this '&' have nothing in common", node.column)
            return both
        if not intersect_all(left, right):
            raise self.error("this '-' removes nothing: its two sides have nothing in common", node.column)
        return subtract_all(left, right)

    def leaf(self, leaf: Leaf) -> Slices:
        """What a path or a raw name selects; records a `Match`."""
        found = self.known(leaf)
        slices = tuple(s for s in found if self.anatomy.learnable(s))
        if not slices:
            raise self.error(f"'{leaf.text}' {self.why_nothing_learns(found)}", leaf.column)
        slices = tuple(dict.fromkeys(slices))
        owners = self.owners(slices)
        stored = self.stored(slices)
        self.matches.append(
            Match(
                text=leaf.text,
                n_components=len(owners),
                n_tensors=len({s.tensor for s in slices}),
                n_elements=sum(s.n_elements for s in stored),
                n_bytes=sum(s.n_elements * self.anatomy.tensor[s.tensor].element_bytes for s in stored),
                layers=layers_of(owners),
            )
        )
        return slices

    def known(self, leaf: Leaf) -> Slices:
        """The slices that a leaf names. Raises `SelectionError` for one that the model alone does not decide."""
        if isinstance(leaf, Param):
            return self.named(leaf)
        if isinstance(leaf, Esft):
            raise self.error(f"'{leaf.text}' names a file, and files are not read here: name its experts", leaf.column)
        return self.path(leaf)

    def owners(self, slices: Slices) -> list[Component]:
        """The components that hold something of the slices."""
        whole, near = set(slices), Neighbours(slices)
        return [
            c
            for c in self.anatomy.components
            if any(s in whole or any(intersect(s, t) for t in near.of(s)) for s in c.slices)
        ]

    def stored(self, slices: Slices) -> list[Slice]:
        """The slices with tied storage counted once."""
        return list({(self.anatomy.storage_name(s.tensor), s.index): s for s in slices}.values())

    def why_nothing_learns(self, slices: Slices) -> str:
        """Why a leaf that matched these slices leaves nothing to learn."""
        if any(self.anatomy.tensor[s.tensor].is_quantised for s in slices if s.tensor not in self.anatomy.ties):
            parameters = [s for s in slices if self.anatomy.tensor[s.tensor].kind == "parameter"]
            if parameters:
                dtype = self.anatomy.tensor[parameters[0].tensor].dtype
                return f"holds quantised weights ({dtype}), which cannot learn: train an adapter, or load unquantised"
        return "holds only buffers, and buffers never learn" if slices else "matches no part of this model"

    # --- raw names

    def named(self, leaf: Param) -> Slices:
        """Every slice of the tensors whose names match a pattern."""
        found = tuple(s for c in self.anatomy.components for s in c.slices if fnmatchcase(s.tensor, leaf.pattern))
        if not found:
            near = did_you_mean(leaf.pattern, [t.name for t in self.anatomy.tensors])
            message = f"no tensor of this model has a name like '{leaf.pattern}'.{near}"
            raise self.error(f"{message} `frostline parts` lists the names.", leaf.pattern_column)
        return found

    # --- paths

    def path(self, path: Path) -> Slices:
        """Everything in the components that a path names, buffers included."""
        group = self.group_of(path)
        segments = path.segments[:-1] if group else path.segments
        self.check_names(segments)
        self.check_cuts(path)
        self.check_indices(segments)
        self.check_every_choice(path, segments, group)
        return tuple(self.matched(segments, group))

    def matched(self, segments: tuple[PathSegment, ...], group: Group | None) -> list[Slice]:
        """The slices of what fits that are in the group."""
        found: list[Slice] = []
        for held in self.fitting(segments):
            if isinstance(held, Cut):
                found += held.members(self.members(held, segments[-1]))
            else:
                found += (s for s in held.slices if group is None or group(self.anatomy, held, s))
        return found

    def members(self, cut: Cut, segment: PathSegment) -> Iterable[int]:
        """The members of a cut that the last step of a path chooses."""
        if segment.items is None:
            return range(cut.n)
        return (i for item in segment.items if in_range(item, cut.n) for i in chosen(item, cut.n))

    def fitting(self, segments: tuple[PathSegment, ...]) -> list[Held]:
        """The components and cuts that fit; remembered, because every check of a leaf asks again."""
        text = ".".join(map(_text, segments))
        if text not in self.fits_found:
            candidates = self.by_names(frozenset(segments[-1].names)) if segments else self.anatomy.components
            self.fits_found[text] = [held for held in candidates if self.fits(held, segments)]
        return self.fits_found[text]

    def by_names(self, names: frozenset[str]) -> Sequence[Held]:
        """The components of whose path one of `names` is a step, and the cuts that end with one."""
        if names not in self.name_found:
            components = [c for c in self.anatomy.components if any(name in names for name, _ in c.path)]
            self.name_found[names] = [*components, *(c for c in self.anatomy.cuts if c.path[-1][0] in names)]
        return self.name_found[names]

    def group_of(self, path: Path) -> Group | None:
        """The group that a path's last step names, unless a part of this model has that name."""
        last = path.segments[-1]
        if len(last.names) != 1 or last.names[0] in self.parts or last.names[0] not in GROUPS:
            return None
        if last.items is not None:
            raise self.error(f"'{last.names[0]}' is a group and takes no index", last.items[0].column)
        return GROUPS[last.names[0]]

    def fits(self, held: Held, segments: tuple[PathSegment, ...]) -> bool:
        """Whether a name contains the segments in a row; a cut's name must end with them."""
        path = held.path
        last = len(path) - len(segments)
        starts = range(last + 1) if isinstance(held, Component) else range(max(last, 0), last + 1)
        return any(all(self.step_fits(path, at + k, segment) for k, segment in enumerate(segments)) for at in starts)

    def step_fits(self, path: tuple[Segment, ...], at: int, segment: PathSegment) -> bool:
        """Whether one step of a name is what one step of a path says."""
        name, index = path[at]
        if name not in segment.names:
            return False
        if segment.items is None:
            return True
        n = self.counts.get((path[:at], name))
        if n is None:
            return False
        return any(in_range(i, n) and (index is None or index in chosen(i, n)) for i in segment.items)

    # --- errors that help

    def check_names(self, segments: tuple[PathSegment, ...]) -> None:
        """Every name must be a part or a cut of this model."""
        for k, segment in enumerate(segments):
            for name, column in zip(segment.names, segment.columns, strict=True):
                if name in self.parts or name in self.cuts:
                    continue
                if name in GROUPS:
                    raise self.error(f"the group '{name}' can only stand alone or at the end of a path", column)
                if k and self.fitting(segments[:k]):
                    raise self.no_part_inside(name, segments[:k], column)
                known = known_names(self.anatomy)
                near = did_you_mean(name, known)
                listed = "" if near else f" Known parts: {', '.join(known)}."
                raise self.error(f"this model has no part '{name}'.{near}{listed}", column)

    def no_part_inside(self, name: str, segments: tuple[PathSegment, ...], column: int) -> SelectionError:
        """That what `segments` name has no part of that name, and which it has."""
        inside = self.names_after(segments)
        before = ".".join(map(_text, segments))
        hint = did_you_mean(name, inside) + (f" It has: {', '.join(inside)}." if inside else "")
        return self.error(f"'{before}' has no part '{name}' directly inside.{hint}", column)

    def check_cuts(self, path: Path) -> None:
        """A cut divides several parts at once: nothing can follow it, and it stands alone in its step."""
        for k, segment in enumerate(path.segments):
            cut = next((name for name in segment.names if name in self.cuts - self.parts), None)
            if cut is None:
                continue
            if len(segment.names) > 1:
                message = f"'{cut}' cannot stand in braces with others: join them with '|'"
                raise self.error(message, segment.columns[segment.names.index(cut)])
            if k < len(path.segments) - 1:
                follows = path.segments[k + 1]
                here = ".".join(map(_text, path.segments[: k + 1]))
                before = ".".join(map(_text, path.segments[:k]))
                is_group = k == len(path.segments) - 2 and follows.names[0] in set(GROUPS) - self.parts
                part = follows.names[0] if is_group else ".".join(filter(None, (before, _text(follows))))
                raise self.error(
                    f"nothing can follow '{cut}', which divides several parts at once: write '{here} & {part}'",
                    follows.columns[0],
                )

    def check_indices(self, segments: tuple[PathSegment, ...]) -> None:
        """Every index must exist somewhere."""
        for segment in segments:
            for item in segment.items or ():
                if isinstance(item.value, Ranked):
                    raise self.error(_not_measured(f"{segment.names[0]}[{item.text}]"), item.column)
                counts = {n for (_, name), n in self.counts.items() if name in segment.names}
                if not counts:
                    raise self.error(f"'{segment.names[0]}' takes no index", item.column)
                if not any(in_range(item, n) for n in counts):
                    n = max(counts)
                    raise self.error(
                        f"{segment.names[0]}[{item.text}] is out of range: there are {n}, 0 to {n - 1}",
                        item.column,
                    )

    def check_every_choice(self, path: Path, segments: tuple[PathSegment, ...], group: Group | None) -> None:
        """Every name in braces, and every index where it stands, must lead somewhere by itself."""
        for k, segment in enumerate(segments):
            for name, column in zip(segment.names, segment.columns, strict=True):
                self.check_name(path, k, PathSegment((name,), (column,), segment.items), group)
            for item in segment.items or ():
                alone = PathSegment(segment.names, segment.columns, (item,))
                everywhere = (*segments[:k], PathSegment(segment.names, segment.columns, None))
                short = [c for c in self.fitting(everywhere) if isinstance(c, Cut) and not in_range(item, c.n)]
                if short:  # unlike layers, heads and neurons of every layer that is named must exist
                    message = f"{short[0].name}[{item.text}] is out of range: there are {short[0].n}"
                    raise self.error(message, item.column)
                if not self.fitting((*segments[:k], alone)):
                    place = ".".join(map(_text, segments[:k])) or "this model"
                    raise self.error(f"{segment.names[0]}[{item.text}] is out of range in {place}", item.column)
        if not self.matched(segments, group):
            raise self.error(f"'{path.text}' matches no part of this model", path.column)

    def check_name(self, path: Path, k: int, alone: PathSegment, group: Group | None) -> None:
        """One name of step `k`: after what stands before it, and, among several in braces, with what follows."""
        segments = path.segments[:-1] if group else path.segments
        (name,), (column,) = alone.names, alone.columns
        if not self.fitting((*segments[:k], PathSegment(alone.names, alone.columns, None))):
            if not k:
                raise self.error(f"'{name}' matches nothing that could learn", column)
            raise self.no_part_inside(name, segments[:k], column)
        if len(segments[k].names) == 1 or self.matched((*segments[:k], alone, *segments[k + 1 :]), group):
            return  # what follows a single name is reported when its turn comes
        if alone.items and not self.fitting((*segments[:k], alone)):
            raise self.error(f"'{name}' cannot take this index", column)
        follows = ".".join(map(_text, path.segments[k + 1 :]))
        raise self.error(f"'{name}' has nothing that fits '{follows}'", column)

    def names_after(self, segments: tuple[PathSegment, ...]) -> list[str]:
        """The names that stand directly after `segments` in the name of some part or cut."""
        out: dict[str, None] = {}
        named: tuple[Held, ...] = (*self.anatomy.components, *self.anatomy.cuts)
        for held in named:
            for at in range(len(held.path) - len(segments)):
                if all(self.step_fits(held.path, at + k, s) for k, s in enumerate(segments)):
                    out[held.path[at + len(segments)][0]] = None
        return list(out)

    # --- ties

    def with_ties(self, named: Slices, ties: Ties) -> Slices:
        """Selected storage, each tied pair checked: both names or neither."""
        aliases = self.anatomy.ties
        own = tuple(s for s in named if s.tensor not in aliases)
        for alias, source in aliases.items():
            as_source = tuple(Slice(source, s.index) for s in named if s.tensor == alias)
            of_source = tuple(s for s in own if s.tensor == source)
            lacking = subtract_all(as_source, of_source)
            extra = subtract_all(of_source, as_source)
            if lacking or extra:
                one, other = (alias, source) if lacking else (source, alias)
                if ties == "error":
                    raise self.tie_error(one, other, source, partly=(lacking or extra) != self.whole_of(source))
                self.pulled_in.append((self.component_of(one), self.component_of(other)))
            own = (*own, *lacking)
        return own

    def component_of(self, tensor: str) -> str:
        """The name of a component that holds something of a tensor."""
        return next(c.name for c in self.anatomy.components if any(s.tensor == tensor for s in c.slices))

    def whole_of(self, tensor: str) -> Slices:
        """A tensor as the slice that holds all of it."""
        return (whole(tensor, self.anatomy.tensor[tensor].shape),)

    def tie_error(self, one: str, other: str, source: str, *, partly: bool) -> SelectionError:
        """That one of two tied tensors was selected without the other."""
        taken, lacking = self.component_of(one), self.component_of(other)
        column = max(self.expression.find(taken), 0)
        both = f"the same of '{lacking}' too" if partly else f"both ('{taken} | {lacking}')"
        return self.error(
            f"'{taken}' and '{lacking}' are tied (one tensor, {source}), and this selects '{taken}' without "
            f"'{lacking}'.\n"
            f"  Select {both} or neither, or set `ties: together` to let both learn,\n"
            f"  or `ties: untie` to give each weights of its own first.",
            column,
        )


def layers_of(components: Iterable[Component]) -> tuple[int, ...]:
    """The layers (0-based) that the components stand in."""
    paths = (c.path[0] for c in components)
    return tuple(dict.fromkeys(i for name, i in paths if name == "layers" and i is not None))


def _in_attention(component: Component, *parts: str) -> bool:
    path = component.path
    return any(name == "attn" and path[i + 1][0] in parts for i, (name, _) in enumerate(path[:-1]))


def _text(segment: PathSegment) -> str:
    return segment.text


def _not_measured(text: str) -> str:
    return (
        f"'{text}' depends on which experts a text uses, and nothing was measured.\n"
        "  `frostline select MODEL EXPRESSION --data FILE` measures it and prints the experts by number;\n"
        "  `frostline train` measures it on the training data when it starts."
    )


def in_range(item: Item, n: int) -> bool:
    """Whether an index, or both ends of a range, exist among `n`; ranges must not be empty."""
    assert not isinstance(item.value, Ranked)
    if isinstance(item.value, int):
        return -n <= item.value < n
    ends = [e for e in (item.value.start, item.value.stop) if e is not None]
    return all(-n <= e <= n for e in ends) and len(chosen(item, n)) > 0


def chosen(item: Item, n: int) -> range:
    """The indices that an item means among `n`."""
    assert not isinstance(item.value, Ranked)
    if isinstance(item.value, int):
        at = item.value % n
        return range(at, at + 1)
    return range(*item.value.indices(n))


def _counts(anatomy: Anatomy) -> dict[tuple[tuple[Segment, ...], str], int]:
    """(path of the parent, name) → how many such parts it has, for every part or cut with an index."""
    counts: dict[tuple[tuple[Segment, ...], str], int] = {}
    for c in anatomy.components:
        for at, (name, index) in enumerate(c.path):
            if index is not None:
                key = (c.path[:at], name)
                counts[key] = max(counts.get(key, 0), index + 1)
    return counts | {(cut.path[:-1], cut.path[-1][0]): cut.n for cut in anatomy.cuts}
