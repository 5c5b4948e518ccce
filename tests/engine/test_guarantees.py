"""Guarantees of what learns that no other file states by itself: norms, rows, experts, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from frostline.anatomy import find_blocks, read_anatomy, take
from frostline.data import Batch
from frostline.engine import next_token_loss, step
from frostline.engine.recompute import recompute_blocks
from frostline.engine.stage_switch import Active, switch
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

CPU = torch.device("cpu")


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(tiny.VOCABULARY, (2, 17), generator=generator)
    return Batch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())


def entered(model: nn.Module, learn: str, **settings: Any) -> Active:
    anatomy = read_anatomy(model)
    spec = StageSpec.model_validate({"learn": learn, "steps": 9, "lr": 1e-2, **settings})
    (stage,) = Schedule.of([("only", spec, select(anatomy, learn))]).stages
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return switch(parameters, anatomy, stage, memory={}, leaving=None)


@pytest.mark.parametrize(
    ("architecture", "learn"),
    [("llama", "ffn"), ("llama", "layers[1].attn.heads[2] | embed.rows[3:9]"), ("mixtral", "experts[1]")],
)
def test_the_norm_that_clips_is_of_what_learns_and_of_nothing_else(architecture: str, learn: str) -> None:
    plain, model = tiny.model(architecture), tiny.model(architecture)
    step(plain, [batch()], next_token_loss, seed=0, device=CPU)
    gradients = dict(plain.named_parameters())
    learning = select(read_anatomy(plain), learn).slices
    expected = torch.stack([take(gradients[s.tensor].grad, s).square().sum() for s in learning]).sum().sqrt()  # type: ignore[arg-type]
    everything = torch.stack([p.grad.square().sum() for p in plain.parameters() if p.grad is not None]).sum().sqrt()
    active = entered(model, learn, clip=1e-3)
    step(model, [batch()], next_token_loss, seed=0, device=CPU)
    norm = active.ownership.clip(1e-3)
    assert torch.isclose(norm, expected, rtol=1e-5)
    assert norm < 0.9 * everything
    assert torch.isclose(active.ownership.norm(), torch.tensor(1e-3), rtol=1e-4)
    owned = {id(p) for g in active.optimizer.param_groups for p in g["params"]}
    n_frozen = sum(id(p) not in owned for p in model.parameters())
    assert n_frozen, "parameters of which nothing learns are not in the optimizer"


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "adamw", "weight_decay": 0.5}, {"name": "sgd", "momentum": 0.9, "weight_decay": 0.5}],
    ids=["adamw", "sgd"],
)
def test_rows_beside_those_that_learn_keep_their_bytes_under_decay_and_momentum(optimizer: dict[str, Any]) -> None:
    model = tiny.model("llama")
    seen = batch().input_ids.unique()
    before = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    active = entered(model, "embed.rows[3:40]", optimizer=optimizer)
    for seed in range(4):
        step(model, [batch(seed)], next_token_loss, seed=seed, device=CPU)
        active.optimizer.set_rate(1.0)
        active.optimizer.step()
        active.ownership.write_back()
        active.optimizer.zero_grad()
    after = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [*range(3, 40)]
    assert any(int(i) not in range(3, 40) for i in seen), "other rows were used, and had gradients"


def test_an_experts_index_is_never_a_layers() -> None:
    anatomy = tiny.anatomy("mixtral")

    def parts(expression: str) -> set[str]:
        return {c.name.rpartition(".")[0] for c, _ in select(anatomy, expression).by_component()}

    assert parts("layers[0].ffn.experts[1]") == {"layers[0].ffn.experts[1]"}
    assert parts("layers[1].ffn.experts[0]") == {"layers[1].ffn.experts[0]"}
    assert parts("experts[1]") == {f"layers[{i}].ffn.experts[1]" for i in range(3)}
    assert parts("experts & layers[1]") == {f"layers[1].ffn.experts[{i}]" for i in range(4)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_recomputed_blocks_above_a_frozen_embedding_get_their_gradients(architecture: str) -> None:
    found = []
    for recomputed in (False, True):
        model = tiny.model(architecture, **({"tie_word_embeddings": False} if architecture != "gpt2" else {}))
        if recomputed:
            recompute_blocks([block for _, block in find_blocks(model)])
        entered(model, "attn | ffn")
        step(model, [batch()], next_token_loss, seed=0, device=CPU)
        assert model.get_input_embeddings().weight.grad is None  # type: ignore[operator]
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed_too = found
    assert plain.keys() == recomputed_too.keys()
    assert len(plain) > 10
    assert all(torch.equal(plain[n], recomputed_too[n]) for n in plain)
