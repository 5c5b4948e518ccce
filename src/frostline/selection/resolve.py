"""From a syntax tree to slices: what each leaf matches in one anatomy, and how leaves combine.

A leaf must match something, and so must every name and every index in it (`path_checks.py`); a `-` that removes
nothing and an `&` of nothing are errors. Errors point at the column. Read `Resolver.resolve` first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from frostline.anatomy import Anatomy, Component, Neighbours, Slice, intersect, intersect_all, subtract_all
from frostline.errors import SelectionError, did_you_mean
from frostline.selection.grammar import Binary, Complement, Esft, Expr, Leaf, Param, Path
from frostline.selection.names import Names
from frostline.selection.path_checks import PathCheck

Slices = tuple[Slice, ...]


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


class Resolver:
    """Resolves the leaves of one expression against one anatomy, and combines them."""

    def __init__(self, anatomy: Anatomy, expression: str) -> None:
        self.anatomy, self.expression = anatomy, expression
        self.names = Names(anatomy)
        self.matches: list[Match] = []
        # what is not the decoder's (`other`) learns only when it is named
        own = (c for c in anatomy.components if not c.is_other)
        self.learnable = tuple(s for c in own for s in c.slices if anatomy.learnable(s))
        self._position = {t.name: i for i, t in enumerate(anatomy.tensors)}

    def order(self, piece: Slice) -> tuple[int, tuple[int, ...]]:
        """Where a slice stands in the model, for sorting."""
        return self._position[piece.tensor], tuple(ranges[0].start for ranges in piece.index)

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

    def named(self, leaf: Param) -> Slices:
        """Every slice of the tensors whose names match a pattern."""
        found = tuple(s for c in self.anatomy.components for s in c.slices if fnmatchcase(s.tensor, leaf.pattern))
        if not found:
            near = did_you_mean(leaf.pattern, [t.name for t in self.anatomy.tensors])
            message = f"no tensor of this model has a name like '{leaf.pattern}'.{near}"
            raise self.error(f"{message} `frostline parts` lists the names.", leaf.pattern_column)
        return found

    def path(self, path: Path) -> Slices:
        """Everything in the components that a path names, buffers included."""
        PathCheck(path, self.names, self.error).check()
        return tuple(self.names.matched(*self.names.split(path)))


def layers_of(components: Iterable[Component]) -> tuple[int, ...]:
    """The layers (0-based) that the components stand in."""
    paths = (c.path[0] for c in components)
    return tuple(dict.fromkeys(i for name, i in paths if name == "layers" and i is not None))
