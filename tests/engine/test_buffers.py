"""Buffers stay as they are, whatever a forward pass in training mode does to them; only derived ones do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frostline
from frostline.anatomy import anatomy_of_parts
from frostline.engine import LoopSettings, train_loop
from frostline.engine.buffers import FrozenBuffers, find_derived_buffers
from frostline.recipe import StageSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule
from frostline.selection import select


@dataclass(frozen=True)
class Rows:
    x: torch.Tensor

    @property
    def n_targets(self) -> int:
        return len(self.x)


def rows(seed: int) -> Rows:
    return Rows(3 + 2 * torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)))


class Model(nn.Module):
    """Two normalised layers, and buffers that its forward pass writes in other ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.first_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last, self.last_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("constant", torch.arange(5.0))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.cache: torch.Tensor
        self.replaced: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x.detach()[0, :2] + len(x)  # in evaluation too: what it holds follows from the input
        if self.training:
            self.replaced = self.replaced + 1
        return self.last_norm(self.last(torch.relu(self.first_norm(self.first(x)))))


PARTS = {
    "first": ["first", "first_norm"],
    "last": ["last", "last_norm"],
    "position": ["replaced", "constant", "cache"],
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def mean_square(model: nn.Module, data: Rows) -> torch.Tensor:
    return (model(data.x) - 1).square().mean(1).sum()


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


def train(folder: Path, model: nn.Module, *learn: str, parts: dict[str, Any] = PARTS, **settings: Any) -> RunFolder:
    anatomy = anatomy_of_parts(model, parts)
    specs = [
        (f"s{i}", StageSpec.model_validate({"learn": e, "steps": 3, "lr": 1e-2, **settings}), select(anatomy, e))
        for i, e in enumerate(learn)
    ]
    run = RunFolder.create(folder)
    done = train_loop(
        model, anatomy, Schedule.of(specs), lambda step, _: [rows(step)], mean_square, folder=run,
        settings=LoopSettings(), held_out=[rows(100)],
    )  # fmt: skip
    run.write_status("finished", step=done.steps)
    return run


@pytest.mark.parametrize("policy", ["off", "on"])
def test_batch_statistics_of_frozen_and_of_learning_modules_are_put_back(tmp_path: Path, policy: str) -> None:
    model = Model()
    before = buffers_of(model)
    run = train(tmp_path / "run", model, "last", "first | last", frozen_dropout=policy)
    after = buffers_of(model)
    assert [n for n in before if n != "cache" and not torch.equal(before[n], after[n])] == []
    audit = frostline.audit(run.path)
    assert audit.passed
    restored = [set(row["buffers_restored"]) for row in run.read_lines(run.endings)]
    last, first = ({f"{name}.{s}" for s in STATISTICS} for name in ("last_norm", "first_norm"))
    with_first = {"replaced", *last, *first}
    assert restored == [with_first if policy == "on" else {"replaced", *last}, with_first]


def test_a_name_is_reported_once_per_stage_in_the_models_order(tmp_path: Path) -> None:
    run = train(tmp_path / "run", Model(), "all")
    (row,) = run.read_lines(run.endings)
    expected = ["replaced", *(f"{n}.{s}" for n in ("first_norm", "last_norm") for s in STATISTICS)]
    assert row["buffers_restored"] == expected


def test_statistics_put_back_do_not_keep_a_learning_norm_from_normalising_by_its_batch(tmp_path: Path) -> None:
    """In training a batch norm needs its batch alone; the loss is that of a model whose statistics drift."""
    losses = []
    for put_back in (True, False):
        model = Model()
        with pytest.MonkeyPatch.context() as patch:
            if not put_back:
                patch.setattr(FrozenBuffers, "restore", lambda _: [])
            run = train(tmp_path / str(put_back), model, "all")
        losses.append([row["loss"] for row in run.read_lines(run.metrics) if "loss" in row])
    assert losses[0] == losses[1]


def test_derived_buffers_are_found_left_alone_and_said_to_be_derived(tmp_path: Path) -> None:
    assert find_derived_buffers(Model(), rows(0), mean_square) == ("cache",)
    model = Model()
    run = train(tmp_path / "run", model, "all")
    assert run.read_boundaries()[0].derived == ("cache",)
    assert torch.equal(model.cache, rows(100).x[0, :2] + 16)  # as the last forward pass left it
    (row,) = run.read_lines(run.endings)
    assert "cache" not in row["buffers_restored"]
    kept = FrozenBuffers(model, ("cache",))
    model.eval()(rows(7).x)
    assert kept.restore() == []
    assert torch.equal(model.cache, rows(7).x[0, :2] + 16)


def test_a_replaced_buffer_is_the_old_object_again_with_its_old_values() -> None:
    model = Model()
    old = model.replaced
    frozen = FrozenBuffers(model, ("cache",))
    model.replaced = torch.full((7,), 5.0)  # another shape too
    assert frozen.restore() == ["replaced"]
    assert model.replaced is old
    assert torch.equal(old, torch.zeros(3))
    model.replaced = torch.zeros(3)  # equal values: still not the model's own buffer
    assert frozen.restore() == ["replaced"]
    assert model.replaced is old


def test_a_buffer_both_written_and_replaced_is_put_back_and_named_once() -> None:
    model = Model()
    old = model.replaced
    frozen = FrozenBuffers(model, ())
    old.add_(1)
    model.replaced = torch.ones(3)
    assert frozen.restore() == ["replaced"]
    assert model.replaced is old
    assert torch.equal(old, torch.zeros(3))


def test_a_buffer_set_to_none_or_deleted_comes_back() -> None:
    model = Model()
    frozen = FrozenBuffers(model, ())
    old = model.first_norm.running_mean
    model.first_norm.running_mean = None
    del model.constant
    assert frozen.restore() == ["constant", "first_norm.running_mean"]
    assert model.first_norm.running_mean is old
    assert torch.equal(model.constant, torch.arange(5.0))  # type: ignore[arg-type]


def test_a_buffer_that_two_modules_share_stays_shared() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)})
    model["b"].running_mean = model["a"].running_mean
    frozen = FrozenBuffers(model, ())
    for m in model.values():
        m(rows(0).x)
    changed = frozen.restore()
    assert len(changed) == len(set(changed))
    assert {"a.running_mean", "a.running_var", "b.running_var"} <= set(changed)
    assert model["b"].running_mean is model["a"].running_mean
    assert torch.equal(model["a"].running_mean, torch.zeros(4))  # type: ignore[arg-type]
    assert frozen.restore() == []


