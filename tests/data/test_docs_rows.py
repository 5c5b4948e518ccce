"""docs/rows.md: its recipe and commands are tried as they stand, on a small model, and its numbers counted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from frostline.cli import app
from frostline.data import Document, train_byte_bpe
from frostline.data.caching import IN_MEMORY_BYTES
from frostline.engine.apart import TOLERANCE
from frostline.feed import LOOKED_AT
from frostline.model import load_model, save_model
from frostline.recipe import ScratchModel

PAGE = (Path(__file__).parents[2] / "docs" / "rows.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_byte_bpe([Document(" ".join(tiny.WORDS) * 3, "a")], n_vocabulary=300)
    save_model(load_model(ScratchModel(**tiny.config("llama"))), tokenizer, tmp_path / "path" / "to" / "model")
    tiny.write_text(tmp_path / "story.txt", n_words=600)
    rows = [{"prompt": "cold " * (i % 60 + 1), "completion": "north " * (i % 90 + 60)} for i in range(120)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


def test_the_pages_recipe_and_commands_run(place):
    (console,) = re.findall(r"```console\n(.*?)```", PAGE, re.S)
    outputs = []
    for line in console.splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[2:])
        assert result.exit_code == 0, (line, result.output)
        outputs.append(result.output)
    assert len(outputs) == 3
    assert "train: 108 documents, packed in" in outputs[1]
    assert re.search(r"longer than a row: truncate", outputs[1])
    assert re.search(r"keep loss \d+\.\d+ \(perplexity [\d.,]+, \d\.\d+ bits per byte\)", outputs[1])
    assert "Learning and forgetting" in (place / "runs/answers/report.html").read_text(encoding="utf-8")


def test_the_pages_numbers_are_those_of_the_code():
    assert f"above {IN_MEMORY_BYTES // 1_000_000} MB" in PAGE
    assert f"the first {LOOKED_AT}" in PAGE
    assert TOLERANCE == 1e-5
