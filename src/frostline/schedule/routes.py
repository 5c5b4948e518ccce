"""A stage's gradient routes with their layers as numbers. Read `Route`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from frostline.errors import RouteError
from frostline.recipe import RouteSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One kind of point, in some layers."""

    point: str
    """`attn.out`, `ffn.out`, `block.in`, `embed.out`, `attn.skip`, `ffn.skip`, `block.skip`."""
    mode: Literal["stop", "remove"]
    """`remove`: the connection is left out of the forward pass; for skips only."""
    layers: tuple[int, ...]
    """0-based; empty for `embed.out`."""

    def __str__(self) -> str:
        return f"{self.mode} {self.point}" + (f" in layers {', '.join(map(str, self.layers))}" if self.layers else "")


def make_routes(specs: Sequence[RouteSpec], n_layers: int) -> tuple[Route, ...]:
    """The routes that a stage asks for. Raises `RouteError` for a layer that is not there, or one cut twice."""
    routes = tuple(_route(spec, n_layers) for spec in specs)
    seen: set[tuple[str, int | None]] = set()
    for route in routes:
        for layer in route.layers or (None,):
            if (route.point, layer) in seen:
                raise RouteError(f"two routes at {route.point}" + ("" if layer is None else f" in layer {layer}"))
            seen.add((route.point, layer))
    return routes


def _route(spec: RouteSpec, n_layers: int) -> Route:
    point = spec.stop or spec.remove or ""
    layers: list[int] = []
    for item in (":",) if spec.layers is None else spec.layers:
        layers += _layers(item, n_layers)
    return Route(
        point=point,
        mode="stop" if spec.stop else "remove",
        layers=() if point == "embed.out" else tuple(dict.fromkeys(layers)),
    )


def _layers(item: int | str, n_layers: int) -> list[int]:
    text = str(item)
    if ":" in text:
        bounds = [int(t) if t else None for t in text.split(":")]
        found = list(range(n_layers)[slice(*bounds)])
    else:
        index = int(text)
        found = [index % n_layers] if -n_layers <= index < n_layers else []
    if not found:
        raise RouteError(f"layers {text}: the model has layers 0 to {n_layers - 1}")
    return found
