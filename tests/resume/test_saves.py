"""What a save holds, what a resume reads, and the batches and the log after it."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_kills import recipe as kills_recipe
from trials import Driver
from typer.testing import CliRunner

from frostline import ready as ready_module
from frostline import run as running
from frostline import train
from frostline.cli import app
from frostline.engine import StepDone
from frostline.errors import RunFolderError
from frostline.recipe import Recipe, dump_yaml, recipe_from_dict
from frostline.resume import resume

STAGES = [
    {"name": "joint", "learn": "all", "steps": 5, "lr": 3e-3},
    {"name": "ffn", "learn": "ffn", "steps": 4, "lr": 3e-3, "state": "offload"},
]


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans take most of the time of a tiny run, and train nothing."""
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)


def recipe(folder: Path, **more: Any) -> Recipe:
    data = {"stages": STAGES, "checkpoint": {"every": 100, "minutes": None, "keep": 9}, "eval": {"batches": 1}}
    return tiny.recipe(folder, **(data | more))


def stop_after(step: int, number: int = signal.SIGTERM) -> Callable[[object], None]:
    def look(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), number)

    return look


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_signal_saves_is_what_a_periodic_save_would_have(tmp_path: Path, number: int) -> None:
    every = {"every": 1, "minutes": None, "keep": 9}
    train(recipe(tmp_path, checkpoint=every), out=tmp_path / "often")
    for step in (3, 7):
        stopped = train(recipe(tmp_path), out=tmp_path / f"stopped-{step}", observers=[stop_after(step, number)])
        assert (stopped.state, stopped.steps) == ("interrupted", step)
        name = f"checkpoints/step-{step:09d}"
        one, other = (tmp_path / run / name for run in (f"stopped-{step}", "often"))
        for file in ("weights.safetensors", "optimizer.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
        states = [json.loads((f / "state.json").read_text()) for f in (one, other)]
        for state in states:
            state["records"].pop("timing.jsonl")
            state["recipe"].pop("checkpoint")
        assert states[0] == states[1]


def test_the_next_hundred_batches_after_a_resume_are_those_of_the_run_that_went_on(tmp_path: Path) -> None:
    """Made anew from the recipe, as a resumed process makes them; over several epochs, in another order of asking."""
    tiny.write_text(tmp_path / "text.txt", n_words=500)
    data = tiny.recipe_dict(tmp_path, stages=[{"learn": "ffn", "steps": 300, "lr": 1e-3, "accumulate": 2}])
    tiny.write_text(tmp_path / "text.txt", n_words=500)

    def batches(steps: range) -> list[bytes]:
        ready = ready_module.make_ready(recipe_from_dict(data))
        get = running.batches_of(ready.prepared.recipe, ready.prepared.feed.train, torch.device("cpu"))
        stage = ready.prepared.schedule.stages[0]
        assert 100 * data["data"]["batch"] > 3 * len(ready.prepared.feed.train), "several epochs"
        return [b"".join(m.input_ids.numpy().tobytes() for m in get(step, stage)) for step in steps]

    went_on = batches(range(137))
    assert batches(range(37, 137)) == went_on[37:]
    assert len(set(went_on)) > 100


def test_the_log_of_a_run_that_was_killed_has_every_step_once(driver: Driver, tmp_path: Path) -> None:
    data = kills_recipe(tmp_path)
    found = driver.trial(data, [{"after_step": 5}, {"after_step": 8}, {"after_step": 9}], [])
    rows = [json.loads(line) for line in (driver.root / found["name"] / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if "loss" in r]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) >= 12
    measured = [r["step"] for r in rows if "held_out_loss" in r]
    assert measured == sorted(set(measured))
    timed = (driver.root / found["name"] / "timing.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, timed) if "step" in r] == steps


def signed(checkpoint: Path) -> None:
    """Write a checkpoint's manifest anew, so that its files count as what was written."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"] = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in checkpoint.iterdir()
        if p.name != "MANIFEST.json"
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 7."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_module, "plan_of", lambda *_, **__: None)
        train(recipe(folder), out=folder / "run", observers=[stop_after(7)])
    return folder / "run"


@pytest.mark.parametrize(
    ("file", "key", "said"),
    [
        ("weights", "3", "the weights of .* has another shape"),
        ("optimizer", "leaf0.exp_avg", "the optimizer's state of .* has another shape"),
        ("optimizer", "memory0.exp_avg_sq", "the optimizer's state of .* has another shape"),
    ],
)
def test_tensors_of_another_shape_are_refused_by_name_before_anything_is_changed(
    stopped: Path, tmp_path: Path, file: str, key: str, said: str
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = max((run / "checkpoints").glob("step-*"))
    tensors = load_file(newest / f"{file}.safetensors")
    assert key in tensors
    tensors[key] = tensors[key].reshape(-1)[:-1].clone()
    save_file(tensors, newest / f"{file}.safetensors")
    signed(newest)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=said):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_leaves_of_another_stage_are_refused(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = max((run / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    state["stage"] = 0
    (newest / "state.json").write_text(json.dumps(state))
    signed(newest)
    with pytest.raises(RunFolderError, match="what the optimizer owns"):
        resume(run)


def frost(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "frostline", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def test_a_disk_that_is_really_full_ends_with_a_message_and_what_was_saved_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files, as a quota sets it: the optimizer's state of a checkpoint does not fit."""
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe(tmp_path).as_dict()))
    args = ("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    full = frost(*args, preexec_fn=limit)
    assert full.returncode == 4, full.stderr
    assert "error: cannot write" in full.stderr
    assert "Traceback" not in full.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], "cannot write" in status["message"]) == ("failed", True)
    again = CliRunner().invoke(app, ["train", *map(str, args[1:])])
    assert (again.exit_code, "`frostline resume" in again.output) == (2, True)
    assert resume(tmp_path / "run").state == "finished"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that nobody may write to")
def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe(tmp_path).as_dict()))
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/frostline"), tmp_path / "file" / "run"):
        found = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--out", str(out)])
        assert (found.exit_code, "cannot write" in found.output) == (4, True), found.output
