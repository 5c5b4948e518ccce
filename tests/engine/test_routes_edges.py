"""Routes at their edges: what once was wrong, and stays right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import route_families as families
import test_flow as flow_tests
import tiny
import torch
from route_families import route
from test_routes import planted

import frostline
from frostline.anatomy import find_blocks, read_anatomy
from frostline.engine import next_token_loss, place, set_routes
from frostline.engine.local_loss import local_loss
from frostline.engine.recompute import recompute_blocks
from frostline.engine.route_points import RoutePoint
from frostline.errors import RecipeError, RouteError
from frostline.recipe import recipe_from_dict


def test_a_run_that_stops_the_skip_past_attention_runs(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, stages=[{"learn": "all", "steps": 2, "lr": 1e-3, "routes": [{"stop": "attn.skip"}]}])
    assert frostline.train(recipe, out=tmp_path / "run").audit.passed


@pytest.mark.parametrize("mode", ["stop", "remove"])
@pytest.mark.parametrize("name", ["llama", "neox-parallel", "bloom", "olmo2"])
def test_flow_with_a_skip_route(name: str, mode: str) -> None:
    skip = "block.skip" if name == "neox-parallel" else "attn.skip"
    flow, model, _, _ = flow_tests.measured(name, routes=[{mode: skip, "layers": 1}])
    kept: list[torch.Tensor] = []

    def enter(_m: Any, a: Any, k: Any) -> Any:
        own = families.stream_of(a, k).view_as(families.stream_of(a, k))
        own.retain_grad()
        kept.append(own)
        return families.with_stream(a, k, own.clone())

    find_blocks(model)[1][1].register_forward_pre_hook(enter, with_kwargs=True)
    (next_token_loss(model, flow_tests.BATCH) / flow_tests.N_TARGETS).backward()
    assert flow.blocks[1].into == pytest.approx(kept[0].grad.norm().item(), rel=1e-5)
    assert flow.blocks[0].out == pytest.approx(kept[0].grad.norm().item(), rel=1e-5)


def test_local_losses_with_a_stopped_skip() -> None:
    model = families.build("llama", dtype=torch.float32)
    points = place(model, read_anatomy(model), local_losses=True)
    set_routes(points, [route("attn.skip", (1,))])
    assert torch.isfinite(local_loss(points)(model, flow_tests.BATCH))


@pytest.mark.parametrize("readers", [("attn_norm",), ("ffn_norm",)])
def test_trial_refuses_forgotten_reader(readers: tuple[str, ...]) -> None:
    assert planted("neox-parallel", skips={"block.skip": readers}).skips == {}


@pytest.mark.parametrize("skip", ["attn.skip", "ffn.skip"])
def test_trial_refuses_exchanged_readers(skip: str) -> None:
    left = planted("llama", skips={"attn.skip": ("ffn_norm",), "ffn.skip": ("attn_norm",)})
    assert skip not in left.points
    assert left.refused[skip]


@pytest.mark.parametrize("layers", ["-:3", ":-", "::0", "0:2:0"])
def test_ranges_that_python_cannot_read(layers: str, tmp_path: Path) -> None:
    stages = [{"learn": "all", "steps": 2, "lr": 1e-3, "routes": [{"stop": "attn.out", "layers": layers}]}]
    with pytest.raises(RecipeError):
        frostline.train(tiny.recipe(tmp_path, stages=stages), out=tmp_path / "run")


@pytest.mark.parametrize("routes", [[{"stop": "attn.out", "layers": 3}], [{"stop": "attn.out"}, {"stop": "attn.out"}]])
def test_a_wrong_layer_names_its_stage(tmp_path: Path, routes: list[Any]) -> None:
    stage = {"learn": "all", "steps": 2, "lr": 1e-3}
    recipe = tiny.recipe(tmp_path, stages=[stage, {**stage, "routes": routes}])
    with pytest.raises(RecipeError, match=r"stages\[1\]"):
        frostline.train(recipe, out=tmp_path / "run")


def test_placing_leaves_the_models_configuration_alone() -> None:
    model = families.build("llama")
    model.config.dtype = torch.bfloat16
    before = copy.deepcopy(model.config.to_dict())
    place(model, read_anatomy(model))
    assert model.config.to_dict() == before


def test_placing_draws_no_random_numbers() -> None:
    model = families.build("llama")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    place(model, read_anatomy(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_placing_that_is_refused_leaves_the_model_alone() -> None:
    model = families.build("llama")
    recompute_blocks([block for _, block in find_blocks(model)])
    with pytest.raises(RouteError):
        place(model, read_anatomy(model))
    assert not any(isinstance(m, RoutePoint) for m in model.modules())


def test_local_losses_refused_leave_the_model_alone() -> None:
    model = families.build("cohere", dtype=torch.float32)
    with pytest.raises(RouteError):
        place(model, read_anatomy(model), local_losses=True)
    assert not any(isinstance(m, RoutePoint) for m in model.modules())


def test_local_losses_of_a_model_with_scaled_logits_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    from frostline.prepared import prepare

    stage = {"learn": "all", "steps": 1, "lr": 1e-3}
    given = tiny.recipe_dict(tmp_path, stages=[stage, {**stage, "local_loss": "shared"}], ties="together")
    given["model"] = {"architecture": "cohere", **tiny.SMALL}
    with pytest.raises(RecipeError, match=r"stages\[1\]"):
        prepare(recipe_from_dict(given))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_flow_of_compiled_blocks_is_that_of_eager_ones() -> None:
    flow, model, points, stage = flow_tests.measured("llama", routes=[{"stop": "attn.out", "layers": 1}])
    torch._dynamo.reset()
    for _, block in find_blocks(model):
        block.compile(backend="aot_eager")
    again = flow_tests.measure_flow(model, points, stage, flow_tests.BATCH, device=torch.device("cpu"))
    torch._dynamo.reset()
    assert flow.blocks[1].through["ffn_norm"] == again.blocks[1].through["ffn_norm"]
