"""Where gradients go: every number measured is the norm of a gradient that autograd gives on a plain model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import route_families as families
import torch
from torch import nn

from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine import Points, next_token_loss, place, set_routes
from frostline.engine.flow import Flow, measure_flow
from frostline.engine.recompute import recompute_blocks
from frostline.engine.route_points import SETTINGS
from frostline.engine.stage_switch import switch
from frostline.recipe import StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")
IDS = torch.randint(3, families.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
BATCH = Batch(input_ids=IDS[:, :-1], labels=IDS[:, 1:])
N_TARGETS = BATCH.n_targets


def stage_of(model: nn.Module, learn: str = "all", **settings: Any) -> Stage:
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, **settings})
    return Schedule.of([("only", spec, select(read_anatomy(model), learn, ties="together"))]).stages[0]


def measured(name: str, learn: str = "all", **settings: Any) -> tuple[Flow, nn.Module, Points, Stage]:
    """The flow of a stage in progress."""
    model = families.build(name, dtype=torch.float32)
    points = place(model, read_anatomy(model), local_losses="local_loss" in settings)
    stage = stage_of(model, learn, **settings)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    switch(parameters, read_anatomy(model), stage, memory={}, leaving=None)
    set_routes(points, stage.routes)
    return measure_flow(model, points, stage, BATCH, device=CPU), model, points, stage


def activation_norms(plain: nn.Module) -> tuple[float, list[tuple[float, float]]]:
    """(norm at the embedding's output, at every block's input and output) on a model without points."""
    kept: list[torch.Tensor] = []

    def keep(_m: nn.Module, _a: Any, out: Any) -> None:
        families.first(out).retain_grad()
        kept.append(families.first(out))

    def keep_input(_m: nn.Module, a: Any, k: Any) -> Any:
        own = families.stream_of(a, k).view_as(families.stream_of(a, k))
        own.retain_grad()
        kept.append(own)
        return families.with_stream(a, k, own)

    hooks = [plain.get_input_embeddings().register_forward_hook(keep)]  # type: ignore[operator]
    for _, block in find_blocks(plain):
        hooks.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        hooks.append(block.register_forward_hook(keep))
    (next_token_loss(plain, BATCH) / N_TARGETS).backward()
    for hook in hooks:
        hook.remove()
    norms = [math.nan if t.grad is None else t.grad.norm().item() for t in kept]
    return norms[0], list(zip(norms[1::2], norms[2::2], strict=True))


@pytest.mark.parametrize("name", families.FEW)
def test_norms_are_those_of_autograd_on_a_plain_model(name: str) -> None:
    flow, _, _, stage = measured(name)
    plain = families.build(name, dtype=torch.float32)
    embed, blocks = activation_norms(plain)
    assert flow.embed == pytest.approx(embed, rel=1e-5)
    for block, (into, out) in zip(flow.blocks, blocks, strict=True):
        assert block.into == pytest.approx(into, rel=1e-5)
        assert block.out == pytest.approx(out, rel=1e-5)
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for component, slices in stage.selection.by_component():
        parts = [g.reshape(-1) for s in slices if (g := gradients[s.tensor]) is not None]
        if all(s.n_elements == gradients[s.tensor].numel() for s in slices if gradients[s.tensor] is not None):  # type: ignore[union-attr]
            assert flow.norms[component.name] == pytest.approx(torch.cat(parts).norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", families.FEW)
def test_without_routes_the_bias_of_every_part_is_none_at_all(name: str) -> None:
    flow, _, _, _ = measured(name)
    assert flow.bias
    for component, found in flow.bias.items():
        if found is None:  # a part whose gradient is zero has no direction
            assert not flow.norms[component]
            continue
        cosine, ratio = found
        assert cosine == pytest.approx(1.0, abs=1e-9), component
        assert ratio == pytest.approx(1.0, abs=1e-6), component


def test_what_comes_back_through_the_branches_is_what_the_block_makes_of_its_input() -> None:
    """The gradient at the block's input is the one at its output and what comes back through both norms."""
    flow, _, _, _ = measured("llama")
    plain = families.build("llama", dtype=torch.float32)
    kept: dict[str, torch.Tensor] = {}

    def own(name: str) -> Any:
        def enter(_m: nn.Module, a: Any, k: Any) -> Any:
            kept[name] = families.stream_of(a, k).view_as(families.stream_of(a, k))
            kept[name].retain_grad()
            return families.with_stream(a, k, kept[name])

        return enter

    block = find_blocks(plain)[1][1]
    for name, norm in (("attn_norm", block.input_layernorm), ("ffn_norm", block.post_attention_layernorm)):
        norm.register_forward_pre_hook(own(name), with_kwargs=True)
    (next_token_loss(plain, BATCH) / N_TARGETS).backward()
    assert set(flow.blocks[1].through) == {"attn_norm", "ffn_norm"}
    for name, tensor in kept.items():
        assert tensor.grad is not None
        assert flow.blocks[1].through[name] == pytest.approx(tensor.grad.norm().item(), rel=1e-5)


