"""What a plan says of the frozen prefix's cache is what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from frostline import train
from frostline.cli import app
from frostline.engine import Chose
from frostline.plan import prefix_worth
from frostline.planning import plan_model, plan_recipe
from frostline.recipe import dump_yaml, load_recipe


def written(folder: Path, **changes: Any) -> Path:
    stage = {"name": "last", "learn": "layers[-1]", "epochs": 2, "lr": 1e-3, **changes.pop("stage", {})}
    data = tiny.recipe_dict(folder, stages=[stage], **changes)
    data["data"] |= {"held_out": 0.8}
    data["cache"] = {"dir": "kept", **changes.get("cache", {})}
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(data))
    return path


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "asked for": ({"cache": {"prefix": "on"}}, "asked for"),
    "it pays": ({"paying": True}, "it pays"),
    "it does not pay": ({}, "it would save about 0% of the stage"),
    "no row comes again": ({"stage": {"epochs": 1}}, "no row comes again"),
    "the first block learns": ({"stage": {"learn": "ffn"}, "cache": {"prefix": "on"}}, "the first block learns"),
    "too large": ({"cache": {"prefix": "on", "limit": "1kB"}}, "the limit is 1,000"),
    "no fixed length": ({"cache": {"prefix": "on"}, "layout": "padded"}, "rows of this data have no fixed length"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_beforehand_is_what_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    given, why = CASES[case]
    changes = dict(given)
    if changes.pop("paying", False):
        monkeypatch.setattr(prefix_worth, "STEP_SECONDS", -1.0)
    layout = changes.pop("layout", None)
    path = written(tmp_path, **changes)
    (tmp_path / "held-out.txt").write_text("A text of its own. " * 40)
    overrides = [f"data.layout={layout}", f"data.held_out={tmp_path}/held-out.txt"] if layout else []
    (outlook,) = plan_recipe(path, overrides=overrides).prefixes
    assert why in outlook.why
    said: list[Any] = []
    train(load_recipe(path, overrides=overrides), out=tmp_path / "run", observers=[said.append])
    first = next(e for e in said if isinstance(e, Chose) and e.setting == "cache.prefix")
    assert outlook.kept == (first.value == "on")
    if not outlook.kept:
        assert first.why.startswith(why) or why in first.why


def test_switched_off_it_says_who_did_it(tmp_path: Path) -> None:
    (outlook,) = plan_recipe(written(tmp_path, cache={"prefix": "off"})).prefixes
    assert (outlook.kept, outlook.why) == (False, "asked for")
    assert outlook.n_bytes > 0


def test_the_command_says_it_in_one_line_and_as_json_and_why_says_it_too(tmp_path: Path) -> None:
    path = str(written(tmp_path))
    shown = CliRunner().invoke(app, ["plan", path]).output
    (line,) = [x for x in shown.replace("\n", " ").split("stage last: ") if "repeats every epoch" in x]
    assert "; it will not be kept: it would save about 0% of the stage" in line
    data = json.loads(CliRunner().invoke(app, ["plan", path, "--json"]).output)
    (row,) = data["prefix"]
    assert row == {"stage": "last", "kept": False, "why": "it would save about 0% of the stage",
                   "n_bytes": data["stages"][0]["prefix_bytes"]}  # fmt: skip
    assert "it will not be kept" in CliRunner().invoke(app, ["why", path]).output.replace("\n", " ")
    assert json.loads(CliRunner().invoke(app, ["why", path, "--json"]).output)["stages"][0]["prefix"] == row


def test_of_a_bare_model_nothing_is_said(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    tiny.model("llama").config.to_json_file(config)
    assert plan_model(str(config), learn="layers[-1]", rows=2, length=16).prefixes == ()
