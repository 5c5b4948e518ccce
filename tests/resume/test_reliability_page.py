"""The page on reliability: every identifier has a test that exists, and what it shows of recipes is read as written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import tiny

from frostline.errors import FrostlineError
from frostline.recipe import dump_yaml, load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = {m[1]: m[2] for m in re.finditer(r"^\| ([RCNSDX]\d+) \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)}
NEEDED = {
    *(f"R{i}" for i in (*range(1, 10), 11, 12, 13, 14)),
    *(f"C{i}" for i in range(1, 13)),
    *(f"N{i}" for i in (*range(1, 7), 8)),
    *(f"S{i}" for i in range(1, 17)),
    *(f"D{i}" for i in range(1, 17)),
    *(f"X{i}" for i in range(1, 13)),
}


def test_every_identifier_has_a_row() -> None:
    assert set(ROWS) >= NEEDED


def test_every_test_that_the_page_names_exists() -> None:
    named = [(key, name.strip()) for key, row in ROWS.items() for name in row.split(",")]
    assert len(named) > len(NEEDED)
    for key, name in named:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert function in functions, f"{key}: {name}"


def test_the_settings_on_the_page_are_settings(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "recipe.yaml").write_text(dump_yaml(tiny.recipe_dict(tmp_path)) + "".join(blocks))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.checkpoint.every, recipe.nonfinite.policy) == (100, "rollback")
    assert recipe.spike is not None
    assert recipe.spike.policy == "warn"


def test_the_exit_codes_on_the_page_are_those_of_the_errors() -> None:
    started = FrostlineError("in a run")
    started.in_a_run()
    codes = {c.exit_code for c in FrostlineError.__subclasses__()} | {started.exit_code}
    shown = {int(m) for m in re.findall(r"^\| [^|]+(?:\\\|[^|]+)? \| (\d+) \|", PAGE, re.MULTILINE)}
    assert {3, 4} <= codes & shown
    assert shown - codes == {75, 130}
