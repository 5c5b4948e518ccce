"""Selections: an expression over one anatomy → an immutable set of parameter slices.

`select` parses, resolves and checks ties. Every leaf must match something, an empty result is an error, and so is a
`-` that removes nothing. Selections range over parameters: buffers never learn. Read `select`, then `Selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from frostline.anatomy import Anatomy, Component, Slice, families, intersect_all, slice_to_json, subtract_all
from frostline.errors import SelectionError, did_you_mean
from frostline.selection.grammar import Binary, Complement, Expr, Item, Path, PathSegment, parse
from frostline.units import format_count, format_share

Slices = tuple[Slice, ...]
Ties = Literal["error", "together"]
Group = Callable[[Anatomy, Component, Slice], bool]

GROUPS: dict[str, Group] = {
    "all": lambda _a, c, _s: not c.is_other,
    "norm": lambda _a, c, _s: c.is_norm,
    "bias": lambda a, _c, s: a.is_bias(s),
    "mixer": lambda _a, c, _s: any(name in families.MIXERS for name, _ in c.path),
    "qk": lambda _a, c, _s: c.path[-2:][0][0] == "attn" and c.path[-1][0] in ("q", "k"),
    "vo": lambda _a, c, _s: c.path[-2:][0][0] == "attn" and c.path[-1][0] in ("v", "o"),
}
"""Names in expressions that are no components: which slices of which components belong to each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What one leaf of an expression matched."""

    text: str
    n_components: int
    n_tensors: int
    n_elements: int
    layers: tuple[int, ...]
    """Layers (0-based) in which it matched."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """An immutable set of parameter slices of one anatomy, with the expression it came from."""

    expression: str
    anatomy: Anatomy
    slices: Slices
    """Disjoint, in the anatomy's order; tied storage under the name that owns it."""
    matches: tuple[Match, ...]
    """What each leaf matched, in the order of the expression."""

    @property
    def n_elements(self) -> int:
        """Parameters selected."""
        return sum(s.n_elements for s in self.slices)

    @property
    def n_tensors(self) -> int:
        """Tensors of which something is selected."""
        return len({s.tensor for s in self.slices})

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers (0-based) of which something is selected."""
        return _layers(c for c, _ in self.by_component())

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
        return intersect_all((piece,), self._by_tensor.get(piece.tensor, ()))

    @cached_property
    def _whole(self) -> frozenset[Slice]:
        return frozenset(self.slices)

    @cached_property
    def _by_tensor(self) -> dict[str, Slices]:
        out: dict[str, Slices] = {}
        for s in self.slices:
            out[s.tensor] = (*out.get(s.tensor, ()), s)
        return out

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
    resolver = _Resolver(anatomy, expression)
    named = resolver.resolve(tree)
    if not named:
        raise resolver.error("this selects nothing", 0)
    slices = resolver.with_ties(named, ties)
    in_order = sorted(slices, key=resolver.order)
    return Selection(expression=expression, anatomy=anatomy, slices=tuple(in_order), matches=tuple(resolver.matches))


def known_names(anatomy: Anatomy) -> list[str]:
    """Every name that may stand in an expression over `anatomy`: its parts, then the groups."""
    parts = dict.fromkeys(name for c in anatomy.components for name, _ in c.path)
    return [*parts, *(g for g in GROUPS if g not in parts)]


def _layers(components: Iterator[Component]) -> tuple[int, ...]:
    paths = (c.path[0] for c in components)
    return tuple(dict.fromkeys(i for name, i in paths if name == "layers" and i is not None))


class _Resolver:
    """Resolves the leaves of one expression against one anatomy, and combines them."""

    def __init__(self, anatomy: Anatomy, expression: str) -> None:
        self.anatomy, self.expression = anatomy, expression
        self.matches: list[Match] = []
        self.parts = {name for c in anatomy.components for name, _ in c.path}
        self.position = {t.name: i for i, t in enumerate(anatomy.tensors)}
        # what is not the decoder's (`other`) learns only when it is named
        own = (c for c in anatomy.components if not c.is_other)
        self.learnable = tuple(s for c in own for s in c.slices if anatomy.learnable(s))
        self.counts = _counts(anatomy)
        self.fits_found: dict[str, list[Component]] = {}
        self.name_found: dict[frozenset[str], Sequence[Component]] = {}

    def order(self, piece: Slice) -> tuple[int, tuple[int, ...]]:
        return self.position[piece.tensor], tuple(ranges[0].start for ranges in piece.index)

    def error(self, message: str, column: int) -> SelectionError:
        return SelectionError(message, expression=self.expression, column=column)

    def resolve(self, tree: Expr) -> Slices:
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

    def leaf(self, path: Path) -> Slices:
        group = self.group_of(path)
        segments = path.segments[:-1] if group else path.segments
        self.check_names(segments)
        self.check_indices(segments)
        self.check_every_choice(path, segments, group)
        pairs = self.matched(segments, group)
        slices = tuple(s for _, s in pairs if self.anatomy.learnable(s))
        if not slices:
            raise self.error(f"'{path.text}' {self.why_nothing_learns([s for _, s in pairs])}", path.column)
        owners = dict.fromkeys(c.name for c, s in pairs if self.anatomy.learnable(s))
        self.matches.append(
            Match(
                text=path.text,
                n_components=len(owners),
                n_tensors=len({s.tensor for s in slices}),
                n_elements=self.n_stored(slices),
                layers=_layers(self.anatomy.component[name] for name in owners),
            )
        )
        return slices

    def why_nothing_learns(self, slices: list[Slice]) -> str:
        """Why a leaf that matched these slices leaves nothing to learn."""
        if any(self.anatomy.tensor[s.tensor].is_quantised for s in slices if s.tensor not in self.anatomy.ties):
            parameters = [s for s in slices if self.anatomy.tensor[s.tensor].kind == "parameter"]
            if parameters:
                dtype = self.anatomy.tensor[parameters[0].tensor].dtype
                return f"holds quantised weights ({dtype}), which cannot learn: train an adapter, or load unquantised"
        return "holds only buffers, and buffers never learn" if slices else "matches no part of this model"

    def matched(self, segments: tuple[PathSegment, ...], group: Group | None) -> list[tuple[Component, Slice]]:
        """The components that fit, with their slices that are in the group."""
        found = self.fitting(segments)
        return [(c, s) for c in found for s in c.slices if group is None or group(self.anatomy, c, s)]

    def fitting(self, segments: tuple[PathSegment, ...]) -> list[Component]:
        """The components that fit; remembered, because every check of a leaf asks again."""
        text = ".".join(map(_text, segments))
        if text not in self.fits_found:
            candidates = self.by_names(frozenset(segments[-1].names)) if segments else self.anatomy.components
            self.fits_found[text] = [c for c in candidates if self.fits(c, segments)]
        return self.fits_found[text]

    def by_names(self, names: frozenset[str]) -> Sequence[Component]:
        """The components of whose path one of `names` is a step."""
        if names not in self.name_found:
            found = [c for c in self.anatomy.components if any(name in names for name, _ in c.path)]
            self.name_found[names] = found
        return self.name_found[names]

    def n_stored(self, slices: Slices) -> int:
        """Elements of slices, tied storage counted once."""
        stored = {(self.anatomy.storage_name(s.tensor), s.index): s.n_elements for s in slices}
        return sum(stored.values())

    def group_of(self, path: Path) -> Group | None:
        """The group that a path's last step names, unless a part of this model has that name."""
        last = path.segments[-1]
        if len(last.names) != 1 or last.names[0] in self.parts or last.names[0] not in GROUPS:
            return None
        if last.items is not None:
            raise self.error(f"'{last.names[0]}' is a group and takes no index", last.items[0].column)
        return GROUPS[last.names[0]]

    def check_names(self, segments: tuple[PathSegment, ...]) -> None:
        for segment in segments:
            for name, column in zip(segment.names, segment.columns, strict=True):
                if name in self.parts:
                    continue
                if name in GROUPS:
                    raise self.error(f"the group '{name}' can only stand alone or at the end of a path", column)
                known = known_names(self.anatomy)
                near = did_you_mean(name, known)
                listed = "" if near else f" Known parts: {', '.join(known)}."
                raise self.error(f"this model has no part '{name}'.{near}{listed}", column)

    def check_indices(self, segments: tuple[PathSegment, ...]) -> None:
        for segment in segments:
            for item in segment.items or ():
                counts = {n for (_, name), n in self.counts.items() if name in segment.names}
                if not counts:
                    raise self.error(f"'{segment.names[0]}' takes no index", item.column)
                if not any(in_range(item, n) for n in counts):
                    n = max(counts)
                    raise self.error(
                        f"{segment.names[0]}[{item.text}] is out of range: there are {n}, 0 to {n - 1}",
                        item.column,
                    )

    def fits(self, component: Component, segments: tuple[PathSegment, ...]) -> bool:
        """Whether the component's name contains the segments in a row."""
        path, n = component.path, len(segments)
        return any(
            all(self.step_fits(path, at + k, segment) for k, segment in enumerate(segments))
            for at in range(len(path) - n + 1)
        )

    def step_fits(self, path: tuple[tuple[str, int | None], ...], at: int, segment: PathSegment) -> bool:
        name, index = path[at]
        if name not in segment.names:
            return False
        if segment.items is None:
            return True
        n = self.counts.get((path[:at], name))
        return n is not None and any(in_range(i, n) and index in chosen(i, n) for i in segment.items)

    def check_every_choice(self, path: Path, segments: tuple[PathSegment, ...], group: Group | None) -> None:
        """Every name in braces, and every index where it stands, must lead somewhere by itself."""
        for k, segment in enumerate(segments):
            for name, column in zip(segment.names, segment.columns, strict=True):
                self.check_name(path, k, PathSegment((name,), (column,), segment.items), group)
            for item in segment.items or ():
                alone = PathSegment(segment.names, segment.columns, (item,))
                if not self.matched((*segments[:k], alone), None):
                    place = ".".join(map(_text, segments[:k])) or "this model"
                    raise self.error(f"{segment.names[0]}[{item.text}] is out of range in {place}", item.column)
        if not self.matched(segments, group):
            raise self.error(f"'{path.text}' matches no part of this model", path.column)

    def check_name(self, path: Path, k: int, alone: PathSegment, group: Group | None) -> None:
        """One name of step `k`: after what stands before it, and, among several in braces, with what follows."""
        segments = path.segments[:-1] if group else path.segments
        (name,), (column,) = alone.names, alone.columns
        before = ".".join("|".join(s.names) for s in segments[:k])
        if not self.matched((*segments[:k], PathSegment(alone.names, alone.columns, None)), None):
            inside = self.names_after(segments[:k])
            hint = did_you_mean(name, inside) or (f" It has: {', '.join(inside)}." if inside else "")
            if not before:
                raise self.error(f"'{name}' matches nothing that could learn", column)
            raise self.error(f"'{before}' has no part '{name}' directly inside.{hint}", column)
        if len(segments[k].names) == 1 or self.matched((*segments[:k], alone, *segments[k + 1 :]), group):
            return  # what follows a single name is reported when its turn comes
        if alone.items and not self.matched((*segments[:k], alone), None):
            raise self.error(f"'{name}' cannot take this index", column)
        follows = ".".join(map(_text, path.segments[k + 1 :]))
        raise self.error(f"'{name}' has nothing that fits '{follows}'", column)

    def names_after(self, segments: tuple[PathSegment, ...]) -> list[str]:
        """The names that stand directly after `segments` in some component's name."""
        out: dict[str, None] = {}
        for c in self.anatomy.components:
            for at in range(len(c.path) - len(segments)):
                if all(self.step_fits(c.path, at + k, s) for k, s in enumerate(segments)):
                    out[c.path[at + len(segments)][0]] = None
        return list(out)

    def with_ties(self, named: Slices, ties: Ties) -> Slices:
        """Selected storage, each tied pair checked: both names or neither."""
        aliases = self.anatomy.ties
        own = tuple(s for s in named if s.tensor not in aliases)
        for alias, source in aliases.items():
            as_source = tuple(Slice(source, s.index) for s in named if s.tensor == alias)
            of_source = tuple(s for s in own if s.tensor == source)
            lacking = subtract_all(as_source, of_source)
            extra = subtract_all(of_source, as_source)
            if (lacking or extra) and ties == "error":
                raise self.tie_error(alias, source, alias_only=bool(lacking))
            own = (*own, *lacking)
        return own

    def tie_error(self, alias: str, source: str, *, alias_only: bool) -> SelectionError:
        names = {s.tensor: c.name for c in self.anatomy.components for s in c.slices}
        taken, other = (names[alias], names[source]) if alias_only else (names[source], names[alias])
        column = max(self.expression.find(taken), 0)
        return self.error(
            f"'{taken}' and '{other}' are tied (one tensor, {source}), and this selects '{taken}' without '{other}'.\n"
            f"  Select both ('{taken} | {other}') or neither, or set `ties: together` to let both learn,\n"
            f"  or `ties: untie` to give each weights of its own first.",
            column,
        )


