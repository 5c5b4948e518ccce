"""Gradient routes: where gradients stop, and which residual connections are left out.

A `Wiring` says where the points of one kind of block lie; `placed` makes them permanent, `set_routes` turns them on and
off at a stage switch. Read `Wiring`, then `set_routes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from frostline.anatomy import Anatomy, BlockProof, find_blocks, module_of, part_modules
from frostline.engine.route_points import SETTINGS, RoutePoint, check_free, make_point
from frostline.errors import RouteError
from frostline.schedule import Route, Stage

MIXERS = ("attn", "linear_attn", "ssm", "conv")
Signature = tuple[tuple[str, str], ...]
"""Parts of a block with the classes of their modules: blocks with the same ones are wired alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """Where the points of one kind of block lie, by the names of its parts."""

    branches: tuple[str, ...]
    """Branches with a module of their own: `{branch}.out` is its output, before any norm after it."""
    residual_argument: Mapping[str, str]
    """Branch whose module adds the residual itself → the name of that argument."""
    skips: Mapping[str, tuple[str, ...]]
    """Skip → the parts through which its branches read the stream, in the order they are called."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Point → why this block does not have it."""

    def without(self, point: str, why: str) -> Wiring:
        """The same, one point refused."""
        branch = point.removesuffix(".out")
        return replace(
            self,
            branches=tuple(b for b in self.branches if b != branch),
            skips={s: readers for s, readers in self.skips.items() if s != point},
            refused={**self.refused, point: why},
        )

    @property
    def points(self) -> tuple[str, ...]:
        """Every point of such a block."""
        inputs = () if "block.in" in self.refused else ("block.in",)
        return (*inputs, *(f"{b}.out" for b in self.branches), *self.skips)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPoints:
    """The points of one block, placed."""

    block: RoutePoint
    parts: Mapping[str, RoutePoint]
    """Branches, and norms that read the stream."""
    wiring: Wiring


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """The points of one model, placed."""

    blocks: tuple[BlockPoints, ...]
    embed: RoutePoint
    tail: nn.Module | None = None
    """Final norm and head as one module, for local losses."""

    def every(self) -> Iterable[RoutePoint]:
        """All modules that are points."""
        yield self.embed
        for b in self.blocks:
            yield b.block
            yield from b.parts.values()


def placed(model: nn.Module, anatomy: Anatomy, wirings: Mapping[Signature, Wiring]) -> Points:
    """The points of a model whose kinds of blocks are wired as given."""
    blocks: list[BlockPoints] = []
    for module in model.modules():  # before any of them is changed
        check_free(module)
    for layer, (_, block) in enumerate(find_blocks(model)):
        modules = part_modules(model, anatomy, layer)
        found = wirings.get(signature_of(modules))
        wiring = found or Wiring(
            branches=(), residual_argument={}, skips={}, refused={"*": "the tiny model has no block of this kind"}
        )
        needed = [*wiring.branches, *(r for readers in wiring.skips.values() for r in readers)]
        parts = {name: make_point(modules[name]) for name in dict.fromkeys(needed)}
        for name, argument in wiring.residual_argument.items():
            parts[name].residual_argument = argument
        blocks.append(BlockPoints(block=make_point(block), parts=parts, wiring=wiring))
    return Points(blocks=tuple(blocks), embed=make_point(module_of(model, anatomy, "embed")))


def set_routes(points: Points, routes: Sequence[Route]) -> None:
    """Exactly these routes are in force afterwards. Only at a stage switch, after `requires_grad` is set.

    Raises `RouteError` for a point that a layer does not have; then nothing has changed.
    """
    todo: list[tuple[RoutePoint, dict[str, Any]]] = []
    for route in routes:
        if route.point == "embed.out":
            todo.append((points.embed, {"stop_output": True}))
        for layer in route.layers:
            todo += _settings(points.blocks[layer], route, layer)
    for point in points.every():
        for name in SETTINGS:
            setattr(point, name, getattr(RoutePoint, name))
    for point, settings in todo:
        for name, value in settings.items():
            setattr(point, name, value)


