"""docs/compare.md: its comparison, commands and Python are tried, on a smaller model and fewer seeds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from frostline.cli import app
from frostline.recipe import dump_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return str(found)


def test_the_pages_comparison_commands_and_python_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("frostline.ready", "frostline.experiment.compare"):
        monkeypatch.setattr(f"{module}.plan_of", lambda *_, **__: None)
    small = tiny.config("llama", num_hidden_layers=1, hidden_size=16)
    recipe = tiny.recipe_dict(tmp_path, model=small, stages=[{"learn": "all", "steps": 2, "lr": 1e-3}])
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    (tmp_path / "other.yaml").write_text(dump_yaml({**recipe, "stages": [{"learn": "attn", "steps": 2, "lr": 1e-3}]}))
    (tmp_path / "comparison.yaml").write_text(block("yaml").replace("seeds: 3", "seeds: 1"))
    for line in block("console").splitlines():
        words = shlex.split(line.split("   #")[0].replace("--seeds 5", "--seeds 1"))[2:]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output)
    exec(block("python").replace("ffn.difference.low, ffn.difference.high, ", ""), {})
    assert (tmp_path / "runs" / "compared" / "runs" / "ffn-faster" / "seed-0" / "model").exists()
