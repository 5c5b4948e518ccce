"""Frostline in a loop of the user's own: what was named learns, nothing else does, and the folder says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import frostline
from frostline.anatomy import put, read_anatomy
from frostline.deltas import export_delta
from frostline.errors import FrostlineError, RunFolderError, SelectionError
from frostline.export import export_run
from frostline.run_folder import RunFolder


def losses(model: nn.Module, n_steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """One loss per step, on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        ids = torch.randint(tiny.VOCABULARY, (4, 17), generator=generator)
        yield model(input_ids=ids, labels=ids).loss


def train(model: nn.Module, run: frostline.Learning, n_steps: int = 3, **settings: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(run.parameter_groups(weight_decay=0.1), lr=1e-2, **settings)
    for loss in losses(model, n_steps):
        loss.backward()
        run.clip(1.0)
        optimizer.step()
        model.zero_grad()  # knows nothing of the leaves of slices: they must not add up all the same
    return optimizer


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


LEARN = [("llama", "ffn"), ("gpt2", "attn.heads[1] | layers[0].ffn.neurons[3:9]"), ("mixtral", "experts[1] | router")]


@pytest.mark.parametrize(("architecture", "learn"), LEARN)
@pytest.mark.parametrize("fused", [True, False])
def test_exactly_what_was_named_moves_and_the_audit_of_the_folder_passes(
    tmp_path: Path, architecture: str, learn: str, fused: bool
) -> None:
    model = tiny.model(architecture)
    before = values(model)
    with frostline.learning(model, learn, out=tmp_path / "run") as run:
        train(model, run, fused=fused)
    allowed = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in before.items()}
    for s in frostline.select(read_anatomy(model), learn).slices:
        put(allowed[s.tensor], s, torch.ones(s.shape, dtype=torch.bool))
    for name, changed in moved(model, before).items():
        assert not bool((changed & ~allowed[name]).any()), name
        assert not bool(allowed[name].any()) or bool(changed.any()), name
    verdict = frostline.audit(tmp_path / "run")
    assert verdict.passed, [e for e in verdict.evidence if not e.passed]
    assert run.audit().passed


def test_the_loop_trains_as_the_same_loop_without_frostline_where_whole_tensors_learn(tmp_path: Path) -> None:
    mine, plain = tiny.model("llama"), tiny.model("llama")
    with frostline.learning(mine, "ffn", out=tmp_path / "run") as run:
        train(mine, run)
    for name, p in plain.named_parameters():
        p.requires_grad_(".mlp." in name)
    learning = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    for loss in losses(plain, 3):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), plain.state_dict().values(), strict=True))


