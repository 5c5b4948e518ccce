"""Real SIGKILLs of real processes: a run that is killed and resumed ends with the bytes of the run that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

DRIVER = Path(__file__).parent / "kill_driver.py"
POINTS = ["after weights", "after optimizer", "before manifest", "before rename", "after rename"]

STAGES: list[dict[str, Any]] = [
    {"name": "joint", "learn": "all", "steps": 4, "lr": 3e-3, "accumulate": 2},
    {"name": "heads", "learn": "layers[-1].attn.heads[0:2] | embed.rows[3:9]", "steps": 3, "lr": 3e-3,
     "state": "offload"},
    {"name": "ffn", "learn": "ffn", "steps": 4, "lr": {"ffn.gate": 1e-3, "rest": 3e-3}, "state": "offload",
     "plateau": {"every": 1, "patience": 2, "min_delta": 0.5}},
    {"name": "back", "learn": "attn | ffn", "steps": 3, "lr": 1e-3, "state": "keep"},
]  # fmt: skip


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    data = tiny.recipe_dict(folder)
    data |= {"stages": STAGES, "checkpoint": {"every": 3, "minutes": None}, "eval": {"every": 2, "batches": 2}}
    return data | {"evidence": {"gradients_every": 2}} | more


def run_trials(folder: Path, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = "\n".join(json.dumps(t) for t in trials)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder)], input=text, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found: list[dict[str, Any]], trials: list[dict[str, Any]]) -> None:
    assert [f["name"] for f in found] == [t["name"] for t in trials]
    for f, t in zip(found, trials, strict=True):
        assert f["statuses"] == [0 if "stop_after_step" in k else signal.SIGKILL for k in t["kills"]] + [0], f
        assert f["differing"] == [], f


def test_killed_after_any_step_a_run_of_four_stages_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Slices, offloaded, kept and shared state, accumulation, rates by part, a plateau, kills at every stage's end."""
    data = recipe(tmp_path)
    trials = [{"name": f"step-{k}", "recipe": data, "kills": [{"after_step": k}]} for k in range(1, 13)]
    check(run_trials(tmp_path, trials), trials)


def test_killed_anywhere_inside_a_save_the_run_goes_on_from_the_save_before(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    kills = [[{"at": point, "count": n}] for point in POINTS for n in (1, 3)]
    trials = [{"name": f"save-{i}", "recipe": data, "kills": k} for i, k in enumerate(kills)]
    check(run_trials(tmp_path, trials), trials)


def test_killed_many_times_and_while_measuring_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    several = [{"after_step": 2}, {"after_step": 5}, {"at": "before rename", "count": 1}, {"after_step": 9}]
    trials = [
        {"name": "several", "recipe": data, "kills": several},
        {"name": "measuring", "recipe": data, "kills": [{"evaluated_at": 6}]},
        {"name": "at once", "recipe": data, "kills": [{"evaluated_at": 0}, {"after_step": 1}]},
    ]
    check(run_trials(tmp_path, trials), trials)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(n, marks=SLOW) for n in ("adam", "sgd", "adafactor", "adamw8bit", "lion"))]
)
def test_every_optimizers_state_survives(tmp_path: Path, optimizer: str) -> None:
    if optimizer in ("adamw8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    chosen = {"name": optimizer, **({"momentum": 0.9} if optimizer == "sgd" else {})}
    stages = [{**s, "optimizer": chosen, "state": "keep"} for s in STAGES]
    data = recipe(tmp_path, stages=stages)
    trials = [{"name": f"step-{k}", "recipe": data, "kills": [{"after_step": k}]} for k in (4, 5, 8)]
    check(run_trials(tmp_path, trials), trials)


def test_killed_while_the_prefix_cache_fills_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    stages = [
        {"name": "last", "learn": "layers[-1]", "steps": 6, "lr": 3e-3, "accumulate": 2},
        {"name": "head", "learn": "layers[-1] | head", "steps": 4, "lr": 3e-3, "accumulate": 2},
    ]
    cache = {"prefix": "on", "dir": str(tmp_path / "cache"), "limit": "1GB"}
    data = recipe(tmp_path, stages=stages, cache=cache)
    data["data"] = {**data["data"], "held_out": 0.85}  # few rows: they come again
    kills = [[{"at": "rows synced", "count": 2}],
             [{"at": "entries synced", "count": 3}, {"at": "rows synced", "count": 1}, {"after_step": 8}]]  # fmt: skip
    trials = [{"name": f"filling-{i}", "recipe": data, "kills": k} for i, k in enumerate(kills)]
    check(run_trials(tmp_path, trials), trials)


def test_routes_recomputation_and_bf16_survive(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "learn": "all", "steps": 4, "lr": 3e-3, "routes": [{"stop": "attn.out", "layers": "1:"}]},
        {"name": "b", "learn": "ffn | norm", "steps": 4, "lr": 3e-3, "local_loss": "shared",
         "routes": [{"stop": "block.in", "layers": "1:"}]},
    ]  # fmt: skip
    data = recipe(tmp_path, stages=stages, precision="bf16-mixed", recompute="blocks")
    data["evidence"] = {"gradients_every": 2, "flow_every": 2}
    trials = [{"name": f"step-{k}", "recipe": data, "kills": [{"after_step": k}]} for k in (2, 4, 5, 7)]
    check(run_trials(tmp_path, trials), trials)


def test_killed_before_during_and_after_a_rollback_the_run_goes_back_to_the_same_step(tmp_path: Path) -> None:
    """Batch 5 is the second of its stage: back to the stage's start. Batch 16: back past checkpoints that stops have
    written, which a run without stops would not have."""
    stages = [{**s, "steps": n} for s, n in zip(STAGES, (4, 5, 7), strict=False)]
    stages[2].pop("plateau")
    data = recipe(tmp_path, stages=stages, nonfinite={"policy": "rollback", "limit": 2})
    data["checkpoint"] = {"every": 4, "minutes": None, "keep": 1}
    kills: list[list[dict[str, Any]]] = [
        [{"after_step": 5}],
        [{"rolled_back": True}],
        [{"rolled_back": True, "count": 2}],
        [{"after_step": 5, "count": 2}],
        [{"stop_after_step": 13}, {"rolled_back": True}],
        [{"stop_after_step": 13}, {"stop_after_step": 14}, {"after_step": 13}, {"after_step": 14, "count": 2}],
        [{"at": "before rename", "count": 3}],
    ]
    trials = [{"name": f"back-{i}", "recipe": data, "kills": k, "spoil": [5, 16]} for i, k in enumerate(kills)]
    check(run_trials(tmp_path, trials), trials)
    rows = [json.loads(line) for line in (tmp_path / "whole-0" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["rolled_back_to"]) for r in rows if "rolled_back_to" in r] == [(6, 4), (15, 12)]