def test_a_stop_after_attention_leaves_attention_nothing_and_biases_what_lies_below_it() -> None:
    flow, model, _, _ = measured("llama", routes=[{"stop": "attn.out"}])
    plain = families.build("llama", dtype=torch.float32)
    (next_token_loss(plain, BATCH) / N_TARGETS).backward()
    for component, norm in flow.norms.items():
        if ".attn." in component or component.endswith("attn_norm"):
            assert norm is None, component
            assert flow.bias[component] is None, component
    for block in flow.blocks:
        assert block.through["attn_norm"] is None
        assert block.through["ffn_norm"]
    assert flow.bias["layers[2].ffn.down"] == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    assert flow.bias["final_norm"] == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    below = flow.bias["embed"]
    assert below is not None
    # cosine and ratio by hand: the routed gradient on this model, the true one on the plain model
    (next_token_loss(model, BATCH) / N_TARGETS).backward()
    routed, true = model.get_input_embeddings().weight.grad, plain.get_input_embeddings().weight.grad  # type: ignore[operator]
    routed, true = routed.double().reshape(-1), true.double().reshape(-1)
    assert below[0] == pytest.approx((routed @ true / (routed.norm() * true.norm())).item(), rel=1e-6)
    assert below[1] == pytest.approx((routed.norm() / true.norm()).item(), rel=1e-6)
    assert below[0] < 0.999


def test_a_stop_at_a_blocks_input_shows_nothing_below_it() -> None:
    flow, _, _, _ = measured("llama", routes=[{"stop": "block.in", "layers": 2}])
    assert not flow.blocks[2].into
    assert flow.blocks[2].out
    assert flow.embed is None
    for block in flow.blocks[:2]:
        assert not block.out
        assert not block.into
        assert not any(block.through.values())
    for component, norm in flow.norms.items():
        reached = component.startswith(("layers[2].", "final_norm", "head"))
        assert (norm is not None) == reached, component


def test_a_frozen_part_is_not_among_the_parts_that_learn() -> None:
    flow, _, _, _ = measured("llama", "layers[1:].ffn", routes=[{"stop": "attn.out"}])
    assert flow.norms.keys() == flow.bias.keys()
    assert set(flow.norms) == {f"layers[{i}].ffn.{p}" for i in (1, 2) for p in ("gate", "up", "down")}
    assert flow.blocks[2].out
    assert flow.blocks[0].into is None
    assert flow.embed is None


def test_slices_are_measured_by_their_own_elements() -> None:
    flow, model, _, stage = measured("llama", "attn.heads[1]", routes=[{"stop": "ffn.out"}])
    (next_token_loss(families.build("llama", dtype=torch.float32), BATCH) / N_TARGETS).backward()
    whole, _, _, _ = measured("llama", "attn", routes=[{"stop": "ffn.out"}])
    for component, _ in stage.selection.by_component():
        part, all_of_it = flow.norms[component.name], whole.norms[component.name]
        assert part is not None
        assert all_of_it is not None
        assert 0 < part < all_of_it
    assert all(p.grad is None for p in model.parameters())


