"""docs/schedules.md: every command, schedule and key in it is tried, on a smaller model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from frostline import train
from frostline.cli import app
from frostline.expansion import expand
from frostline.recipe import recipe_from_dict, shipped_recipes
from frostline.recipe.schedule_spec import SCHEDULES
from frostline.recipe.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trained model `base` and a text, as the page's commands find them."""
    folder = tmp_path_factory.mktemp("docs")
    values = tiny.recipe_dict(folder, stages=[{"learn": "all", "steps": 2, "lr": 1e-3}])
    train(recipe_from_dict(values), out=folder / "run")
    (folder / "run" / "model").rename(folder / "base")
    return folder


SMALL = ["--set", "data.length=32", "--set", "data.batch=4", "--set", "eval.batches=1"]


def test_the_pages_commands_run_as_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line.split("   #")[0])[2:]
        to = words.pop() if ">" in words else None
        words = [w for w in words if w != ">"]
        result = CliRunner().invoke(app, words + (SMALL if "--set" in words else []))
        assert result.exit_code == 0, (line, result.output)
        if to:
            (place / to).write_text(result.stdout)
    assert (place / "lisa.yaml").read_text() == shipped_recipes()["lisa"]
    assert (place / "lr.png").exists()


def test_the_stages_that_are_printed_as_yaml_are_those_that_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(
        app, ["schedule", "lisa", "--set", "model=base", "--set", "data.train=text.txt", "--yaml", *SMALL]
    )
    values = parse_yaml(result.stdout, where="stdout").values
    recipe = recipe_from_dict({"model": "base", "data": {"train": "text.txt"}, **values})
    shipped = recipe_from_dict({**parse_yaml(shipped_recipes()["lisa"], where="lisa").values, "model": "base"})
    assert recipe.stages == expand(shipped, tiny.anatomy("llama"))[0].stages


def test_the_pages_table_names_every_schedule() -> None:
    (table,) = re.findall(r"\| schedule \| learns \| from \|\n\|---\|---\|---\|\n(.*?)\n\n", PAGE, re.S)
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == set(SCHEDULES)


def test_the_pages_yaml_is_a_schedule() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    values = parse_yaml(block, where="page").values
    recipe = recipe_from_dict({"model": tiny.config("llama"), "data": {"train": "text.txt"}, **values})
    plain, _ = expand(recipe, tiny.anatomy("llama"))
    assert (len(plain.stages), plain.lr_across.warmup) == (20, 20)
