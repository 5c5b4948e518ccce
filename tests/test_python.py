"""Every command has its public call, and the page that lists them is true."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import frostline
from frostline.cli import app
from frostline.recipe import dump_yaml

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
CALLS = {
    command: re.findall(r"`(\w+)`", calls)
    for command, calls in re.findall(r"^\| `frostline (\w+)` \| (.*?) \|", PAGE, re.M)
}


def test_every_command_has_a_public_call() -> None:
    assert set(CALLS) == {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert {name for names in CALLS.values() for name in names} <= set(frostline.__all__)


@pytest.mark.parametrize("name", sorted({name for names in CALLS.values() for name in names}))
def test_a_public_call_says_what_it_does_and_what_it_raises(name: str) -> None:
    call = getattr(frostline, name)
    assert callable(call)
    assert not inspect.ismodule(call)
    assert "Raises" in (inspect.getdoc(call) or ""), name
    positional = [p for p in inspect.signature(call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3, name


def test_calls_stay_calls_when_the_modules_of_their_names_are_imported() -> None:
    for name in ("audit", "learning", "resume", "survey"):
        assert f"frostline.{name}" in sys.modules
        __import__(f"frostline.{name}")
        assert inspect.isfunction(getattr(frostline, name)), name
    for name in ("plan", "schedule", "data", "experts", "moe"):
        assert inspect.ismodule(getattr(frostline, name)), name


def test_every_name_that_is_offered_is_there() -> None:
    assert all(hasattr(frostline, name) for name in frostline.__all__)
    assert sorted(frostline.__all__) == frostline.__all__


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = tiny.recipe_dict(tmp_path)
    frostline.train(frostline.recipe_from_dict(small), out=tmp_path / "base")
    values: dict[str, Any] = {**small, "model": str(tmp_path / "base" / "model")}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})


def test_overrides_of_a_recipe_that_is_read_already_are_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    with pytest.raises(frostline.FrostlineError, match=r"seed=1: overrides are of a recipe file"):
        frostline.why_recipe(recipe, overrides=["seed=1"])
