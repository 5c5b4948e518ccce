"""Our experts against transformers' own: outputs, gradients, precision; and who gets a weight gradient at all."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch
from all_types import small_model

from frostline.anatomy import read_anatomy
from frostline.engine.notes import learns_some_experts, notes_on
from frostline.engine.stage_switch import switch
from frostline.grouped import NAME, let_experts_learn, odd_width, own_modules, use_own_experts
from frostline.model_source import quiet_transformers
from frostline.moe import find_sites
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

FAMILIES = ["mixtral", "gpt_oss"]


def ids():
    return torch.randint(5, 300, (4, 16), generator=torch.Generator().manual_seed(0))


def prepared(architecture, implementation, dtype=torch.float32, seed=0):
    model = tiny.model(architecture, seed=seed).to(dtype)
    for module in model.modules():  # transformers leaves biases of experts at zero
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
    model.set_experts_implementation(implementation)
    return model


def run(model):
    out = model(ids(), labels=ids(), use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_loaded_models_use_it_and_their_saved_configuration_does_not_name_it(architecture, tmp_path):
    model = tiny.model(architecture)
    assert model.config._experts_implementation == NAME
    assert len(own_modules(model)) == 3
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_in_fp64_outputs_and_gradients_are_those_of_eager_experts(architecture):
    logits, gradients = run(prepared(architecture, NAME, torch.float64))
    expected, reference = run(prepared(architecture, "eager", torch.float64))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-7)  # norms of these models stay in fp32
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_in_fp32_it_is_transformers_grouped_product_to_the_bit(architecture):
    logits, gradients = run(prepared(architecture, NAME))
    expected, reference = run(prepared(architecture, "grouped_mm"))
    assert torch.equal(logits, expected)
    assert all(torch.equal(gradients[n], g) for n, g in reference.items())


def packed(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}


@pytest.mark.parametrize("learning", [(1,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_learning_experts_have_the_gradient_they_had_and_the_others_zero(architecture, learning):
    model = prepared(architecture, NAME)
    for weight in packed(model).values():
        let_experts_learn(weight, learning)
    _, gradients = run(model)
    _, reference = run(prepared(architecture, NAME))
    for name, gradient in gradients.items():
        if name not in packed(model):
            assert torch.equal(gradient, reference[name]), name
            continue
        idle = [e for e in range(4) if e not in learning]
        assert not gradient[idle].any()
        torch.testing.assert_close(gradient[[*learning]], reference[name][[*learning]], rtol=1e-5, atol=1e-9, msg=name)


def test_a_single_product_agrees_with_finite_differences():
    model = prepared("mixtral", NAME, torch.float64)
    experts = find_sites(model, read_anatomy(model))[0].experts
    torch.manual_seed(0)
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    index, weight = torch.tensor([[0, 1], [2, 0], [2, 1], [0, 2], [1, 2], [1, 0]]), torch.rand(6, 2).double()
    down = experts.down_proj
    let_experts_learn(down, [1])

    def of_expert_1(row):
        full = torch.cat([down[:1].detach(), row, down[2:].detach()])
        experts._parameters["down_proj"] = full
        try:
            return experts(x, index, weight)
        finally:
            experts._parameters["down_proj"] = down

    row = down[1:2].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_expert_1, (row,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda t: experts(t, index, weight), (x,), fast_mode=True)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_under_autocast_products_are_taken_in_bf16(architecture, monkeypatch):
    seen = []
    real = torch.nn.functional.grouped_mm

    def watched(a, b, **kwargs):
        seen.append((a.dtype, b.dtype))
        return real(a, b, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    model = prepared(architecture, NAME)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert len(seen) == 3 * 2 * 3  # layers, products, forward and both gradients
    exact = run(prepared(architecture, NAME))[1]
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-6, name


def test_an_expert_without_tokens_gets_zero():
    model = prepared("mixtral", NAME)
    with torch.no_grad():
        for site in find_sites(model, read_anatomy(model)):
            site.router.weight.zero_()  # equal scores: every token goes to the same two experts
    _, gradients = run(model)
    visited = [e for e in range(4) if gradients["model.layers.0.mlp.experts.down_proj"][e].any()]
    assert len(visited) == 2
    model.zero_grad()
    let_experts_learn(model.model.layers[0].mlp.experts.down_proj, set(range(4)) - set(visited))
    assert not run(model)[1]["model.layers.0.mlp.experts.down_proj"].any()


def test_weights_at_odd_addresses_are_multiplied_one_by_one():
    model, other = prepared("mixtral", NAME), prepared("mixtral", NAME)
    for module in own_modules(model):
        for name, parameter in list(module.named_parameters()):
            room = torch.empty(parameter.numel() + 1)
            odd = room[1:].view_as(parameter).copy_(parameter.data)
            assert odd.data_ptr() % 16
            setattr(module, name, torch.nn.Parameter(odd))
    logits, gradients = run(model)
    expected, reference = run(other)
    torch.testing.assert_close(logits, expected)
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("intermediate", [44, 48])
@pytest.mark.parametrize("learning", [None, (1, 2)])
def test_experts_of_any_width_compute_in_bf16_what_eager_ones_compute_in_fp64(intermediate, learning):
    torch.manual_seed(0)
    x, index, weight = torch.randn(24, 32), torch.stack([torch.randperm(4)[:2] for _ in range(24)]), torch.rand(24, 2)
    found = {}
    for dtype, implementation in ((torch.bfloat16, NAME), (torch.float64, "eager")):
        model = tiny.model("mixtral", intermediate_size=intermediate).to(torch.bfloat16).to(dtype)
        model.set_experts_implementation(implementation)
        experts = model.model.layers[0].mlp.experts
        for packed_weight in experts.parameters():
            let_experts_learn(packed_weight, learning if dtype == torch.bfloat16 else None)
        rows = x.to(torch.bfloat16).to(dtype).requires_grad_()
        out = experts(rows, index, weight.to(torch.bfloat16).to(dtype))
        out.sin().sum().backward()
        found[dtype] = [out, rows.grad, *(p.grad[[*(learning or range(4))]] for p in experts.parameters())]
    for ours, truth in zip(*found.values(), strict=True):
        assert (ours.double() - truth).norm() <= 0.01 * truth.norm()


@pytest.mark.parametrize(
    ("intermediate", "dtype", "width"),
    [(44, torch.bfloat16, 44), (44, torch.float32, None), (46, torch.float32, 46), (48, torch.bfloat16, None)],
)
def test_torch_refuses_a_grouped_product_of_just_the_widths_that_are_called_odd(intermediate, dtype, width):
    model = tiny.model("mixtral", intermediate_size=intermediate).to(dtype)
    assert odd_width(model, dtype) == width
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    rows = torch.zeros(6, intermediate, dtype=dtype)
    ends = torch.tensor([1, 2, 4, 6], dtype=torch.int32)
    with nullcontext() if width is None else pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        torch.nn.functional.grouped_mm(rows, weight.mT, offs=ends)


def test_a_dense_model_is_left_alone():
    model = tiny.model("llama")
    assert not use_own_experts(model)


def test_a_stage_limits_gradients_while_it_owns_and_no_longer():
    model = tiny.model("mixtral")
    anatomy = read_anatomy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    spec = StageSpec(learn="layers[1].ffn.experts[2]", steps=1, lr=1.0)
    stage = Schedule.of([("one", spec, select(anatomy, spec.learn))]).stages[0]
    active = switch(parameters, anatomy, stage, memory={}, leaving=None)
    seen = []
    down = model.model.layers[1].mlp.experts.down_proj
    handle = down.register_hook(lambda g: seen.append([e for e in range(4) if g[e].any()]))
    run(model)
    active.ownership.release()
    run(model)
    handle.remove()
    assert seen[0] == [2]
    assert len(seen[1]) > 1


@pytest.mark.parametrize(
    ("learn", "some"),
    [
        ("experts[1]", True),
        ("layers[0].ffn.experts", False),
        ("experts", False),
        ("attn", False),
        ("ffn - experts[0]", True),
    ],
)
def test_it_is_known_whether_only_some_experts_of_a_layer_learn(learn, some):
    spec = StageSpec(learn=learn, steps=1, lr=1.0)
    stage = Schedule.of([("one", spec, select(tiny.anatomy("mixtral"), learn))]).stages[0]
    assert learns_some_experts(stage) is some
    assert notes_on(tiny.model("mixtral"), stage) == ()


def test_a_type_that_computes_its_experts_itself_is_told_of():
    with quiet_transformers():
        model = small_model("llama4_text").float()
    anatomy = read_anatomy(model)
    spec = StageSpec(learn="experts[0]", steps=1, lr=1.0)
    stage = Schedule.of([("one", spec, select(anatomy, spec.learn))]).stages[0]
    (note,) = notes_on(model, stage)
    assert note.startswith("llama4_text computes its experts in a way of its own")
