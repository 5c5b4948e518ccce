"""Our experts against eager ones, for every type of transformers whose FFN has experts."""

from __future__ import annotations

import pytest
import torch
from all_types import small_model
from test_single_experts import EXPERTS, tokens

from frostline.grouped import NAME, own_modules, use_own_experts
from frostline.model_source import quiet_transformers

NOT_OURS = {
    "dbrx": "its experts are rows of two-dimensional tensors, and it chooses no implementation",
    "jetmoe": "its experts are modules of their own kind, in attention too",
    "llama4_text": "every expert sees every token, weighted before it",
    "longcat_flash": "some of its experts compute nothing; it chooses no implementation",
}
"""Types whose experts go on as transformers computes them → why. All weight gradients are computed there."""


def built(model_type):
    torch.manual_seed(0)
    with quiet_transformers():
        return small_model(model_type).float()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXPERTS)
def test_outputs_and_gradients_are_those_of_eager_experts(model_type):
    model = built(model_type)
    if model_type in NOT_OURS:
        assert not use_own_experts(model)
        return
    assert own_modules(model)
    found = []
    for implementation in (NAME, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        ids = tokens(model)
        torch.manual_seed(0)  # PhiMoE draws its choices in training
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (expected, reference) = found
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        scale = max(gradient.norm().item(), 1e-6)
        assert (gradients[name] - gradient).norm().item() <= 1e-4 * scale + 1e-7, name
