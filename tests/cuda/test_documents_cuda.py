"""On a card: documents of one row stay apart, by torch's variable-length kernel and by calls."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from frostline.data import Batch, Documents
from frostline.engine import documents as attention
from frostline.engine import next_token_loss, step
from frostline.engine.documents import use_document_attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the versions of a GPU machine are its own; so are their warnings
]
CUDA = torch.device("cuda")
LENGTHS = ((90, 1, 30), (64, 40))


def build(name: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = tiny.FAMILIES[name] | {"hidden_size": 64, "head_dim": 16, **fields}
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0)
    return model.to(CUDA)


def batches() -> tuple[Batch, list[Batch]]:
    """Two rows with several documents; and each document alone."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 128), generator=generator)
    labels, documents, alone = torch.full_like(ids, -100), Documents(LENGTHS), []
    for row in range(2):
        for a, b in documents.spans(row):
            labels[row, a:b] = torch.randint(3, tiny.VOCABULARY, (b - a,), generator=generator)
            alone.append(Batch(input_ids=ids[row : row + 1, a:b], labels=labels[row : row + 1, a:b]).to(CUDA))
    return Batch(input_ids=ids, labels=labels, documents=documents).to(CUDA), alone


def gradients(model: nn.Module, rows: list[Batch], *, bf16: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    record = step(model, rows, next_token_loss, seed=0, device=CUDA, bf16=bf16)
    return record.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama", {}), ("mistral", {"sliding_window": 24}), ("qwen3", {})],
    ids=["llama", "window", "qwen3"],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_documents_among_others_have_the_losses_and_gradients_they_have_alone(
    name: str, fields: dict[str, object], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, alone = batches()
    expected_loss, expected = gradients(build(name, **fields), alone, bf16=bf16)
    used = []
    kernel = attention._variable_length
    monkeypatch.setattr(attention, "_variable_length", lambda *a: (used.append(1), kernel(*a))[1])
    model = build(name, **fields)
    use_document_attention(model)
    loss, found = gradients(model, [packed], bf16=bf16)
    assert bool(used) == (bf16 and (not fields or attention._takes_windows()))
    assert loss == pytest.approx(expected_loss, rel=2e-3 if bf16 else 1e-5)
    for n, g in expected.items():
        assert (found[n] - g).norm() <= (4e-2 if bf16 else 1e-4) * g.norm() + 1e-7, n
