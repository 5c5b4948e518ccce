"""The recipes that come with the package: `frostline recipes` lists them. Read `shipped_recipes`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: name → text, by name. Raises nothing."""
    found = (f for f in files("frostline").joinpath("recipes").iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(found, key=lambda f: f.name)}


def summary(text: str) -> str:
    """The first comment of a recipe, on one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)


def is_recipe(name: str) -> bool:
    """Whether a word means a recipe: a YAML file, or the name of a recipe of the package that is no path here."""
    if name.lower().endswith((".yaml", ".yml")):
        return True
    return not Path(name).exists() and name in shipped_recipes()
