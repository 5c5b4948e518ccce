"""Detaching attention's output is biased most where attention matters."""

from __future__ import annotations

import pytest
import tiny
import torch

from frostline.anatomy import read_anatomy
from frostline.data import Batch
from frostline.engine import next_token_loss
from frostline.experiment.bench import Bench
from frostline.experiment.route_claims import a_stop_is_no_freeze


def copy_batch(seed: int, rows: int = 32, half: int = 12) -> Batch:
    """Random tokens, then the same again: only attention can know the second half. Its targets alone count."""
    first = torch.randint(3, tiny.VOCABULARY, (rows, half), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([first, first], dim=1)
    labels = ids[:, 1:].clone()
    labels[:, : half - 1] = -100
    return Batch(input_ids=ids[:, :-1], labels=labels)


@pytest.mark.slow
def test_detaching_attention_is_most_biased_on_a_task_that_needs_attention() -> None:
    model = tiny.model("llama", hidden_size=64, intermediate_size=128)
    at_start = a_stop_is_no_freeze(Bench(model, copy_batch(0))).numbers
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for step in range(600):
        batch = copy_batch(step + 1)
        loss = next_token_loss(model, batch) / batch.n_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5, "it must have learned to copy"
    model.eval()
    after = a_stop_is_no_freeze(Bench(model, copy_batch(0))).numbers
    n = read_anatomy(model).n_layers
    names = [f"stopped_ffn_cosine_layer_{i}" for i in range(n - 1)]
    print([at_start[k] for k in names], [after[k] for k in names], loss.item())
    assert min(after[k] or 0.0 for k in names) < min(at_start[k] or 0.0 for k in names) - 0.1
