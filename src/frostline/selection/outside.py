"""Selections that the model alone does not decide: experts ranked by use, experts that a file names.

`plain` writes such an expression as one that names every expert by its number, from scores and files that are passed
in; nothing is measured or read here. Read `plain` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from frostline.anatomy import Anatomy
from frostline.selection.grammar import Binary, Complement, Esft, Expr, Item, Leaf, Path, Ranked, parse
from frostline.selection.resolve import Resolver

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""`tokens` or `gate` → layer's part, such as `layers[3].ffn` → the share that each expert has; shares sum to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What an expression needs to know beside the model."""

    scores: tuple[str, ...]
    """Rankings: `tokens`, `gate`."""
    files: tuple[str, ...]
    """Expert configurations of ESFT."""

    def __bool__(self) -> bool:
        return bool(self.scores or self.files)


def needs(expression: str) -> Needs:
    """What `expression` needs to know beside the model. Raises `SelectionError` for what does not parse."""
    leaves = list(_leaves(parse(expression)))
    ranked = [item.value for leaf in leaves if isinstance(leaf, Path) for _, item in _ranked(leaf)]
    return Needs(
        scores=tuple(dict.fromkeys(r.by for r in ranked if isinstance(r, Ranked))),
        files=tuple(dict.fromkeys(leaf.path for leaf in leaves if isinstance(leaf, Esft))),
    )


def plain(
    anatomy: Anatomy, expression: str, *, scores: Scores | None = None, files: Mapping[str, str] | None = None
) -> str:
    """`expression` with every ranking, and every file, written as the experts it means in `anatomy`.

    `files`: file as written → what it selects, plainly. What has no `scores` or no entry in `files` stays as it is, and
    cannot be resolved. Raises `SelectionError` with the column.
    """
    out, tree = expression, parse(expression)
    for leaf in sorted(_leaves(tree), key=lambda leaf: -leaf.column):
        if isinstance(leaf, Esft) and files is not None and leaf.path in files:
            meaning = files[leaf.path]
        elif isinstance(leaf, Path) and scores is not None and any(_ranked(leaf)):
            meaning = " | ".join(_members(anatomy, expression, leaf, scores))
        else:
            continue
        out = f"{out[: leaf.column]}({meaning}){out[leaf.column + len(leaf.text) :]}"
    return out


def _leaves(tree: Expr) -> Iterator[Leaf]:
    todo: list[Expr] = [tree]
    while todo:
        node = todo.pop()
        match node:
            case Binary():
                todo += [node.right, node.left]
            case Complement():
                todo.append(node.operand)
            case _:
                yield node


def _ranked(leaf: Path) -> Iterator[tuple[int, Item]]:
    """The steps of a path that rank experts, with the item that says how."""
    for k, segment in enumerate(leaf.segments):
        for item in segment.items or ():
            if isinstance(item.value, Ranked):
                yield k, item


def _members(anatomy: Anatomy, expression: str, leaf: Path, scores: Scores) -> Iterator[str]:
    """Every layer's chosen experts as plain paths."""
    k, item = next(_ranked(leaf))
    ranked = item.value
    assert isinstance(ranked, Ranked)
    resolver = Resolver(anatomy, expression)
    bare = replace(leaf.segments[k], items=None)
    found = resolver.owners(resolver.leaf(replace(leaf, segments=(*leaf.segments[:k], bare, *leaf.segments[k + 1 :]))))
    rest = "".join(f".{s.text}" for s in leaf.segments[k + 1 :])
    for site in dict.fromkeys(c.name.partition(".experts[")[0] for c in found):
        shares = scores[ranked.by].get(site)
        if shares is None:
            raise resolver.error(f"the use of {site}.experts was not measured", item.column)
        if ranked.amount > len(shares):
            message = f"top {ranked.amount}: {site} has {len(shares)} experts; name 1 to {len(shares)}"
            raise resolver.error(message, item.column)
        yield f"{_listed(site, chosen(ranked, shares))}{rest}"


def chosen(ranked: Ranked, shares: Sequence[float]) -> list[int]:
    """The experts of one layer that a ranking chooses, the highest share first, the lower index first among equals."""
    order = sorted(range(len(shares)), key=lambda e: (-shares[e], e))
    if isinstance(ranked.amount, int):
        return order[: ranked.amount]
    total = 0.0
    for n, e in enumerate(order, start=1):
        total += shares[e]
        if total >= ranked.amount - 1e-12:  # shares that sum to 1 up to rounding cover a share of 1
            return order[:n]
    return order


def _listed(site: str, experts: Sequence[int]) -> str:
    return f"{site}.experts[{','.join(map(str, sorted(experts)))}]"


def expression_of(experts: Mapping[str, Sequence[int]]) -> str:
    """Layer's part → its experts, as a plain selection: `layers[0].ffn.experts[1,3] | …`."""
    return " | ".join(_listed(site, numbers) for site, numbers in experts.items())
