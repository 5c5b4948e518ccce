"""bf16 weights and compiled blocks on CUDA: what holds on a CPU holds there.

Run with `make test-cuda` on a machine with a CUDA device; without one every test here is skipped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import frostline
from frostline.anatomy import read_anatomy
from frostline.engine import StageCompiled
from frostline.engine.rounding import round_by_chance
from frostline.engine.stage_switch import switch
from frostline.model import load_model
from frostline.recipe import ScratchModel, StageSpec, recipe_from_dict
from frostline.run import RunResult
from frostline.schedule import Schedule
from frostline.selection import select
from frostline.weights import Weights

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the versions of a GPU machine are its own; so are their warnings
]


def run(folder: Path, *, out: str = "run", observers: Any = (), **fields: Any) -> RunResult:
    made = tiny.recipe_dict(folder, **fields)
    made["device"] = "cuda"
    return frostline.train(recipe_from_dict(made), out=folder / out, observers=observers)


def losses(result: RunResult) -> list[float]:
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r]


@pytest.mark.parametrize("rounding", ["masters", "stochastic", "nearest"])
def test_a_run_with_bf16_weights_passes_meets_its_plan_and_gives_the_same_bytes_twice(
    tmp_path: Path, rounding: str
) -> None:
    stages = [
        {"name": "joint", "learn": "all", "steps": 3, "lr": 3e-3},
        {"name": "some", "learn": "ffn | layers[1].attn.heads[0:2]", "steps": 3, "lr": 3e-3},
    ]
    results = [run(tmp_path, out=f"run-{i}", precision="bf16", rounding=rounding, stages=stages) for i in range(2)]
    for result in results:
        assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]
        assert all(c.flops_agree for c in result.checks)
        assert {t.dtype for t in Weights(result.folder / "model").values()} == {torch.bfloat16}
    first, second = (
        {
            name: hashlib.sha256((r.folder / name).read_bytes()).hexdigest()
            for name in ("metrics.jsonl", "evidence/updates.jsonl", "model/model.safetensors")
        }
        for r in results
    )
    assert first == second


def test_masters_live_where_the_weights_do_and_only_for_what_learns() -> None:
    model = load_model(ScratchModel(**tiny.config("llama")), dtype=torch.bfloat16).cuda()
    anatomy = read_anatomy(model)
    spec = StageSpec.model_validate({"learn": "ffn | attn.heads[1]", "steps": 1, "lr": 1e-3})
    stage = Schedule.of([("only", spec, select(anatomy, spec.learn))]).stages[0]
    parameters = dict(model.named_parameters())
    active = switch(parameters, anatomy, stage, memory={}, leaving=None, rounding="masters")
    assert all(o.value.is_cuda and o.value.dtype == torch.float32 for o in active.ownership.owned)
    assert sum(o.value.numel() for o in active.ownership.owned) == stage.selection.n_elements


def test_rounding_by_chance_on_the_device_is_even_between_the_two_neighbours() -> None:
    """Between 1 and 1 + 2^-7 lie 2^16 fp32 numbers: the k-th one is rounded up with probability k / 2^16."""
    n = 400_000
    for k in (1, 6554, 32768, 60000):
        values = torch.full((n,), 1 + k * 2**-23, device="cuda")
        rounded = round_by_chance(values, torch.Generator("cuda").manual_seed(k)).float()
        assert bool(((rounded == 1) | (rounded == 1 + 2**-7)).all())
        p, up = k / 65536, int((rounded > 1).sum())
        assert abs(up - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1


def test_compiled_blocks_train_as_uncompiled_through_a_switch_and_a_route(tmp_path: Path) -> None:
    stages = [
        {"name": "joint", "learn": "all", "steps": 3, "lr": 1e-3},
        {"name": "ffn", "learn": "ffn", "steps": 3, "lr": 1e-3, "routes": [{"stop": "attn.out", "layers": "1"}]},
    ]
    events: list[Any] = []
    more = {"stages": stages, "evidence": {"flow_every": 100}}
    plain = run(tmp_path, out="plain", **more)
    compiled = run(tmp_path, out="compiled", compile="blocks", observers=[events.append], **more)
    assert compiled.audit.passed, [e for e in compiled.audit.evidence if not e.passed]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    proofs = [e.proof for e in events if isinstance(e, StageCompiled)]
    assert [p.n_graphs >= 1 for p in proofs] == [True, True]
    assert all(p.loss_difference < 1e-3 for p in proofs)
