"""The page on performance: its recipe keys mean what it says, its lines are what a run prints, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from frostline.cli import app
from frostline.engine import fused_loss
from frostline.plan import prefix_worth
from frostline.recipe import dump_yaml, recipe_from_dict
from frostline.recipe.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_its_recipe_keys_are_keys_and_its_values_the_defaults(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    values = parse_yaml(block, where="docs/performance.md").values
    shown = recipe_from_dict({**tiny.recipe_dict(tmp_path), **values}).as_dict()
    default = tiny.recipe(tmp_path).as_dict()
    shown["cache"]["dir"] = None
    assert shown == default


def test_its_lines_are_what_a_run_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "PAYS_FROM", 1)
    monkeypatch.setattr(prefix_worth, "STEP_SECONDS", -1.0)
    data = tiny.recipe_dict(tmp_path, stages=[{"learn": "layers[-1]", "epochs": 2, "lr": 1e-3}])
    data["data"] |= {"held_out": 0.8}
    data["cache"] = {"dir": "kept"}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(data))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    (block,) = re.findall(r"```\n(  recompute.*?)```", PAGE, re.S)
    for line in block.splitlines():
        assert without_numbers(line.split(";")[0].rstrip(")")) in without_numbers(done.output), line


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d.,]*( [KMG]iB)?", "N", text)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)`", PAGE))))
def test_its_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_its_files_exist() -> None:
    for path in re.findall(r"`(?:pytest |python )?((?:tests|benchmarks)/[\w/.]+\.py)", PAGE):
        assert (ROOT / path).exists(), path
