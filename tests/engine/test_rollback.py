"""Going back to a checkpoint without the batches since, and losses that spike."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from frostline import audit, train
from frostline import ready as ready_module
from frostline import run as running
from frostline.data import Batch
from frostline.engine.loss import next_token_loss
from frostline.engine.rollback import batch_of, is_spike, last_return, window_of
from frostline.errors import NonFiniteError, RecipeError, SpikeError
from frostline.recipe import Recipe, SpikeSpec
from frostline.run_folder import RunFolder

STAGES: list[dict[str, Any]] = [
    {"name": "joint", "learn": "all", "steps": 4, "lr": 3e-3},
    {"name": "ffn", "learn": "ffn", "steps": 8, "lr": 3e-3, "state": "keep"},
]


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans take most of the time of a tiny run, and train nothing."""
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)


def recipe(folder: Path, **more: Any) -> Recipe:
    data = {
        "stages": STAGES,
        "checkpoint": {"every": 3, "minutes": None, "keep": 2},
        "nonfinite": {"policy": "rollback"},
        "eval": {"every": 2, "batches": 1},
        "evidence": {"gradients_every": 1},
    }
    return tiny.recipe(folder, **(data | more))


class Spoiled:
    """A loss that is multiplied on some batches (0-based), whenever they come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: set[int], factor: float = math.nan) -> None:
        self.bad, self.factor = batches, factor
        self.seen: list[int] = []  # batch 0 once more at the start, to find derived buffers
        original: Callable[..., Any] = running.batches_of

        def numbered(*args: Any, **kwargs: Any) -> Callable[..., list[Batch]]:
            inner = original(*args, **kwargs)

            def batches(batch: int, stage: Any) -> list[Batch]:
                self.seen.append(batch)
                return inner(batch, stage)

            return batches

        monkeypatch.setattr(running, "batches_of", numbered)
        monkeypatch.setattr(running, "loss_of", lambda *_: self.loss)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return next_token_loss(model, batch) * (self.factor if self.seen[-1] in self.bad else 1.0)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5), st.integers(0, 40))
def test_batches_count_on_over_what_was_left_out_and_none_comes_twice(
    rollbacks: list[tuple[int, int]], later: int
) -> None:
    """Against a reference that lays the batches out one by one."""
    windows: list[tuple[int, int]] = []
    gone: set[int] = set()
    back = 0
    for forward, width in rollbacks:
        back += forward
        step = back + width
        left = [b for b in range(200) if b not in gone]
        assert batch_of(step, windows) == left[step]
        window = window_of(back, step, windows)
        assert set(range(*window)) - gone == set(left[back : step + 1])
        windows.append(window)
        gone |= set(left[back : step + 1])
        assert last_return(windows) == back
    assert batch_of(back + later, windows) == [b for b in range(200) if b not in gone][back + later]


def test_a_rollback_goes_to_the_last_checkpoint_leaves_the_batches_out_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = Spoiled(monkeypatch, {7})
    result = train(recipe(tmp_path), out=tmp_path / "run")
    assert spoiled.seen[1:] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], "steps 7 and 8 were done, and done again"
    assert (result.state, result.steps) == ("finished", 12)
    assert result.audit.passed
    (marker,) = [r for r in rows(tmp_path / "run") if "rolled_back_to" in r]
    assert (marker["step"], marker["rolled_back_to"], marker["left_out"]) == (8, 6, [6, 8])
    assert math.isnan(marker["loss"])
    assert "first in the loss itself" in marker["why"]
    steps = [r["step"] for r in rows(tmp_path / "run") if "loss" in r and "rolled_back_to" not in r]
    assert steps == [*range(1, 8), *range(7, 13)], "the log is appended to, never repaired"
    folder = RunFolder.open(tmp_path / "run")
    assert [r["step"] for r in folder.read_lines(folder.metrics) if "loss" in r] == [*range(1, 13)]
    assert [g.step for g in folder.read_gradients()] == [*range(1, 13)]
    (evidence,) = [e for e in result.audit.evidence if "went back" in e.claim]
    assert evidence.measured == "1: step 8 → 6, without batches 6 to 7"


@pytest.mark.parametrize("bad", [4, 5])
def test_after_a_rollback_to_a_stages_start_training_is_that_of_a_run_without_those_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """Batch 4 is the first of the second stage, whose checkpoint is the end of the first; against a run that never had
    the batches that were left out."""
    with monkeypatch.context() as patch:
        Spoiled(patch, {bad})
        train(recipe(tmp_path), out=tmp_path / "run")
    original: Callable[..., Any] = running.batches_of
    shift = bad - 3

    def shifted(*args: Any, **kwargs: Any) -> Callable[..., list[Batch]]:
        inner = original(*args, **kwargs)
        return lambda batch, stage: inner(batch if batch < 4 else batch + shift, stage)

    monkeypatch.setattr(running, "batches_of", shifted)
    train(recipe(tmp_path), out=tmp_path / "other")
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("run", "other"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    losses = [
        [(r["step"], r["loss"]) for r in RunFolder(f).read_lines(f / "metrics.jsonl") if "loss" in r]
        for f in (tmp_path / "run", tmp_path / "other")
    ]
    assert losses[0] == losses[1]


def test_before_any_other_checkpoint_the_run_goes_back_to_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = Spoiled(monkeypatch, {0, 3})
    result = train(recipe(tmp_path), out=tmp_path / "run")
    assert spoiled.seen[1:7] == [0, 1, 2, 3, 4, 5]
    assert result.audit.passed
    markers = [r for r in rows(tmp_path / "run") if "rolled_back_to" in r]
    assert [(m["step"], m["rolled_back_to"], m["left_out"]) for m in markers] == [(1, 0, [0, 1]), (3, 0, [1, 4])]


def test_too_many_rollbacks_halt_the_run_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoiled(monkeypatch, set(range(7, 40)))
    with pytest.raises(NonFiniteError, match=r"went back 2 times before, and may no more \(limit 2\)"):
        train(recipe(tmp_path, nonfinite={"policy": "rollback", "limit": 2}), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert "BUT" not in str([r.verdict for r in audit(tmp_path / "run").rows])


def test_without_a_checkpoint_that_verifies_the_run_halts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = Spoiled(monkeypatch, {6})

    def damage(event: object) -> None:
        for path in (tmp_path / "run" / "checkpoints").glob("step-*/weights.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        del event

    with pytest.raises(NonFiniteError, match="no checkpoint from step 4 to 6 verifies"):
        train(recipe(tmp_path, checkpoint={"every": 5}), out=tmp_path / "run", observers=[damage])
    assert spoiled.seen[-1] == 6


def test_a_rollback_needs_checkpoints_at_fixed_steps(tmp_path: Path) -> None:
    for more in ({}, {"nonfinite": {"policy": "halt"}, "spike": {"policy": "rollback"}}):
        with pytest.raises(RecipeError, match=r"checkpoint: \{every: 100\}"):
            recipe(tmp_path, checkpoint={"minutes": 1.0}, **more)


def test_a_log_that_does_not_follow_fails_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoiled(monkeypatch, {7})
    run = train(recipe(tmp_path), out=tmp_path / "run").folder
    lines = (run / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "rolled_back_to" in line)
    for change in (
        lines[: at - 1] + lines[at:],
        [*lines[:at], lines[at].replace("[6, 8]", "[6, 7]"), *lines[at + 1 :]],
        lines[: at + 1] + lines[at + 2 :],
    ):
        copy = shutil.copytree(run, tmp_path / "copy")
        (copy / "metrics.jsonl").write_text("\n".join(change) + "\n")
        (evidence,) = [e for e in audit(copy).evidence if "log lacks" in e.claim]
        assert not evidence.passed
        shutil.rmtree(copy)


def test_a_spike_is_a_loss_above_a_multiple_of_the_median_once_there_are_enough() -> None:
    spec = SpikeSpec(factor=2.0, window=4)
    assert is_spike(8.1, [1.0, 4.0, 4.0, 100.0], spec)
    assert not is_spike(8.0, [1.0, 4.0, 4.0, 100.0], spec)
    assert not is_spike(99.0, [4.0, 4.0, 4.0], spec)
    assert not is_spike(99.0, [4.0] * 4, None)
    assert is_spike(8.1, [100.0, 4.0, 4.0, 4.0, 4.0], spec), "only the window counts"
    assert not is_spike(math.inf, [4.0] * 4, spec), "that is not finite, which is another matter"


def test_spikes_are_not_looked_for_unless_asked_and_then_marked_halted_at_or_gone_back_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiled(monkeypatch, {7}, factor=5.0)
    halt = {"nonfinite": {"policy": "halt"}}
    train(recipe(tmp_path, **halt), out=tmp_path / "off")
    assert not any("spike" in r for r in rows(tmp_path / "off"))
    spike = {"factor": 3.0, "window": 3}
    train(recipe(tmp_path, spike=spike, **halt), out=tmp_path / "warn")
    assert [r["step"] for r in rows(tmp_path / "warn") if r.get("spike")] == [8]
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("off", "warn"))
    assert all(torch.equal(one[n], other[n]) for n in one), "a warning changes nothing"
    with pytest.raises(SpikeError, match=r"step 8 .* is a spike, above 3 times the median of the 3 losses before it"):
        train(recipe(tmp_path, spike={**spike, "policy": "halt"}, **halt), out=tmp_path / "halt")
    result = train(recipe(tmp_path, spike={**spike, "policy": "rollback"}, **halt), out=tmp_path / "back")
    assert result.audit.passed
    (marker,) = [r for r in rows(tmp_path / "back") if "rolled_back_to" in r]
    assert (marker["step"], marker["rolled_back_to"]) == (8, 6)
    assert math.isfinite(marker["loss"])


def test_buffers_that_the_bad_step_wrote_are_put_back_when_the_run_halts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        out = next_token_loss(model, batch)
        if model.training:
            model.get_buffer("model.rotary_emb.original_inv_freq").mul_(math.nan)
        return out * math.nan

    monkeypatch.setattr(running, "loss_of", lambda *_: loss)
    with pytest.raises(NonFiniteError):
        train(recipe(tmp_path, nonfinite={"policy": "halt"}), out=tmp_path / "run")
    found = audit(tmp_path / "run")
    assert found.failures == ()
    assert {r.verdict for r in found.rows if r.declared == "learns" and r.stage == "joint"} == {"no step done"}


def test_a_stage_whose_every_step_was_skipped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoiled(monkeypatch, {4, 5})
    stages = [STAGES[0], {**STAGES[1], "steps": 2}]
    result = train(recipe(tmp_path, stages=stages, nonfinite={"policy": "skip"}), out=tmp_path / "run")
    verdicts = {r.verdict for r in result.audit.rows if r.stage == "ffn" and r.declared == "learns"}
    assert verdicts == {"every step skipped"}
    assert result.audit.passed
    (evidence,) = [e for e in result.audit.evidence if "skipped" in e.claim]
    assert evidence.measured == "2 of 6, 2 in a row"
    ending = json.loads((tmp_path / "run" / "endings.jsonl").read_text().splitlines()[-1])
    assert set(ending["unmoved"].values()) == {"every step was skipped"}
