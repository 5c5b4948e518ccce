"""What learns has its leaves in the host's memory: the same bits, another place, and counted there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import frostline
from frostline import ready as ready_module
from frostline.anatomy import read_anatomy
from frostline.engine import StepDone
from frostline.engine.optimizers import leaf_device, make_optimizer
from frostline.engine.owned import Owned, model_elsewhere, on_host
from frostline.engine.stage_switch import switch
from frostline.errors import RecipeError
from frostline.model import load_fake, load_model, load_skeleton
from frostline.plan import Batching, StageCost, make_plan, trace_stage
from frostline.recipe import ScratchModel, StageSpec, recipe_from_dict
from frostline.resume import resume
from frostline.schedule import Schedule, Stage
from frostline.selection import select

FILES = ("metrics.jsonl", "evidence/gradients.jsonl", "model/model.safetensors")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves are made as if the model were on a device; without plans, which take most of a run's time."""
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)
    with model_elsewhere():
        yield


def ended(folder: Path, out: str, optimizer: dict[str, Any], **changes: Any) -> dict[str, bytes]:
    stages = [
        {"name": "a", "learn": "ffn | attn.q", "steps": 3, "lr": 1e-2, "optimizer": optimizer, "accumulate": 2},
        {"name": "b", "learn": "ffn | head.rows[3:9,12]", "steps": 3, "lr": 1e-2, "optimizer": optimizer},
    ]
    result = frostline.train(recipe_from_dict(tiny.recipe_dict(folder, stages=stages, **changes)), out=folder / out)
    assert result.audit.passed
    return {name: (folder / out / name).read_bytes() for name in FILES}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ({"name": "adamw"}, {}),
        ({"name": "sgd", "momentum": 0.9}, {}),
        ({"name": "muon"}, {}),
        ({"name": "adafactor"}, {}),
        ({"name": "adamw"}, {"precision": "bf16"}),
        ({"name": "adamw"}, {"precision": "bf16", "rounding": "stochastic"}),
        ({"name": "adamw"}, {"precision": "bf16", "rounding": "nearest"}),
    ],
    ids=str,
)
def test_a_run_whose_leaves_are_apart_ends_with_the_same_bytes(
    tmp_path: Path, optimizer: dict[str, Any], changes: dict[str, Any]
) -> None:
    beside = ended(tmp_path, "beside", optimizer, **changes)
    assert ended(tmp_path, "apart", {**optimizer, "device": "cpu"}, **changes) == beside


def test_on_a_cpu_it_changes_nothing() -> None:
    model, anatomy = tiny.model("llama"), tiny.anatomy("llama")
    active = switch(dict(model.named_parameters()), anatomy, stage_of("ffn", device="cpu"), memory={}, leaving=None)
    assert not any(o.is_copy for o in active.ownership.owned)
    assert not active.ownership.is_offloaded


@pytest.mark.usefixtures("elsewhere")
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    stages = [{"name": "a", "learn": "ffn", "steps": 5, "lr": 1e-2, "optimizer": {"name": "adamw", "device": "cpu"}}]
    recipe = recipe_from_dict(tiny.recipe_dict(tmp_path, stages=stages, precision="bf16"))

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    frostline.train(recipe, out=tmp_path / "whole")
    assert frostline.train(recipe, out=tmp_path / "stopped", observers=[stop]).state == "interrupted"
    assert resume(tmp_path / "stopped").audit.passed
    for name in FILES:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stage_of(learn: str, name: str = "adamw", **settings: Any) -> Stage:
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, "optimizer": {"name": name, **settings}})
    return Schedule.of([("only", spec, select(tiny.anatomy("llama"), learn, ties="together"))]).stages[0]


