"""Routes in a recipe: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from frostline.errors import RecipeError
from frostline.recipe import RouteSpec, dump_yaml, load_recipe, recipe_from_dict

quick = settings(deadline=None, max_examples=60)

POINTS = ("attn.out", "ffn.out", "block.in", "embed.out", "attn.skip", "ffn.skip", "block.skip")


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        RouteSpec(**fields)
    return str(caught.value)


@pytest.mark.parametrize("point", POINTS)
def test_every_point_can_be_stopped_at(point: str) -> None:
    spec = RouteSpec(stop=point)
    assert (spec.stop, spec.remove, spec.layers) == (point, None, None)


@pytest.mark.parametrize("point", ["ssm.out", "linear_attn.out", "ffn[1].out", "conv.skip"])
def test_branches_of_other_models_are_points_too(point: str) -> None:
    assert RouteSpec(stop=point).stop == point


@pytest.mark.parametrize("point", [p for p in POINTS if p.endswith(".skip")])
def test_residual_connections_can_be_removed(point: str) -> None:
    assert RouteSpec(remove=point, layers="1:").remove == point


@pytest.mark.parametrize("point", [p for p in POINTS if not p.endswith(".skip")])
def test_nothing_else_can_be_removed(point: str) -> None:
    assert f"only a residual connection can be removed (attn.skip, ffn.skip, block.skip), not {point}" in refused(
        remove=point
    )


@pytest.mark.parametrize(
    "point", ["", "attn", "attention.output", "attn.in", "block.out.", "Attn.out", "block.in ", "head.in", "[0].out"]
)
def test_what_is_no_point_is_refused_with_the_points_there_are(point: str) -> None:
    message = refused(stop=point)
    assert f"'{point}' is no point; points are" in message
    assert all(known in message for known in POINTS)


def test_a_route_is_one_stop_or_one_removal() -> None:
    assert "a route has either `stop` or `remove`" in refused()
    assert "a route has either `stop` or `remove`" in refused(stop="attn.skip", remove="attn.skip")
    assert "Extra inputs are not permitted" in refused(stop="attn.out", layer=1)


def test_the_embedding_is_in_no_layer() -> None:
    assert "embed.out is in no layer; leave `layers` out" in refused(stop="embed.out", layers="0:2")


@pytest.mark.parametrize(
    ("given_layers", "read"),
    [("0:4", ("0:4",)), (3, (3,)), (-1, (-1,)), ([0, -1, "4:8"], (0, -1, "4:8")), ("::2", ("::2",)), ("2", ("2",))],
)
def test_one_layer_or_range_may_stand_alone(given_layers: Any, read: tuple[int | str, ...]) -> None:
    assert RouteSpec(stop="attn.out", layers=given_layers).layers == read


@pytest.mark.parametrize("text", ["all", "1-3", "", " ", "1,2", "0:4:-1", "1.5", "+1", "0x1", "1_0", "a:b", "1::2::3"])
def test_what_is_no_range_is_refused_with_examples(text: str) -> None:
    assert f"'{text}' is no range of layers; write 3, -1, 0:4, 8: or ::2" in refused(stop="attn.out", layers=text)


@pytest.mark.parametrize("layers", [True, 1.0, [], {}, [None], [[1]]])
def test_layers_of_another_type_are_refused(layers: Any) -> None:
    assert "layers" in refused(stop="attn.out", layers=layers)


@quick
@given(st.text(max_size=12))
def test_any_text_is_a_point_or_refused_as_one(text: str) -> None:
    branch, _, what = text.rpartition(".")
    if branch and (what in ("out", "skip") or text == "block.in"):
        return  # may well be one: the model decides
    assert "is no point" in refused(stop=text)


def test_routes_survive_a_recipe_file(tmp_path: Path) -> None:
    routes = [{"stop": "attn.out", "layers": "0:2"}, {"remove": "ffn.skip", "layers": [1, "2:"]}, {"stop": "embed.out"}]
    stages = [{"learn": "all", "steps": 1, "lr": 1e-3, "routes": routes, "local_loss": "shared"}]
    recipe = recipe_from_dict(tiny.recipe_dict(tmp_path, stages=stages))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.as_dict()), encoding="utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.stages == recipe.stages
    assert [r.layers for r in again.stages[0].routes] == [("0:2",), (1, "2:"), None]
    assert again.stages[0].local_loss == "shared"


def test_an_error_in_a_route_says_which_stage_and_route(tmp_path: Path) -> None:
    stages = [
        {"learn": "all", "steps": 1, "lr": 1e-3},
        {"learn": "all", "steps": 1, "lr": 1e-3, "routes": [{"stop": "attn.out"}, {"stop": "attention"}]},
    ]
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(tiny.recipe_dict(tmp_path, stages=stages))
    assert "stages[1].routes[1]" in str(caught.value)
    assert "'attention' is no point" in str(caught.value)