def test_batch_statistics_change_without_a_word_from_their_version_counter() -> None:
    """Why the bytes are compared: torch's batch norm writes its statistics unseen (torch 2.13)."""
    norm = nn.BatchNorm1d(4)
    version = norm.running_mean._version  # type: ignore[union-attr]
    norm(rows(0).x)
    assert norm.running_mean._version == version  # type: ignore[union-attr]
    assert bool(norm.running_mean.any())  # type: ignore[union-attr]


def test_what_was_not_written_is_not_touched_and_what_was_written_with_its_own_values_is_not_reported() -> None:
    model = Model()
    frozen = FrozenBuffers(model, ())
    versions = {n: b._version for n, b in model.named_buffers()}
    assert frozen.restore() == []
    assert versions == {n: b._version for n, b in model.named_buffers()}
    model.constant.mul_(1)  # type: ignore[operator]
    assert frozen.restore() == []


def test_restoring_again_and_again_works_at_every_step() -> None:
    model = Model()
    frozen = FrozenBuffers(model, ("cache",))
    before = buffers_of(model)
    for seed in range(3):
        model.train()(rows(seed).x)
        assert set(frozen.restore()) == {"replaced", *(f"{n}_norm.{s}" for n in ("first", "last") for s in STATISTICS)}
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n != "cache")


class Signs(nn.Module):
    """A buffer whose bytes change although its values compare equal, and one that holds no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("zero", torch.zeros(4))
        self.register_buffer("nothing", torch.full((2,), torch.nan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.zero.neg_()  # type: ignore[operator]
            self.nothing.mul_(1)  # type: ignore[operator]
        return x * self.weight


def test_a_zero_that_changes_its_sign_is_put_back_and_a_nan_that_stays_is_not_reported(tmp_path: Path) -> None:
    """Frozen means bytes: -0.0 equals 0.0, and NaN does not equal itself."""
    model = Signs()
    run = train(tmp_path / "run", model, "body", parts={"body": ["weight"], "position": ["zero", "nothing"]})
    assert not torch.signbit(model.zero).any()  # type: ignore[arg-type]
    (row,) = run.read_lines(run.endings)
    assert row["buffers_restored"] == ["zero"]
    assert frostline.audit(run.path).passed


class BehindTheCounter(nn.Module):
    """Writes its buffer through `.data`, which tells nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.bias.data.add_(1)  # type: ignore[operator]
        return x * self.weight


def test_a_buffer_written_behind_its_version_counter_is_put_back_or_fails_the_audit(tmp_path: Path) -> None:
    model = BehindTheCounter()
    run = train(tmp_path / "run", model, "body", parts={"body": ["weight"], "router": ["bias"]})
    audit = frostline.audit(run.path)
    moved = [(r.component, r.verdict) for r in audit.failures]
    was_put_back = not bool(model.bias.any())  # type: ignore[operator]
    assert (audit.passed, moved) == ((True, []) if was_put_back else (False, [("router", "FROZEN BUT MOVED")]))