def test_it_is_refused_where_it_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="adamw8bit keeps its state small"):
        stage_of("ffn", "adamw8bit", device="cpu")
    with pytest.raises(ValueError, match="device"):
        stage_of("ffn", device="cuda")
    stage = stage_of("ffn", device="cpu")
    assert leaf_device(stage) == torch.device("cpu")
    model, anatomy = tiny.model("llama"), tiny.anatomy("llama")
    active = switch(dict(model.named_parameters()), anatomy, stage, memory={}, leaving=None)
    monkeypatch.setattr(Owned, "is_sharded", True)
    with pytest.raises(RecipeError, match=r"optimizer\.device: .* is spread over processes"):
        make_optimizer(active.ownership.owned, stage)


def cost(device: str | None, *, on: str = "cuda", learn: str = "ffn", precision: str = "fp32") -> StageCost:
    source = tiny_source()
    anatomy = read_anatomy(load_skeleton(source))
    spec = StageSpec.model_validate(
        {"learn": learn, "steps": 1, "lr": 1e-3, "optimizer": {"name": "adamw", "device": device}}
    )
    schedule = Schedule.of([("only", spec, select(anatomy, learn, ties="together"))])
    weights = "bf16" if precision == "bf16" else "fp32"
    plan = make_plan(source, schedule, Batching(rows=2, length=32, device=on, weights=weights))  # type: ignore[arg-type]
    return plan.stages[0].cost


def tiny_source() -> ScratchModel:
    return ScratchModel.model_validate(tiny.config("llama", hidden_size=64, intermediate_size=1024))


def n_learning(learn: str = "ffn") -> int:
    return select(read_anatomy(load_skeleton(tiny_source())), learn, ties="together").n_elements


def only_of_passes(found: StageCost, gradient_bytes: int) -> bool:
    """Whether the device holds model and activations, and never more gradients than those of one of three layers."""
    return (
        0
        <= found.transient_bytes
        == found.peak_bytes - found.weight_bytes - found.activation_bytes
        <= gradient_bytes / 3
    )


def test_a_plan_for_cuda_has_gradients_copies_and_state_at_the_host_and_not_on_the_device() -> None:
    beside, apart = cost(None), cost("cpu")
    n = n_learning()
    assert beside.host_bytes == 0
    assert apart.host_bytes == pytest.approx(4 * 4 * n, rel=0.01)  # copy, gradient, two moments
    assert (apart.copy_bytes, apart.gradient_bytes, apart.state_bytes) == (4 * n, 4 * n, 8 * n)
    assert apart.flops == beside.flops
    assert beside.peak_bytes >= beside.weight_bytes + 12 * n
    assert only_of_passes(apart, 4 * n)


def test_masters_of_bf16_weights_are_at_the_host_too() -> None:
    beside, apart = cost(None, precision="bf16"), cost("cpu", precision="bf16")
    n = n_learning()
    assert apart.host_bytes == pytest.approx(16 * n, rel=0.01)
    assert beside.peak_bytes >= beside.weight_bytes + 16 * n
    assert only_of_passes(apart, 2 * n)


def test_a_plan_for_a_cpu_is_the_same() -> None:
    assert cost("cpu", on="cpu") == cost(None, on="cpu")


def test_what_is_planned_is_what_a_real_step_holds() -> None:
    """A model on the CPU whose leaves are made as if it were elsewhere, metered and planned."""
    source = tiny_source()
    anatomy = read_anatomy(load_skeleton(source))
    spec = StageSpec.model_validate(
        {"learn": "ffn", "steps": 1, "lr": 1e-3, "optimizer": {"name": "adamw", "device": "cpu"}}
    )
    stage = Schedule.of([("only", spec, select(anatomy, "ffn"))]).stages[0]
    fake, mode = load_fake(source)
    with model_elsewhere():
        real = trace_stage(load_model(source), anatomy, stage, rows=2, length=32, n_vocabulary=tiny.VOCABULARY)
        planned = trace_stage(fake, anatomy, stage, rows=2, length=32, n_vocabulary=tiny.VOCABULARY, mode=mode)
    assert real.host_bytes == pytest.approx(planned.host_bytes, rel=0.02)
    assert real.peak_bytes == pytest.approx(planned.peak_bytes, rel=0.02)
    assert not on_host()
