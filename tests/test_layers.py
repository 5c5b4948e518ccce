"""The import rule and the other rules about who may touch what, read from the source text alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "frostline"

ROWS: dict[str, float] = {
    "cli": 9,
    "experiment": 8,
    "terminal": 8.5,
    "terminal_plan": 8.5,
    "terminal_progress": 8.5,
    "terminal_moe": 8.5,
    "terminal_compare": 8.5,
    "terminal_data": 8.5,
    "terminal_schedule": 8.5,
    "generate": 7,
    "experts": 7,
    "survey": 7,
    "choices": 4.5,
    "measuring": 6.5,
    "resume": 7.5,
    "export": 7.5,
    "deltas": 7.6,
    "saver": 6,
    "feed": 6.2,
    "sets": 6.3,
    "expansion": 6,
    "levers": 6.5,
    "prepared": 6.6,
    "ready": 6.7,
    "run": 7,
    "learning": 6.9,
    "progress": 6.8,
    "planning": 7.5,
    "plan_subject": 7.4,
    "scheduling": 7.5,
    "lr_range": 7.5,
    "why": 7.6,
    "integrations": 7,
    "plan": 6,
    "audit": 6,
    "engine": 5,
    "schedule": 4,
    "data": 4,
    "moe": 4,
    "selection": 3,
    "model_source": 2.3,
    "weights": 2.5,
    "model": 2.5,
    "tokenizer_files": 2.6,
    "named_model": 2.6,
    "run_folder": 2.5,
    "checkpoints": 2.8,
    "environment": 2.5,
    "dtypes": 2.2,
    "folding": 2.5,
    "grouped": 1.5,
    "older": 1.5,
    "anatomy": 2,
    "recipe": 1,
    "storage": 0.5,
    "errors": 0,
    "units": 0,
    "secrecy": 0,
    "randomness": 0,
}
"""Folder or module → its row; a module imports from strictly lower rows, and from its own folder."""

NEVER = {("audit", "engine")}
"""Pairs that the rows alone would allow: the audit reads files only."""

DEBT: set[str] = set()
"""Violations that stand today; a line goes when its violation does, and none may come."""

WITHOUT_TORCH = ("selection/grammar.py", "anatomy/slices.py", "anatomy/component.py")
SWITCH = "engine/stage_switch.py"


def problems(root: Path) -> list[str]:
    """Every broken rule under `root`, as `file:line: what`."""
    return [problem for rule in RULES for problem in rule(root)]


def without_line(problem: str) -> str:
    return re.sub(r":\d+:", ":", problem, count=1)


@lru_cache
def files(root: Path) -> tuple[tuple[str, ast.Module], ...]:
    found = sorted(root.rglob("*.py"))
    return tuple((path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in found)


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in the file; relative names made absolute."""
    package = ["frostline", *Path(name).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            if base == "frostline":
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def home(name: str) -> str:
    """The folder a file lies in, or its own name at the top: what has a row."""
    return Path(name).parts[0].removesuffix(".py")


def rows_respected(root: Path) -> Iterator[str]:
    for name, tree in files(root):
        if name == "__init__.py":
            continue
        own = home(name)
        if own not in ROWS:
            yield f"{name}:1: stands on no row"
            continue
        for line, imported in imports(name, tree):
            top, _, rest = imported.partition(".")
            target = rest.partition(".")[0]
            if top != "frostline" or target == own:
                continue
            if target not in ROWS:
                yield f"{name}:{line}: imports {imported}, which is no module with a row"
            elif ROWS[target] >= ROWS[own]:
                yield f"{name}:{line}: imports {target}, which is not below {own}"
            elif (own, target) in NEVER:
                yield f"{name}:{line}: {own} must not know {target}"


def pydantic_stays_in_recipe(root: Path) -> Iterator[str]:
    for name, tree in files(root):
        for line, imported in imports(name, tree):
            if imported.partition(".")[0].startswith("pydantic") and home(name) != "recipe":
                yield f"{name}:{line}: imports pydantic outside recipe"


def some_files_know_no_torch(root: Path) -> Iterator[str]:
    for name, tree in files(root):
        for line, imported in imports(name, tree):
            if name in WITHOUT_TORCH and imported.partition(".")[0] == "torch":
                yield f"{name}:{line}: imports torch"


MEASURED = "anatomy/slice_proof.py"
"""It measures a tiny model that is thrown away; an adapter's base weights are frozen before it starts."""


def only_the_switch_writes_requires_grad(root: Path) -> Iterator[str]:
    for name, tree in files(root):
        for node in ast.walk(tree):
            if name not in (SWITCH, MEASURED) and _writes_requires_grad(node):
                yield f"{name}:{node.lineno}: writes requires_grad"  # type: ignore[attr-defined]


def _writes_requires_grad(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="requires_grad_")):
            return True
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value="requires_grad"), *_]):
            return True
        case ast.Attribute(attr="requires_grad", ctx=ast.Store() | ast.Del()):
            return True
        case _:
            return False


def every_module_has_a_docstring(root: Path) -> Iterator[str]:
    yield from (f"{name}:1: has no docstring" for name, tree in files(root) if not ast.get_docstring(tree))


