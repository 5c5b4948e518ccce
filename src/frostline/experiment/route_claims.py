"""What is said about gradient routes, settled by measurement on a model.

Rows S6 and S7 of the question the project grew from. A model whose routes cannot be placed gets the reason instead of
numbers. Read `a_stop_is_no_freeze` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from frostline.engine import Points, place, set_routes
from frostline.errors import RouteError
from frostline.experiment.bench import Bench, Claim, folded, reached, similarity, three_digits, unmeasured
from frostline.schedule import Route


def a_stop_is_no_freeze(bench: Bench) -> Claim:
    """S7: the FFN's gradient with attention frozen and with its output stopped."""
    belief = "Freezing attention and detaching its output come to the same for everything else."
    try:
        points = place(bench.model, bench.anatomy)
        true = _gradients(bench, points, "all", [])
        stopped = _gradients(bench, points, "all", _routes(points, "attn.out"))
    except RouteError as error:
        return unmeasured("S7", belief, error)
    frozen = _gradients(bench, points, "all - attn", [])
    differing = [n for n, g in frozen.items() if not torch.equal(g, true[n])]
    cosines = [similarity(bench, f"layers[{i}].ffn", true, stopped)[0] for i in bench.layers]
    below = [c for c in cosines[:-1] if c is not None]
    return Claim(
        key="S7",
        belief=belief,
        verdict="FALSE",
        measured=f"With attention frozen {len(frozen) - len(differing)} of {len(frozen)} other gradients are the true "
        "ones to the last bit; with its output stopped the FFNs' have cosines "
        f"{', '.join(map(three_digits, cosines))} to them, first layer to last.",
        holds=not differing and all(c < 1 - 1e-9 for c in below),
        numbers={
            "gradients_that_freezing_changes": len(differing),
            **{f"stopped_ffn_cosine_layer_{i}": c for i, c in enumerate(cosines)},
        },
    )


def only_a_stopped_stream_freezes_what_lies_before(bench: Bench) -> Claim:
    """S7: which parts still receive a gradient under every route of the model."""
    belief = "Stopping the gradient at a point freezes everything that lies before it."
    try:
        points = place(bench.model, bench.anatomy)
        true, _ = reached(bench, _gradients(bench, points, "all", []))
        cut = {p: reached(bench, _gradients(bench, points, "all", _routes(points, p)))[0] for p in _points(points)}
    except RouteError as error:
        return unmeasured("S7", belief, error)
    lost = {p: [n for n in true if n not in still] for p, still in cut.items()}
    wrong = [p for p in cut if not _as_expected(bench, p, true, lost[p])]
    return Claim(
        key="S7",
        belief=belief,
        verdict="FALSE except for the stream itself",
        measured=f"Of {len(true)} parts with a gradient, a stop in every layer leaves none to: "
        + "; ".join(f"{p} {len(names)}" for p, names in lost.items())
        + ".",
        holds=not wrong,
        numbers={f"without_gradient_{p}": len(names) for p, names in lost.items()},
        table=(
            ("stopped in every layer", "no gradient any more"),
            *((p, ", ".join(folded(names)) or "none of them") for p, names in lost.items()),
        ),
    )


def without_a_residual_connection_it_is_another_function(bench: Bench) -> Claim:
    """S6: the loss of the same weights with a residual connection left out."""
    belief = "The residual connection around attention or FFN can be left out while the FFN is trained."
    try:
        points = place(bench.model, bench.anatomy)
        skips = [p for p in _points(points) if p.endswith(".skip")]
        if not skips:
            raise RouteError("this model has no residual connection that its probes confirm")
        whole = _loss(bench, points, [])
        losses = {p: _loss(bench, points, _routes(points, p, "remove")) for p in skips}
    except RouteError as error:
        return unmeasured("S6", belief, error)
    return Claim(
        key="S6",
        belief=belief,
        verdict="FALSE: it is another function",
        measured=f"With the same weights the loss is {whole:.4f}; without "
        + ", ".join(f"{p} {loss:.4f}" for p, loss in losses.items())
        + ".",
        holds=all(loss != whole for loss in losses.values()),
        numbers={"loss": whole, **{f"loss_without_{p}": loss for p, loss in losses.items()}},
    )


ROUTE_CLAIMS: tuple[Callable[[Bench], Claim], ...] = (
    a_stop_is_no_freeze,
    only_a_stopped_stream_freezes_what_lies_before,
    without_a_residual_connection_it_is_another_function,
)


def _points(points: Points) -> list[str]:
    """The points that every layer has, and the embedding's."""
    first, *others = (b.wiring.points for b in points.blocks)
    return [*(p for p in first if all(p in o for o in others)), "embed.out"]


def _routes(points: Points, point: str, mode: Literal["stop", "remove"] = "stop") -> list[Route]:
    layers = [] if point == "embed.out" else range(len(points.blocks))
    return [Route(point=point, mode=mode, layers=tuple(layers))]


def _gradients(bench: Bench, points: Points, learn: str, routes: Sequence[Route]) -> dict[str, torch.Tensor]:
    bench.learn(learn)
    set_routes(points, routes)
    try:
        bench.backward()
    finally:
        set_routes(points, ())
    return bench.gradients()


def _loss(bench: Bench, points: Points, routes: Sequence[Route]) -> float:
    bench.learn("all")
    set_routes(points, routes)
    try:
        return bench.backward()
    finally:
        set_routes(points, ())


def _as_expected(bench: Bench, point: str, true: Sequence[str], lost: Sequence[str]) -> bool:
    """Whether exactly those parts lost their gradient of which a stop everywhere must take it."""
    last = bench.layers[-1]
    layers = [n for n in true if n.startswith("layers[")]
    if point == "block.in":
        return set(lost) >= {n for n in layers if not n.startswith(f"layers[{last}].")} and not any(
            n.startswith(f"layers[{last}].") for n in lost
        )
    if point == "embed.out":
        return not any(n.startswith("layers[") for n in lost)
    if point.endswith(".skip"):
        return not lost
    branch = point.removesuffix(".out")
    inside = [n for n in layers if n.split(".")[1].split("[")[0] == branch.split("[")[0]]
    others = [n for n in layers if n not in inside and not n.split(".")[1].endswith("norm")]
    return set(lost) >= set(inside) and not set(lost) & {*others, "embed", "head", "final_norm"}