def _text(segment: PathSegment) -> str:
    names = segment.names[0] if len(segment.names) == 1 else "{" + ",".join(segment.names) + "}"
    return names + (f"[{','.join(i.text for i in segment.items)}]" if segment.items else "")


def in_range(item: Item, n: int) -> bool:
    """Whether an index, or both ends of a range, exist among `n`; ranges must not be empty."""
    if isinstance(item.value, int):
        return -n <= item.value < n
    ends = [e for e in (item.value.start, item.value.stop) if e is not None]
    return all(-n <= e <= n for e in ends) and len(chosen(item, n)) > 0


def chosen(item: Item, n: int) -> range:
    """The indices that an item means among `n`."""
    if isinstance(item.value, int):
        at = item.value % n
        return range(at, at + 1)
    return range(*item.value.indices(n))


def _counts(anatomy: Anatomy) -> dict[tuple[tuple[tuple[str, int | None], ...], str], int]:
    """(path of the parent, name) → how many such parts it has, for every part with an index."""
    counts: dict[tuple[tuple[tuple[str, int | None], ...], str], int] = {}
    for c in anatomy.components:
        for at, (name, index) in enumerate(c.path):
            if index is not None:
                key = (c.path[:at], name)
                counts[key] = max(counts.get(key, 0), index + 1)
    return counts


def selection_to_json(selection: Selection) -> dict[str, Any]:
    """The selection as plain data: what each leaf matched, and the slices per component."""
    return {
        "expression": selection.expression,
        "n_elements": selection.n_elements,
        "n_tensors": selection.n_tensors,
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