def test_removed_residuals_are_removed_on_both_sides_of_the_comparison() -> None:
    flow, _, _, _ = measured("llama", routes=[{"remove": "ffn.skip", "layers": 1}])
    plain, _, _, _ = measured("llama")
    same = (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    assert all(b == same for b in flow.bias.values() if b is not None)
    assert flow.norms["embed"] != pytest.approx(plain.norms["embed"], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routes": [{"stop": "attn.out"}, {"remove": "ffn.skip", "layers": 1}]},
        {"routes": [{"stop": "block.in", "layers": "1:"}], "local_loss": "shared"},
    ],
)
def test_measuring_changes_nothing(settings: dict[str, Any]) -> None:
    flow, model, points, stage = measured("llama", **settings)
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.watched or point.read is not None or point.gave is not None for point in points.every())
    found = [{name: getattr(point, name) for name in SETTINGS} for point in points.every()]
    set_routes(points, stage.routes)
    assert found == [{name: getattr(point, name) for name in SETTINGS} for point in points.every()]
    assert measure_flow(model, points, stage, BATCH, device=CPU) == flow, "and measures the same again"


def test_gradients_that_were_accumulated_stay_as_they_are() -> None:
    _, model, points, stage = measured("llama")
    (next_token_loss(model, BATCH) / N_TARGETS).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    measure_flow(model, points, stage, BATCH, device=CPU)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_leaves_of_slices_get_no_gradient_from_a_measurement() -> None:
    model = families.build("llama", dtype=torch.float32)
    points = place(model, read_anatomy(model))
    stage = stage_of(model, "attn.heads[1]")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, read_anatomy(model), stage, memory={}, leaving=None)
    measure_flow(model, points, stage, BATCH, device=CPU)
    assert all(o.value.grad is None for o in active.ownership.owned)
    active.ownership.release()


def test_with_local_losses_the_bias_is_against_the_models_own_loss() -> None:
    flow, _, _, _ = measured("llama", routes=[{"stop": "block.in", "layers": "1:"}], local_loss="shared")
    last, first = flow.bias["layers[2].ffn.down"], flow.bias["layers[0].ffn.down"]
    assert last == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    assert first is not None
    assert first[0] < 0.99
    assert all(norm is not None for norm in flow.norms.values())
    assert all(block.out for block in flow.blocks)


@pytest.mark.parametrize("name", ["llama", "bloom", "neox-parallel"])
def test_the_flow_with_recomputed_blocks_is_the_flow_without(name: str) -> None:
    for settings in (
        {"routes": [{"stop": "attn.out"}]},
        {"routes": [{"stop": "block.in", "layers": 1}]},
        {"routes": [{"stop": "block.in", "layers": "1:"}], "local_loss": "shared"},
    ):
        flow, _, _, stage = measured(name, **settings)
        model = families.build(name, dtype=torch.float32)
        points = place(model, read_anatomy(model), local_losses=True)
        recompute_blocks([block for _, block in find_blocks(model)])
        set_routes(points, stage.routes)
        assert measure_flow(model, points, stage, BATCH, device=CPU) == flow, settings


def test_a_stage_that_reaches_nothing_measures_nothing() -> None:
    flow, _, _, _ = measured("llama", "embed", routes=[{"stop": "embed.out"}])
    assert flow.norms == {"embed": None}
    assert flow.bias == {"embed": None}
    assert flow.embed is None


def test_a_flow_is_plain_data() -> None:
    flow, _, _, _ = measured("llama", routes=[{"stop": "attn.out", "layers": 1}])
    data = flow.to_json()
    assert data["blocks"][1]["through"]["attn_norm"] is None
    assert data["bias"]["embed"] == flow.bias["embed"]
