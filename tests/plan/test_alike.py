"""Stages that differ only in which of several equal layers learns: traced once, and what is said of each is right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny

from frostline.anatomy import read_anatomy
from frostline.model import load_skeleton
from frostline.plan import Batching, make_plan
from frostline.plan import plan as plan_module
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

N = 4
ROUTES = {"routes": [{"stop": "attn.out", "layers": "0"}]}


def schedule_of(source: ScratchModel, learns: list[str], **settings: Any) -> Schedule:
    anatomy = read_anatomy(load_skeleton(source))
    specs = [StageSpec.model_validate({"learn": x, "steps": 1, "lr": 1e-3, **settings}) for x in learns]
    return Schedule.of([(f"s{i}", s, select(anatomy, s.learn, ties="together")) for i, s in enumerate(specs)])


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are traced, in order."""
    real, seen = plan_module.trace_stage, []

    def trace(model: Any, anatomy: Any, stage: Any, **options: Any) -> Any:
        seen.append(stage.spec.learn)
        return real(model, anatomy, stage, **options)

    monkeypatch.setattr(plan_module, "trace_stage", trace)
    return seen


PAIRS = [f"layers[{a},{b}]" for a, b in itertools.combinations(range(N), 2)]


@pytest.mark.parametrize(
    ("architecture", "always", "n_traces"),
    [("llama", "embed | head", 1), ("gpt2", "final_norm", 3), ("mixtral", "embed", 1)],
)
def test_drawn_layers_are_traced_once_for_each_frontier_and_every_draw_gets_its_own_cost(
    architecture: str, always: str, n_traces: int, traces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    field = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    source = ScratchModel(**tiny.config(architecture, **{field: N}))
    schedule = schedule_of(source, [f"{p} | {always}" for p in PAIRS])
    batching = Batching(rows=2, length=48)
    monkeypatch.setattr(plan_module, "EXACT_TRACES", 5)
    found = make_plan(source, schedule, batching).stages
    assert len(traces) == n_traces
    monkeypatch.setattr(plan_module, "EXACT_TRACES", 100)
    for one, exact in zip(found, make_plan(source, schedule, batching).stages, strict=True):
        assert one.cost.flops == exact.cost.flops, one.learn
        for key in ("frontier", "gradient_bytes", "state_bytes", "activation_bytes", "prefix_flops", "unreached"):
            assert getattr(one.cost, key) == getattr(exact.cost, key), (one.learn, key)
        assert one.cost.peak_bytes == pytest.approx(exact.cost.peak_bytes, rel=0.02)
    assert len(traces) == n_traces + len(PAIRS)


def test_layers_of_different_types_are_not_exchanged(traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "EXACT_TRACES", 1)
    types = ["full_attention", "sliding_attention"] * 2
    config = tiny.config("qwen2", num_hidden_layers=N, layer_types=types, use_sliding_window=True, sliding_window=16)
    schedule = schedule_of(ScratchModel(**config), [f"{p} | embed" for p in PAIRS])
    make_plan(ScratchModel(**config), schedule, Batching(rows=1, length=32))
    assert traces == [f"layers[{p}] | embed" for p in ("0,1", "0,2", "1,3")], "one of each type, two of either"


def test_routes_and_few_stages_are_traced_one_by_one(traces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = ScratchModel(**tiny.config("llama", num_hidden_layers=N))
    learns = [f"{p} | embed" for p in PAIRS[:3]]
    make_plan(source, schedule_of(source, learns), Batching(rows=1, length=16))
    assert len(traces) == 3
    monkeypatch.setattr(plan_module, "EXACT_TRACES", 1)
    make_plan(source, schedule_of(source, learns, **ROUTES), Batching(rows=1, length=16))
    assert len(traces) == 6
    make_plan(source, schedule_of(source, learns), Batching(rows=1, length=16))
    assert len(traces) == 7