RULES = (
    rows_respected,
    pydantic_stays_in_recipe,
    some_files_know_no_torch,
    only_the_switch_writes_requires_grad,
    every_module_has_a_docstring,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    assert [p for p in rule(SOURCE) if without_line(p) not in DEBT] == []


def test_the_debt_is_still_owed():
    assert {without_line(p) for p in rows_respected(SOURCE)} >= DEBT


def test_the_files_that_rules_name_exist():
    assert [name for name in (*WITHOUT_TORCH, SWITCH) if not (SOURCE / name).is_file()] == []


def test_the_checker_reads_every_module_of_the_package():
    assert {home(name) for name, _ in files(SOURCE)} >= {"cli", "run", "audit", "engine", "selection", "recipe"}


PLANTED = {
    "upwards": ("selection/a.py", "from frostline.engine import step", 2, "imports engine, which is not below"),
    "same row": ("schedule/a.py", "from frostline.data import Rows", 2, "imports data, which is not below schedule"),
    "audit and plan": ("audit/a.py", "import frostline.plan", 2, "imports plan, which is not below audit"),
    "audit and engine": ("audit/a.py", "from frostline.engine import step", 2, "audit must not know engine"),
    "model and run_folder": ("model.py", "from frostline.run_folder import X", 2, "imports run_folder"),
    "anatomy and model": ("anatomy/a.py", "from frostline.model import X", 2, "imports model"),
    "errors and units": ("errors.py", "from frostline.units import X", 2, "imports units"),
    "inside a function": ("recipe/a.py", "def f():\n    from frostline.anatomy import X", 3, "imports anatomy"),
    "type checking": ("data/a.py", "if TYPE_CHECKING:\n    from frostline.run import X", 3, "imports run"),
    "inside a try": ("units.py", "try:\n    import frostline.recipe\nexcept ImportError: pass", 3, "imports recipe"),
    "relative": ("selection/a.py", "from ..engine import step", 2, "imports engine"),
    "relative package": ("selection/a.py", "from .. import engine", 2, "imports engine"),
    "by the package": ("recipe/a.py", "from frostline import anatomy", 2, "imports anatomy"),
    "the package's names": ("engine/a.py", "from frostline import train", 2, "no module with a row"),
    "the bare package": ("engine/a.py", "import frostline", 2, "no module with a row"),
    "second of two": ("recipe/a.py", "import os, frostline.cli", 2, "imports cli"),
    "no row": ("helpers.py", "", 1, "stands on no row"),
    "pydantic": ("schedule/a.py", "def f():\n    from pydantic import BaseModel", 3, "imports pydantic"),
    "pydantic_core": ("cli.py", "import pydantic_core", 2, "imports pydantic"),
    "torch in the grammar": ("selection/grammar.py", "from torch import nn", 2, "imports torch"),
    "torch in slices": ("anatomy/slices.py", "def f():\n    import torch.nn", 3, "imports torch"),
    "requires_grad_": ("engine/train.py", "def f(p):\n    p.weight.requires_grad_(False)", 3, "writes requires_grad"),
    "requires_grad =": ("run.py", "def f(p):\n    p.requires_grad = True", 3, "writes requires_grad"),
    "in a tuple": ("model.py", "def f(p, q):\n    p.requires_grad, q = 1, 2", 3, "writes requires_grad"),
    "setattr": ("model.py", "setattr(p, 'requires_grad', False)", 2, "writes requires_grad"),
}
"""A name → (file, text after its docstring on line 1, line of the problem, what is said of it)."""


@pytest.fixture
def small_tree(tmp_path):
    for name, row in ROWS.items():
        below = next((n for n, r in sorted(ROWS.items()) if r < row), None)
        text = f'"""A module."""\n\n{f"from frostline.{below} import X" if below else ""}\n'
        is_file = (SOURCE / f"{name}.py").exists()
        path = tmp_path / (f"{name}.py" if is_file else f"{name}/__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    inside = '"""A."""\nfrom frostline.engine.step import X\nif X.requires_grad:\n    pass\n'
    (tmp_path / "engine/record.py").write_text(inside, encoding="utf-8")
    (tmp_path / SWITCH).write_text('"""A."""\ndef f(p):\n    p.requires_grad_(True)\n', encoding="utf-8")
    (tmp_path / "recipe/base.py").write_text('"""A."""\nimport pydantic\n', encoding="utf-8")
    (tmp_path / "__init__.py").write_text('"""A."""\nfrom frostline.cli import main\n', encoding="utf-8")
    return tmp_path


def test_a_tree_that_keeps_the_rules_has_no_problems(small_tree):
    assert problems(small_tree) == []


@pytest.mark.parametrize(("name", "text", "line", "said"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found_with_its_file_and_line(small_tree, name, text, line, said):
    (small_tree / name).write_text(f'"""A module."""\n{text}\n', encoding="utf-8")
    (found,) = problems(small_tree)
    assert found.startswith(f"{name}:{line}: ")
    assert said in found


def test_a_module_without_a_docstring_is_found(small_tree):
    (small_tree / "units.py").write_text("x = 1\n", encoding="utf-8")
    assert problems(small_tree) == ["units.py:1: has no docstring"]