def enter_routes(points: Points | None, stage: Stage) -> None:
    """Put exactly a stage's routes in force; after its switch, which says what learns."""
    if points is not None:
        set_routes(points, stage.routes)


def _settings(block: BlockPoints, route: Route, layer: int) -> list[tuple[RoutePoint, dict[str, Any]]]:
    wiring, kind = block.wiring, route.point.rpartition(".")[0]
    if route.point not in wiring.points:
        known = ", ".join(wiring.points)
        why = wiring.refused.get(route.point) or wiring.refused.get("*") or f"there is none here; there are {known}"
        raise RouteError(f"{route.mode} {route.point} in layer {layer}: {why}")
    if route.point == "block.in":
        return [(block.block, {"stop_input": True})]
    if route.point.endswith(".out"):
        branch = block.parts[kind]
        return [(branch, {"stop_output": True, "graphless": not any(p.requires_grad for p in branch.parameters())})]
    readers = [block.parts[name] for name in wiring.skips[route.point]]
    out: list[tuple[RoutePoint, dict[str, Any]]] = [
        (r, {"skip": route.mode, "is_last_reader": r is readers[-1]}) for r in readers
    ]
    first = route.point in ("block.skip", f"{wiring.branches[0]}.skip") if wiring.branches else True
    return [(block.block, {"own_input": True}), *out] if first else out


def signature_of(modules: Mapping[str, nn.Module]) -> Signature:
    """What a block is made of; the same before and after its parts became points."""
    return tuple(sorted((name, type(m).__name__.removeprefix("Routed")) for name, m in modules.items()))


def wire(proof: BlockProof, modules: Mapping[str, nn.Module], anatomy: Anatomy) -> Wiring:
    """Where the points of a block lie by its proof, as yet untried."""
    branches = tuple(n for n in proof.order if n in proof.mixes_tokens and n in modules)
    named = {c.path[1][0] for c in anatomy.components if c.path[0] == ("layers", proof.layer)} & {*MIXERS, "ffn"}
    loose = {f"{b}.out": f"{b} is no module of its own in this block" for b in named if b not in branches}
    skips, refused = _skips(branches, proof, complete=not loose)
    return Wiring(
        branches=branches, residual_argument=dict(proof.residual_inside), skips=skips, refused={**loose, **refused}
    )


def _skips(
    branches: Sequence[str], proof: BlockProof, *, complete: bool
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    mixers = [b for b in branches if b.split("[")[0] in MIXERS]
    if proof.placement == "norm of the sum":
        return {}, {f"{b}.skip": "the stream itself is normalised after the sum" for b in (*branches, "block")}
    readers = {b: next((norm for norm, fed in proof.feeds.items() if b in fed), b) for b in branches}
    if proof.topology == "parallel" and len(mixers) == 1:
        one = "attention and FFN are parallel and share one skip: it is block.skip"
        order = sorted(dict.fromkeys(readers.values()), key=proof.order.index)
        return {"block.skip": tuple(order)}, {f"{b}.skip": one for b in branches}
    if proof.topology in ("sequential", "single branch") and len(mixers) == 1:
        each = "every branch has a skip of its own: " + ", ".join(f"{b}.skip" for b in branches)
        found: dict[str, tuple[str, ...]] = {f"{b}.skip": (r,) for b, r in readers.items()}
        missing = {} if complete else {"ffn.skip": "the FFN is no module of its own in this block"}
        return found, {"block.skip": each, **missing}
    why = f"the probes do not say how this block adds its branches (topology: {proof.topology})"
    return {}, {f"{b}.skip": why for b in (*branches, "block")}


def route_points(points: Points) -> dict[str, str]:
    """Every point → the layers that have it, or why none does; for people."""
    out: dict[str, str] = {}
    names = dict.fromkeys(p for b in points.blocks for p in (*b.wiring.points, *b.wiring.refused))
    for name in names:
        layers = [i for i, b in enumerate(points.blocks) if name in b.wiring.points]
        refused = next((b.wiring.refused[name] for b in points.blocks if name in b.wiring.refused), "")
        out[name] = f"{len(layers)} of {len(points.blocks)} layers" if layers else refused
    return out
