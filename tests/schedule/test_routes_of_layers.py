"""Routes with their layers as numbers: Python's own slicing, each layer cut once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import RouteError
from frostline.recipe import RouteSpec, StageSpec
from frostline.schedule import Route, Schedule, make_routes
from frostline.selection import select

quick = settings(deadline=None, max_examples=120)


def layers_of(layers: Any, n_layers: int = 6) -> tuple[int, ...]:
    (route,) = make_routes([RouteSpec(stop="attn.out", layers=layers)], n_layers)
    return route.layers


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        ("0:4", (0, 1, 2, 3)),
        ("4:", (4, 5)),
        (":2", (0, 1)),
        ("-2:", (4, 5)),
        (":-4", (0, 1)),
        ("::2", (0, 2, 4)),
        ("1:5:3", (1, 4)),
        ("2:100", (2, 3, 4, 5)),
        (3, (3,)),
        (-1, (5,)),
        ("-6", (0,)),
        ([5, 0, "1:3"], (5, 0, 1, 2)),
        ([0, "0:2", -6, 1], (0, 1)),
    ],
)
def test_layers_are_those_of_pythons_slicing(layers: Any, wanted: tuple[int, ...]) -> None:
    assert layers_of(layers) == wanted


bound = st.one_of(st.just(""), st.integers(-9, 9).map(str))
ranges = st.one_of(
    st.integers(-9, 9).map(str),
    st.tuples(bound, bound).map(":".join),
    st.tuples(bound, bound, st.integers(1, 4).map(str)).map(":".join),
)


@quick
@given(ranges, st.integers(1, 8))
def test_any_accepted_text_is_pythons_own_slice_of_the_layers(text: str, n_layers: int) -> None:
    everything = list(range(n_layers))
    if ":" in text:
        wanted = everything[slice(*(int(t) if t else None for t in text.split(":")))]
    else:
        wanted = everything[int(text) : int(text) + 1 or None] if -n_layers <= int(text) < n_layers else []
    if wanted:
        assert layers_of(text, n_layers) == tuple(wanted)
    else:
        with pytest.raises(RouteError, match=f"the model has layers 0 to {n_layers - 1}"):
            layers_of(text, n_layers)


@quick
@given(st.lists(st.one_of(st.integers(-4, 3), st.sampled_from(["0:2", "2:", ":-1", "::2"])), min_size=1, max_size=5))
def test_a_list_of_layers_is_their_union_in_order_each_once(items: list[int | str]) -> None:
    wanted: list[int] = []
    for item in items:
        wanted += layers_of(item, 4)
    assert layers_of(items, 4) == tuple(dict.fromkeys(wanted))


@pytest.mark.parametrize("layers", [6, -7, "6:", "3:3", [0, 9]])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers: Any) -> None:
    with pytest.raises(RouteError, match="the model has layers 0 to 5"):
        layers_of(layers)


def test_a_point_is_cut_once_in_a_layer() -> None:
    def made(*specs: RouteSpec) -> tuple[Route, ...]:
        return make_routes(specs, 4)

    with pytest.raises(RouteError, match=r"two routes at attn\.out in layer 1$"):
        made(RouteSpec(stop="attn.out", layers="0:2"), RouteSpec(stop="attn.out", layers=[3, 1]))
    with pytest.raises(RouteError, match=r"two routes at ffn\.skip in layer 0$"):
        made(RouteSpec(stop="ffn.skip"), RouteSpec(remove="ffn.skip", layers=0))
    with pytest.raises(RouteError, match=r"two routes at embed\.out$"):
        made(RouteSpec(stop="embed.out"), RouteSpec(stop="embed.out"))
    assert len(made(RouteSpec(stop="attn.out", layers="0:2"), RouteSpec(stop="attn.out", layers="2:"))) == 2


def test_routes_say_what_they_do() -> None:
    specs = [
        RouteSpec(stop="attn.out", layers="1:"),
        RouteSpec(remove="ffn.skip", layers=0),
        RouteSpec(stop="embed.out"),
    ]
    assert [str(r) for r in make_routes(specs, 3)] == [
        "stop attn.out in layers 1, 2",
        "remove ffn.skip in layers 0",
        "stop embed.out",
    ]


def test_a_stage_of_a_schedule_has_its_routes() -> None:
    selection = select(tiny.anatomy("llama"), "ffn")
    spec = StageSpec.model_validate(
        {"learn": "ffn", "steps": 2, "lr": 1e-3, "routes": [{"stop": "attn.out", "layers": -1}]}
    )
    plain = StageSpec(learn="ffn", steps=1, lr=1e-3)
    schedule = Schedule.of([("a", plain, selection), ("b", spec, selection)])
    assert [s.routes for s in schedule.stages] == [(), (Route(point="attn.out", mode="stop", layers=(2,)),)]
    assert schedule.at(1).routes == schedule.ended([1]).stages[1].routes
