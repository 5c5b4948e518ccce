"""docs/moe.md: every command, expression and table in it is tried, on smaller models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
from dense import save_llama
from typer.testing import CliRunner

from frostline.cli import app
from frostline.moe import PAIRS
from frostline.recipe import load_recipe
from frostline.selection import plain, select

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "moe.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    save_llama(folder / "dense")
    tiny.write_text(folder / "text.txt")
    text = (ROOT / "src" / "frostline" / "recipes" / "moe.yaml").read_text(encoding="utf-8")
    for stage, steps, warmup in (("50", "2", ""), ("400", "2", "    warmup: 20\n")):
        text = text.replace(f"    steps: {stage}\n", f"    steps: {steps}\n").replace(warmup, "")
    (folder / "moe.yaml").write_text(text.replace("length: 128", "length: 32"))
    return folder


def test_the_pages_commands_run_as_written(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    commands = [shlex.split(line.split("   #")[0])[2:] for line in lines if line.startswith("$ frostline")]
    assert len(commands) >= 4
    for words in commands:
        result = CliRunner().invoke(app, [w.replace("128", "32") for w in words])
        assert result.exit_code == 0, (words, result.output)


def test_the_shipped_recipe_is_read_as_written():
    recipe = load_recipe(ROOT / "src" / "frostline" / "recipes" / "moe.yaml")
    assert [s.learn for s in recipe.stages] == ["router", "experts | router"]
    assert all(s.moe and s.moe.balance > 0 for s in recipe.stages)


def test_the_pages_pairs_are_those_that_are_known():
    listed = {
        (d, t) for ds, t in re.findall(r"^\| (.+?) \| `(\w+)` \|", PAGE, re.M) for d in re.findall(r"`(\w+)`", ds)
    }
    assert listed == {(p.dense, p.target) for p in PAIRS}


def test_the_pages_selections_mean_something():
    (table,) = re.findall(r"\| `learn` \| what learns \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.S)
    for row in table.splitlines():
        expression = re.findall(r"`([^`]+)`", row)[0]
        scores = {by: {f"layers[{i}].ffn": (0.4, 0.3, 0.2, 0.1) for i in range(3)} for by in ("tokens", "gate")}
        files = {"experts.json": "experts[1]"}
        known = plain(tiny.anatomy("mixtral"), expression, scores=scores, files=files)
        assert select(tiny.anatomy("mixtral"), known).n_elements
