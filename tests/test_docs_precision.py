"""docs/precision.md: its commands run, its bytes are the plan's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
from typer.testing import CliRunner

from frostline import audit, train
from frostline.cli import app
from frostline.engine import compiled
from frostline.recipe import recipe_from_dict

PAGE = (Path(__file__).parents[1] / "docs" / "precision.md").read_text(encoding="utf-8")
SMALL = ["data.length=32", "data.batch=4", "eval.batches=1", "stages[0].steps=2", "stages[0].warmup=1"]


def test_the_pages_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny.recipe_dict(tmp_path, stages=[{"learn": "all", "steps": 1, "lr": 1e-3}])
    train(recipe_from_dict(values), out=tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(lines) == 4
    with patch.object(compiled, "BACKEND", "aot_eager"):
        for line in lines:
            words = [*shlex.split(line)[2:], *(w for s in SMALL for w in ("--set", s))]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (line, result.output)
    assert all(audit(tmp_path / "runs" / name).passed for name in ("bf16", "chance", "compiled"))