def test_stages_follow_one_another_and_each_needs_an_optimizer_of_its_own(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    with frostline.learning(model, ["layers[1].ffn", "attn.q", "attn"], out=tmp_path / "run") as run:
        first = train(model, run)
        run.next_stage()
        assert run.stage == "stage-2"
        with pytest.raises(FrostlineError, match="an optimizer"):
            first.step()
        second = train(model, run)
        run.next_stage()
        with pytest.raises(FrostlineError, match=r"earlier stage|not what learns"):
            second.step()
        train(model, run)
        with pytest.raises(FrostlineError, match="last stage"):
            run.next_stage()
    stages = RunFolder.open(tmp_path / "run").read_schedule()
    assert [(s.start, s.end) for s in stages] == [(0, 3), (3, 6), (6, 9)]
    assert frostline.audit(tmp_path / "run").passed


def test_two_optimizers_that_share_the_learning_parts_make_one_step_together(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    with frostline.learning(model, "attn.q | final_norm", out=tmp_path / "run") as run:
        leaves = [p for g in run.parameter_groups() for p in g["params"]]
        pair = [torch.optim.SGD(leaves[::2], lr=0.1), torch.optim.AdamW(leaves[1::2], lr=1e-2)]
        for loss in losses(model, 4):
            loss.backward()
            for optimizer in pair:
                optimizer.step()
            model.zero_grad()
    assert run.steps == 4
    assert frostline.audit(tmp_path / "run").passed


@pytest.mark.parametrize(("architecture", "learn"), [("llama", "ffn"), ("gpt2", "attn.q")])
def test_an_optimizer_over_more_than_what_learns_is_refused_before_it_does_anything(
    tmp_path: Path, architecture: str, learn: str
) -> None:
    model = tiny.model(architecture)
    before = values(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loop() -> None:
        with frostline.learning(model, learn, out=tmp_path / "run"):
            next(losses(model, 1)).backward()
            optimizer.step()

    with pytest.raises(FrostlineError, match=r"run\.parameter_groups"):
        loop()
    assert not any(bool(m.any()) for m in moved(model, before).values())
    status = RunFolder.open(tmp_path / "run").read_status()
    assert status["state"] == "failed"


def test_a_step_with_a_closure_is_refused(tmp_path: Path) -> None:
    model = tiny.model("gpt2")

    def loop() -> None:
        with frostline.learning(model, "attn.q", out=tmp_path / "run") as run:
            optimizer = torch.optim.LBFGS([p for g in run.parameter_groups() for p in g["params"]])
            optimizer.step(lambda: next(losses(model, 1)))

    with pytest.raises(FrostlineError, match="closure"):
        loop()


def test_optimizers_of_other_models_and_after_the_context_are_left_alone(tmp_path: Path) -> None:
    model, other = tiny.model("llama"), nn.Linear(2, 2)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with frostline.learning(model, "ffn", out=tmp_path / "run") as run:
        train(model, run)
        other(torch.ones(1, 2)).sum().backward()
        foreign.step()
    assert run.steps == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    next(losses(model, 1)).backward()
    optimizer.step()
    assert run.steps == 3


def test_afterwards_the_model_is_as_it_was_given(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    model.eval()
    model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with frostline.learning(model, "attn.q", out=tmp_path / "run") as run:
        model.train()
        train(model, run)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m.training for m in model.modules())
    next(losses(model, 1)).backward()
    assert model.get_parameter("transformer.h.0.attn.c_attn.weight").grad is not None  # the hooks are gone


def test_an_error_in_the_loop_is_passed_on_and_the_folder_says_that_the_run_failed(tmp_path: Path) -> None:
    model = tiny.model("llama")

    def loop() -> None:
        with frostline.learning(model, "ffn", out=tmp_path / "run") as run:
            train(model, run)
            raise ZeroDivisionError("the loop's own")

    with pytest.raises(ZeroDivisionError):
        loop()
    assert "ZeroDivisionError" in RunFolder.open(tmp_path / "run").read_status()["message"]


def test_a_loop_without_a_step_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(FrostlineError, match="made a step"),
        frostline.learning(tiny.model("llama"), "ffn", out=tmp_path / "run"),
    ):
        pass


def test_a_wrong_selection_writes_nothing(tmp_path: Path) -> None:
    model = tiny.model("llama")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SelectionError), frostline.learning(model, "ffnn", out=tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_frozen_dropout_stays_off_even_after_the_loops_own_train_call(tmp_path: Path) -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0)
    seen = []
    attention = model.transformer.h[0].attn  # type: ignore[union-attr, index]
    attention.register_forward_hook(lambda m, *_: seen.append(m.training))
    for on in (False, True):
        folder = tmp_path / f"run-{on}"
        with frostline.learning(model, "ffn", out=folder, frozen_dropout=on) as run:
            model.train()
            train(model, run, 1)
    assert seen == [False, True]


def test_a_saved_model_and_the_logged_numbers_are_in_the_folder(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with frostline.learning(model, "ffn", out=tmp_path / "run") as run:
        train(model, run)
        run.log(loss=1.5)
        run.save()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 3, "stage": "stage-1", "loss": 1.5}
    verdict = frostline.audit(tmp_path / "run")
    assert verdict.passed
    assert {r.basis for r in verdict.rows if r.verdict == "moved"} == {"recomputed"}


@pytest.mark.parametrize("write", [export_run, export_delta])
def test_exporting_it_says_where_its_model_is(tmp_path: Path, write: Callable[[Path, Path], Path]) -> None:
    model = tiny.model("llama")
    with frostline.learning(model, "ffn", out=tmp_path / "run") as run:
        train(model, run)
        run.save()
    with pytest.raises(RunFolderError, match=r"of a loop of your own .*its model is .*/run/model"):
        write(tmp_path / "run", tmp_path / "out")


def test_any_module_with_named_parts_can_be_trained(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    parts = {"body": ["0"], "norm": ["1"], "head": ["2"]}
    statistics = module[1].running_mean.clone()  # type: ignore[union-attr]
    with frostline.learning(module, "head", out=tmp_path / "run", parts=parts) as run:
        optimizer = torch.optim.SGD(run.parameter_groups(), lr=0.1)
        for _ in range(3):
            module.train()
            module(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(module[1].running_mean, statistics)  # type: ignore[union-attr]
    assert frostline.audit(tmp_path / "run").passed


def test_a_part_moved_behind_the_loops_back_fails_the_audit_and_is_named(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with frostline.learning(model, "ffn", out=tmp_path / "run") as run:
        train(model, run)
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.q_proj.weight").mul_(1.01)
    verdict = frostline.audit(tmp_path / "run")
    assert not verdict.passed
    assert {(r.component, r.verdict) for r in verdict.failures} == {("layers[1].attn.q", "FROZEN BUT MOVED")}


@pytest.mark.parametrize("learn", ["ffn", "attn.heads[1]"])
def test_a_loop_goes_on_from_a_checkpoint_of_its_own_to_the_same_bytes(tmp_path: Path, learn: str) -> None:
    whole, cut = tiny.model("llama"), tiny.model("llama")
    with frostline.learning(whole, learn, out=tmp_path / "whole") as run:
        train(whole, run, 5)
    saved: dict[str, Any] = {}

    def first() -> None:
        with frostline.learning(cut, learn, out=tmp_path / "cut") as run:
            optimizer = train(cut, run, 3)
            saved.update(model=values(cut), optimizer=optimizer.state_dict())
            saved["progress"] = json.dumps(run.progress().to_json())
            train(cut, run, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first()
    again = tiny.model("llama", seed=1)
    since = frostline.Progress.from_json(json.loads(saved["progress"]), tmp_path)
    not_it = pytest.raises(RunFolderError, match="not the one that was saved after step 3")
    with not_it, frostline.learning(again, learn, out=tmp_path / "cut", since=since):
        pass
    again.load_state_dict(saved["model"], strict=False)
    with frostline.learning(again, learn, out=tmp_path / "cut", since=since) as run:
        optimizer = torch.optim.AdamW(run.parameter_groups(weight_decay=0.1), lr=1e-2)
        optimizer.load_state_dict(saved["optimizer"])
        for loss in islice(losses(again, 5), 3, None):
            loss.backward()
            run.clip(1.0)
            optimizer.step()
            again.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(values(again).values(), values(whole).values(), strict=True))
    assert run.steps == 5
    assert run.audit().passed
    boundary = "evidence/boundary-1.json"
    assert (tmp_path / "cut" / boundary).read_bytes() == (tmp_path / "whole" / boundary).read_bytes()
