from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import frostline
from frostline.anatomy import anatomy_of_parts
from frostline.engine import Evaluated, LoopSettings, StageEnded, StageStarted, StepDone, train_loop
from frostline.errors import NonFiniteError
from frostline.recipe import StageSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage
from frostline.selection import select


@dataclass(frozen=True)
class Points:
    x: torch.Tensor
    y: torch.Tensor

    @property
    def n_targets(self) -> int:
        return len(self.y)


class Linear2(nn.Module):
    """y = v · (B x): two layers without a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64) / 5**0.5)
        self.head = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.body.t() @ self.head


def squared_error(model: nn.Module, batch: Points) -> torch.Tensor:
    return (model(batch.x) - batch.y).square().sum()


def points(seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return Points(x, x @ torch.ones(5, dtype=torch.float64))


def linear_run(folder: Path, model: nn.Module, *, learn: tuple[str, ...], steps: int = 20) -> RunFolder:
    anatomy = anatomy_of_parts(model, {"body": ["body"], "head": ["head"]})
    specs = [
        (f"s{i}", StageSpec(learn=e, steps=steps, lr=0.02, optimizer={"name": "sgd"}), select(anatomy, e))  # type: ignore[arg-type]
        for i, e in enumerate(learn)
    ]
    run = RunFolder.create(folder)

    def batches(step: int, _stage: Stage) -> list[Points]:
        return [points(step)]

    done = train_loop(
        model, anatomy, Schedule.of(specs), batches, squared_error, folder=run, settings=LoopSettings(),
        held_out=[points(1000)],
    )  # fmt: skip
    assert (done.steps, done.finished) == (steps * len(learn), True)
    return run


def test_any_module_trains_through_stages_and_its_frozen_part_does_not_move(tmp_path: Path) -> None:
    model = Linear2()
    body = model.body.detach().clone()
    linear_run(tmp_path / "run", model, learn=("head",))
    assert torch.equal(model.body.detach(), body)
    run = linear_run(tmp_path / "both", model, learn=("head", "body"))
    losses = [row["held_out_loss"] for row in run.read_lines(run.metrics) if "held_out_loss" in row]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_training_equals_plain_sgd_written_by_hand(tmp_path: Path) -> None:
    model, by_hand = Linear2(), Linear2()
    linear_run(tmp_path / "run", model, learn=("head", "body | head"))
    for step in range(40):
        data = points(step)
        error = squared_error(by_hand, data) / data.n_targets
        body, head = torch.autograd.grad(error, (by_hand.body, by_hand.head))
        norm = torch.linalg.vector_norm(head if step < 20 else torch.cat([body.flatten(), head]))
        scale = 0.02 * min(1.0, float(1.0 / (norm + 1e-6)))  # the default clip at 1
        decay = 0.02 * 0.01
        with torch.no_grad():
            by_hand.head -= scale * head + decay * by_hand.head
            if step >= 20:
                by_hand.body -= scale * body + decay * by_hand.body
    assert torch.allclose(model.head, by_hand.head, rtol=1e-12, atol=1e-13)
    assert torch.allclose(model.body, by_hand.body, rtol=1e-12, atol=1e-13)


def test_two_runs_of_one_recipe_are_byte_identical(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # whatever the generator was left in
        frostline.train(tiny.recipe(tmp_path, "gpt2", model=tiny.config("gpt2", resid_pdrop=0.2)), out=tmp_path / name)
        files.append([(tmp_path / name / f).read_bytes() for f in ("metrics.jsonl", "model/model.safetensors")])
    assert files[0] == files[1]


def test_observers_see_stages_steps_and_measurements_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def observe(event: object) -> None:
        match event:
            case StageStarted():
                seen.append(("start", event.stage.index))
            case StepDone():
                seen.append(("step", event.step))
            case Evaluated():
                seen.append(("eval", event.step))
            case StageEnded():
                seen.append(("end", event.stage.index))

    frostline.train(tiny.recipe(tmp_path, eval={"every": 2, "batches": 1}), out=tmp_path / "run", observers=[observe])
    assert seen == [
        ("start", 0), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("eval", 3), ("end", 0),
        ("start", 1), ("step", 4), ("eval", 4), ("step", 5), ("step", 6), ("eval", 6), ("end", 1),
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline import run as running
    from frostline.engine import next_token_loss as original

    calls = [0]

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        calls[0] += torch.is_grad_enabled()
        return original(model, batch) * (float("nan") if calls[0] == 5 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "loss_of", lambda *_: loss)
    with pytest.raises(NonFiniteError, match=r"step 5 \(stage ffn, batch 4\)"):
        frostline.train(tiny.recipe(tmp_path), out=tmp_path / "bad")
    monkeypatch.undo()
    stages = [
        {"name": "joint", "learn": "all", "steps": 3, "lr": 3e-3},
        {"name": "ffn", "learn": "ffn", "steps": 1, "lr": 3e-3},
    ]
    frostline.train(tiny.recipe(tmp_path, stages=stages), out=tmp_path / "good")
    bad, good = ((tmp_path / n / "model/model.safetensors").read_bytes() for n in ("bad", "good"))
    assert bad == good
    audit = frostline.audit(tmp_path / "bad")
    assert [e.claim for e in audit.evidence if not e.passed] == ["every stage ran to its end"]


def test_warmup_and_decay_reach_the_optimizer(tmp_path: Path) -> None:
    stages = [{"learn": "ffn", "steps": 4, "lr": 1e-2, "warmup": 1, "decay": "linear"}]
    frostline.train(tiny.recipe(tmp_path, stages=stages), out=tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    rates = [row["lr"] for row in run.read_lines(run.metrics) if "lr" in row]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    losses = []
    for n in (1, 4):
        stages = [{"learn": "all", "steps": 3, "lr": 1e-2, "accumulate": n, "optimizer": {"name": "sgd"}}]
        frostline.train(tiny.recipe(tmp_path, stages=stages), out=tmp_path / str(n))
        run = RunFolder.open(tmp_path / str(n))
        losses.append([row["loss"] for row in run.read_lines(run.metrics) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
