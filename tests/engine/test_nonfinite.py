"""NaN and infinity: halted before the update and told where; skipped, changing nothing; never repaired in the log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from frostline import run as running
from frostline import train
from frostline.checkpoints import Checkpoints
from frostline.engine.loss import next_token_loss
from frostline.errors import ModelError, NonFiniteError
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder

STAGES = [{"name": "one", "learn": "all", "steps": 8, "lr": 3e-3}]


def recipe(folder: Path, **more: Any) -> Recipe:
    data = {"stages": STAGES, "checkpoint": {"every": 1, "minutes": None, "keep": 100}, "eval": {"batches": 1}}
    return tiny.recipe(folder, **(data | more))


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = math.nan) -> None:
    """Multiply the loss of these steps (1-based)."""
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += torch.is_grad_enabled()
        return next_token_loss(model, batch) * (factor if calls[0] in steps else 1.0)

    monkeypatch.setattr(running, "loss_of", lambda *_: loss)


def state_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state after a step."""
    path = folder / "checkpoints" / f"step-{step:09d}"
    return {f"{n}.{k}": t for n in ("weights", "optimizer") for k, t in load_file(path / f"{n}.safetensors").items()}


def test_a_skipped_step_changes_neither_weights_nor_moments_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {4, 5})
    result = train(recipe(tmp_path, nonfinite={"policy": "skip", "limit": 2}), out=tmp_path / "run")
    assert result.audit.passed
    before, after, next_one = (state_at(tmp_path / "run", k) for k in (3, 5, 6))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not all(torch.equal(after[n], next_one[n]) for n in after)
    rows = [r for r in RunFolder(tmp_path / "run").read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows if r.get("skipped")] == [4, 5]
    assert all(math.isnan(r["loss"]) == (r["step"] in (4, 5)) for r in rows)


def test_one_skipped_step_too_many_in_a_row_halts_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(NonFiniteError, match=r"step 6 \(stage one, batch 5\)"):
        train(recipe(tmp_path, nonfinite={"policy": "skip", "limit": 2}), out=tmp_path / "run")


def test_infinite_gradients_under_a_finite_loss_halt_and_name_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.inf

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: Spoil.apply(out))  # type: ignore
        try:
            return next_token_loss(model, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(running, "loss_of", lambda *_: loss)
    with pytest.raises(NonFiniteError, match=r"forward pass is finite, gradients are not in .*layers\[1\]\.ffn\.down$"):
        train(recipe(tmp_path), out=tmp_path / "run")


def test_the_first_module_that_is_not_finite_is_named_with_its_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += 1
        bad = calls[0] % 2 == 0  # the second of two micro-batches, also when it is looked at again
        handle = model.model.layers[1].mlp.up_proj.register_forward_hook(  # type: ignore
            lambda _m, _a, out: out * math.nan if bad else out
        )
        try:
            return next_token_loss(model, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(running, "loss_of", lambda *_: loss)
    stages = [{**STAGES[0], "accumulate": 2}]
    # the spoiling hook runs before the watching one, which sees the module's output as it leaves
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.\w+ \(micro-batch 2 of 2\)"):
        train(recipe(tmp_path, stages=stages), out=tmp_path / "run")


def test_weights_that_are_not_finite_are_refused_by_name_before_anything_starts(tmp_path: Path) -> None:
    base = train(recipe(tmp_path), out=tmp_path / "base").folder / "model"
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = math.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    data = tiny.recipe_dict(tmp_path) | {"model": str(base)}
    data.pop("tokenizer", None)
    from frostline.recipe import recipe_from_dict

    with pytest.raises(ModelError, match=r"not finite in layers\[1\]\.attn\.k"):
        train(recipe_from_dict(data), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_halted_runs_last_checkpoint_is_the_state_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {5})
    with pytest.raises(NonFiniteError):
        train(recipe(tmp_path), out=tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    found, rejected = Checkpoints(folder.checkpoints, run=running.run_name(folder)).newest()
    assert found is not None
    assert (found.step, rejected) == (4, [])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
