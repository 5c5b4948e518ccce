"""Gradient checkpointing: the same bits, less memory, and backward stops where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from frostline import train
from frostline.anatomy import find_blocks, read_anatomy
from frostline.engine.recompute import recompute_blocks, recomputing
from frostline.engine.stage_switch import set_modes, switch
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select


def gradients(architecture: str, learn: str, *, recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step in training mode (dropout included), and how many blocks were computed twice."""
    torch.manual_seed(0)
    model = tiny.model(architecture)
    anatomy = read_anatomy(model)
    spec = StageSpec(learn=learn, steps=1, lr=1.0)
    (stage,) = Schedule.of([("s", spec, select(anatomy, learn, ties="together"))]).stages
    switch(dict(model.named_parameters(remove_duplicate=False)), anatomy, stage, memory={}, leaving=None)
    set_modes(model, stage)
    blocks = [block for _, block in find_blocks(model)]
    twice: list[str] = []
    for block in blocks:
        next(block.children()).register_forward_hook(lambda *_: twice.append("again") if recomputing() else None)
    if recompute:
        recompute_blocks(blocks)
    ids = torch.randint(tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(twice)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "olmo2", "gpt_neox", "gemma", "qwen3", "gpt_oss"])
def test_gradients_are_bitwise_those_without_dropout_included(architecture: str) -> None:
    plain, _ = gradients(architecture, "all", recompute=False)
    again, n_twice = gradients(architecture, "all", recompute=True)
    assert plain.keys() == again.keys()
    assert n_twice > 0
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("learn", ["layers[-1]", "layers[-1].ffn", "final_norm", "head"])
def test_blocks_below_the_frontier_are_computed_once(learn: str) -> None:
    plain, _ = gradients("llama", learn, recompute=False)
    again, n_twice = gradients("llama", learn, recompute=True)
    assert n_twice == (1 if learn.startswith("layers") else 0)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert plain.keys() == again.keys()


def test_frozen_blocks_above_the_frontier_are_recomputed_too() -> None:
    _, n_twice = gradients("llama", "embed", recompute=True)
    assert n_twice == 3


def test_a_run_with_recomputed_blocks_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for setting in ("off", "blocks"):
        recipe = tiny.recipe(tmp_path, "gpt2").model_copy(update={"recompute": setting})
        result = train(recipe, out=tmp_path / setting)
        assert result.audit.passed
        assert all(c.flops_agree for c in result.checks)
    for name in ("metrics.jsonl", "evidence/gradients.jsonl", "model/model.safetensors"):
        assert (tmp_path / "off" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes(), name
