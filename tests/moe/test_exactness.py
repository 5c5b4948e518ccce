"""What is known exactly of upcycled mixtures: who gets a gradient, and when experts can come to differ."""

from __future__ import annotations

import pytest
import torch
from dense import save_dense
from transformers import AutoModelForCausalLM

from frostline.anatomy import read_anatomy
from frostline.moe import find_sites, upcycle


def upcycled(folder, **settings):
    dense = save_dense("qwen3", folder / "dense")
    upcycle(str(dense), folder / "moe", experts=4, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder / "moe", dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


def backward(model):
    ids = torch.randint(5, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids, use_cache=False).loss.backward()


def routers(model):
    return [s.router.weight for s in find_sites(model, read_anatomy(model))]


def gradients_of_experts(model):
    """(layers, experts, numbers)."""
    packed = [layer.mlp.experts.gate_up_proj.grad for layer in model.model.layers]
    return torch.stack([g.flatten(1) for g in packed])


def test_with_equal_experts_and_normalised_weights_the_loss_does_not_move_the_routers(tmp_path):
    model = upcycled(tmp_path)
    backward(model)
    others = max(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    assert max(r.grad.norm().item() for r in routers(model)) < 1e-6 * others


def test_noise_in_the_experts_gives_the_routers_a_gradient(tmp_path):
    model = upcycled(tmp_path, init="noise", noise=0.1)
    backward(model)
    others = max(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
    assert min(r.grad.norm().item() for r in routers(model)) > 1e-5 * others


def test_experts_that_see_the_same_tokens_with_the_same_weights_stay_equal(tmp_path):
    model = upcycled(tmp_path, top_k=4)
    with torch.no_grad():
        for router in routers(model):
            router.zero_()
    backward(model)
    found = gradients_of_experts(model)
    assert found.norm() > 0
    for e in range(1, 4):
        assert torch.equal(found[:, e], found[:, 0])


def test_experts_diverge_by_the_tokens_they_receive(tmp_path):
    model = upcycled(tmp_path)
    backward(model)
    found = gradients_of_experts(model)
    assert torch.cosine_similarity(found[:, 0], found[:, 1], dim=-1).max() < 0.999


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_change_is_rounding_whatever_the_number_of_experts_per_token(tmp_path, top_k):
    dense = save_dense("qwen3", tmp_path / "dense")
    made = upcycle(str(dense), tmp_path / "moe", experts=4, top_k=top_k, router_std=0.5)
    assert made.change <= 1e-6  # not 0 even for one expert: its matrices are multiplied with fewer rows at a time
    assert made.ffn_factor == pytest.approx(1, abs=1e-6)
