"""Kills, closed pipes and second runs through the real command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from kill_driver import digests

from frostline.recipe import dump_yaml

STAGES = [
    {"name": "joint", "learn": "all", "steps": 5, "lr": 3e-3},
    {"name": "heads", "learn": "layers[-1].attn.heads[0:2]", "steps": 4, "lr": 3e-3, "state": "offload"},
]


def start(*args: str | Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "frostline", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed_at(process: subprocess.Popen[str], step: int) -> None:
    """Read what it prints until it has measured the loss after `step`, and kill it then."""
    assert process.stdout is not None
    for line in process.stdout:
        if f"step {step:>5}  held-out" in line:
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def ends(process: subprocess.Popen[str]) -> str:
    """What it prints; it must succeed."""
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody reads beyond its first line, as in `frostline train … | head -1`."""
    folder = tmp_path_factory.mktemp("command")
    data: dict[str, Any] = tiny.recipe_dict(folder, stages=STAGES, eval={"every": 1, "batches": 1})
    data["checkpoint"] = {"every": 2, "minutes": None, "keep": 9}
    (folder / "recipe.yaml").write_text(dump_yaml(data))
    process = start("train", folder / "recipe.yaml", "--out", folder / "whole")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    return folder


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(whole: Path) -> None:
    assert json.loads((whole / "whole" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    "steps", [[4], pytest.param([1, 5, 8], marks=pytest.mark.slow), pytest.param([3, 6], marks=pytest.mark.slow)]
)
def test_killed_and_resumed_by_the_command_a_run_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, steps: list[int]
) -> None:
    for i, step in enumerate(steps):
        command = ("resume", tmp_path / "run")
        first = ("train", whole / "recipe.yaml", "--out", tmp_path / "run")
        killed_at(start(*(command if i else first)), step)
    said = ends(start("resume", tmp_path / "run"))
    assert "going on after step" in said or "starting again" in said
    assert "AUDIT PASSED" in said
    assert digests(tmp_path / "run") == digests(whole / "whole")
