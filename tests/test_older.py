"""What older versions of transformers do wrong and Frostline puts right; on newer ones it holds without that."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from frostline.anatomy.prove import tiny_model
from frostline.data import Documents
from frostline.engine.documents import document_attention
from frostline.model import load_config, load_fake, load_model, load_skeleton
from frostline.recipe import ScratchModel

IDS = torch.arange(3, 27)[None]


def source(architecture: str, cap: float | None) -> ScratchModel:
    return ScratchModel(architecture=architecture, **tiny.SMALL, head_dim=8, attn_logit_softcapping=cap)


def stirred(model):
    """Weights large enough that scores reach a cap."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("architecture", ["gemma2", "vaultgemma"])
def test_a_cap_on_attention_scores_is_computed_however_the_model_is_loaded(architecture, tmp_path):
    capped, free = source(architecture, 0.1), source(architecture, None)
    plain = AutoModelForCausalLM.from_config(load_config(capped), attn_implementation="eager", dtype=torch.float32)
    expected = stirred(plain)(IDS).logits
    plain.save_pretrained(tmp_path)
    assert torch.equal(stirred(load_model(capped))(IDS).logits, expected)
    assert torch.equal(load_model(str(tmp_path)).eval()(IDS).logits, expected)
    assert (stirred(load_model(free))(IDS).logits - expected).abs().max() > 0.01 * expected.abs().max()
    for model in (load_skeleton(capped), load_fake(capped)[0], tiny_model(load_config(capped))):
        assert model.config._attn_implementation == "eager"  # what is planned and probed is what runs


def test_attention_by_documents_refuses_a_cap_instead_of_leaving_it_out():
    q, k, v = (torch.zeros(1, 2, 6, 8) for _ in range(3))
    with pytest.raises(ValueError, match="no cap on scores"):
        document_attention(torch.nn.Module(), q, k, v, None, documents=Documents(((4, 2),)), softcap=50.0)
    assert document_attention(torch.nn.Module(), q, k, v, None, documents=Documents(((4, 2),)), softcap=None)


def test_the_gradients_of_experts_in_compiled_blocks_are_those_of_finite_differences():
    load_model(ScratchModel(**tiny.config("mixtral")))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # the second expert was chosen by nobody
    product = torch.ops.transformers.grouped_mm_fallback
    assert torch.autograd.gradcheck(lambda r, w: product(r, w.mT, ends), (rows, weight))
    product(rows, weight.mT, ends).sum().backward()
    assert not weight.grad[1].any()
