"""docs/data.md: its files, recipes, commands and Python are tried as they stand, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import chats
import pytest
import tiny
from typer.testing import CliRunner

from frostline.cli import app
from frostline.data.formats import CHECKS, COLUMNS, OPTIONAL
from frostline.model import load_model, save_model
from frostline.recipe import ScratchModel, load_recipe
from frostline.recipe.data_spec import DataSpec

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = chats.tokenizer("chatml")
    save_model(
        load_model(ScratchModel(**tiny.config("llama", vocab_size=512))), made, tmp_path / "path" / "to" / "model"
    )
    (tmp_path / "chat.jsonl").write_text(blocks("json")[0])
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0].replace("steps: 60", "steps: 2"))
    return tmp_path


def frost(*words):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (words, result.output)
    return result.output


def test_the_pages_commands_print_what_the_page_says(place):
    lines = [line for line in blocks("console")[0].splitlines() if line.startswith("$ frostline")]
    outputs = [frost(*shlex.split(line)[2:]) for line in lines]
    assert len(outputs) == 4
    (shown,) = blocks("text")
    assert shown.strip().replace("chat.jsonl", str(place / "chat.jsonl")) in outputs[0]
    assert "AUDIT PASSED" in outputs[-1]
    assert (place / "data.html").exists()


def test_the_pages_python_runs(place, capsys):
    exec(blocks("python")[0], {})
    assert "North wind.<|im_end|>Yes.<|im_end|>" in capsys.readouterr().out
    assert (place / "runs" / "python" / "model").is_dir()


def test_the_pages_keys_are_keys(tmp_path):
    head = "model: {architecture: llama}\nstages: [{learn: all, steps: 1, lr: 1e-3}]\n"
    (tmp_path / "r.yaml").write_text(head + blocks("yaml")[1])
    data = load_recipe(tmp_path / "r.yaml").data
    assert data.train[1].weight == 2
    assert data.train[2].path == "owner/name"
    assert set(re.findall(r"^  (\w+):", blocks("yaml")[1], re.M)) <= set(DataSpec.model_fields)


def test_the_pages_table_of_formats_is_what_is_known():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, re.M))
    assert set(rows) == set(COLUMNS)
    for name, columns in rows.items():
        assert set(COLUMNS[name]) <= set(re.findall(r"`(\w+)`", columns))
        if name != "tokens":
            assert set(OPTIONAL[name]) <= set(re.findall(r"`(\w+)`", columns)) | {"tools"}
    assert ", ".join(CHECKS) in " ".join(PAGE.split())


def test_the_pages_template_and_recipe_from_scratch_run_as_written(place):
    (place / "chat.jinja").write_text(blocks("jinja")[0])
    (place / "scratch.yaml").write_text(blocks("yaml")[2].replace("steps: 100", "steps: 2"))
    shown = frost("data", "scratch.yaml", "--examples", "3")
    assert "⟦North wind.<|im_end|>⟧↵" in shown
    assert "4 by the template's marks" in shown
    assert "AUDIT PASSED" in frost("train", "scratch.yaml", "--out", "runs/scratch")
