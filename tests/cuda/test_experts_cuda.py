"""Mixtures of experts on CUDA: our products against the CPU's, few learning experts, capacity, runs with an audit."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import frostline
from frostline.grouped import let_experts_learn, own_modules
from frostline.recipe import recipe_from_dict

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
FAMILIES = ["mixtral", "gpt_oss"]


def gradients(architecture, device, *, bf16=False, learning=None):
    model = tiny.model(architecture).to(device)
    for module in own_modules(model):
        for parameter in module.parameters(recurse=False):
            let_experts_learn(parameter, learning if parameter.dim() > 2 else None)
    ids = torch.randint(5, 300, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_gradients_are_the_cpus(architecture, bf16):
    found, expected = gradients(architecture, "cuda", bf16=bf16), gradients(architecture, "cpu")
    for name, gradient in expected.items():
        tolerance = 0.1 if bf16 else 1e-3
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_experts_that_do_not_learn_have_no_weight_gradient(architecture, bf16):
    few, whole = (gradients(architecture, "cuda", bf16=bf16, learning=e) for e in ((1, 3), None))
    for name in (n for n in few if n.endswith(("gate_up_proj", "down_proj"))):
        assert not few[name][[0, 2]].any()
        tolerance = 2e-2 if bf16 else 1e-4
        assert (few[name][[1, 3]] - whole[name][[1, 3]]).norm() <= tolerance * whole[name].norm() + 1e-6, name


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_run_by_use_with_capacity_and_jitter_is_audited_and_repeats_itself(tmp_path, precision):
    moe = {"capacity": 1.0, "jitter": 0.05, "balance": 0.01}
    stages = [{"learn": "router | experts[top 2 by tokens]", "steps": 3, "lr": 1e-3, "accumulate": 2, "moe": moe}]
    made = tiny.recipe_dict(tmp_path, "mixtral", stages=stages, precision=precision)
    made["device"] = "cuda"
    runs = [frostline.train(recipe_from_dict(made), out=tmp_path / name) for name in ("a", "b")]
    assert all(r.audit.passed for r in runs)
    one, other = ((r.folder / "evidence" / "load.jsonl").read_text() for r in runs)
    assert one == other
    assert any(sum(json.loads(line)["dropped"].values()) for line in one.splitlines())
