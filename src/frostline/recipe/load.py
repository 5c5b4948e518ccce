"""A recipe file (plus `--set` overrides) → a `Recipe`, or one message that names the place and the remedy.

Paths in the file are relative to the file, paths in `--set` to the working directory; the resolved recipe holds
absolute ones. Read `load_recipe` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frostline.errors import RecipeError, did_you_mean
from frostline.recipe.data_spec import DataSpec
from frostline.recipe.overrides import Override, apply_override, format_key
from frostline.recipe.paths import make_paths_absolute
from frostline.recipe.problems import Origin, describe, innermost, shown
from frostline.recipe.recipe import NO_STAGES, Recipe
from frostline.recipe.shipped import shipped_recipes
from frostline.recipe.yaml_text import KeyPath, YamlDocument, parse_yaml

MODEL, TEXT = "model", "corpus"
"""What stands in a recipe of the package for the model and the text of its user."""
MAX_STAGES = 10_000
"""Stages of one run, repeated ones counted as often as they run."""


def load_recipe(path: str | Path, *, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, or a recipe of the package by its name; the paths of that one are relative to the working
    directory.

    `overrides` are `key=value` texts such as `stages[0].lr=1e-4`; the value is read as YAML.
    Raises `RecipeError` naming file, line and key.
    """
    path = Path(path)
    document = parse_yaml(read_text(path), where=str(path))
    if not isinstance(document.values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with model, data and stages; this is not one")
    values = document.values
    applied = [apply_override(values, text) for text in overrides]
    elsewhere = {o.path: Path.cwd() for o in applied}
    if not path.is_file():
        check_is_complete(str(path), values, list(elsewhere))
    make_paths_absolute(values, base=path.resolve().parent, elsewhere=elsewhere)
    return validate(values, Origin(document=document, where=str(path), overrides=applied))


def as_recipe(recipe: Recipe | str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe as it is, or read from its file or by its name. Raises `RecipeError`, also for overrides of one that is
    read already."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides=overrides)
    if given := list(overrides):
        raise RecipeError(f"{given[0]}: overrides are of a recipe file; this recipe is read already")
    return recipe


def check_is_complete(name: str, values: Mapping[str, Any], overridden: Sequence[KeyPath]) -> None:
    """Raise `RecipeError` unless a recipe of the package has been told the model and the text that it lacks; a folder
    `corpus` that is there will do for the text."""

    def lacks(key: KeyPath, placeholder: str) -> bool:
        given: Any = values
        for part in key:
            given = given.get(part) if isinstance(given, Mapping) else None
        return bool(given == placeholder) and not any(key[: len(o)] == o for o in overridden)

    if lacks(("model",), MODEL):
        raise RecipeError(
            f"the recipe {name} trains a model of yours: say which, and on what text: --set model=… --set data.train=…"
        )
    if lacks(("data", "train"), TEXT) and not Path(TEXT).exists():
        alone = "; `frostline demo` writes one and trains on it" if name == "demo" else ""
        raise RecipeError(f"the recipe {name} trains on a text of yours: say which: --set data.train=…{alone}")


def read_text(path: Path) -> str:
    """The text of a recipe file, or of the package's recipe of that name."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = shipped_recipes()
        if str(path) not in shipped:
            hint = did_you_mean(str(path), shipped) or " `frostline recipes` lists those of the package."
            raise RecipeError(f"no recipe at {path}.{hint}") from None
        return shipped[str(path)]
    except IsADirectoryError:
        if str(path) in shipped_recipes():
            raise RecipeError(
                f"{path} is a folder here; read the recipe of that name with `frostline recipes {path} > {path}.yaml`"
            ) from None
        raise RecipeError(f"{path} is a folder; a recipe is a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte offset {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def _plain_stages(stages: Any, origin: Origin) -> tuple[list[Any], list[KeyPath]]:
    """Stages with every `{repeat: 3, stages: […]}` written out, and where each stood. Raises `RecipeError`."""
    plain: list[Any] = []
    written: list[KeyPath] = []

    def add(stage: Any, path: KeyPath, suffix: str, depth: int) -> None:
        place = origin.of(path)
        if not isinstance(stage, dict) or "repeat" not in stage:
            named = isinstance(stage, dict) and isinstance(stage.get("name"), str) and suffix
            plain.append({**stage, "name": stage["name"] + suffix} if named else stage)
            written.append(path)
            if len(plain) > MAX_STAGES:
                raise RecipeError(f"{place}: more than {MAX_STAGES} stages")
            return
        times, inner = stage["repeat"], stage.get("stages")
        key = format_key(path)
        if set(stage) != {"repeat", "stages"} or not isinstance(inner, (list, tuple)) or not inner or depth > 8:
            raise RecipeError(f"{place}: '{key}': a repetition has the keys repeat and stages (a list), nothing else")
        if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= MAX_STAGES:
            raise RecipeError(f"{place}: '{key}.repeat' must be a whole number from 1 on, found {shown(times)}")
        for k in range(times):
            for i, one in enumerate(inner):
                add(one, (*path, "stages", i), f"{suffix}-{k + 1}", depth + 1)

    for i, stage in enumerate(stages):
        add(stage, ("stages", i), "", 0)
    return plain, written


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; paths are relative to the working directory. Raises `RecipeError`."""
    copied = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    if isinstance(copied.get("stages"), (list, tuple)):
        copied["stages"] = deepcopy(list(copied["stages"]))
    make_paths_absolute(copied, base=Path.cwd())
    return validate(copied, _in_memory(copied, "recipe"))


def with_stages(recipe: Recipe, stages: Sequence[Mapping[str, Any]]) -> Recipe:
    """The same recipe with plain stages in place of its schedule, checked as if they had been written. Raises
    `RecipeError`."""
    values = {**recipe.as_dict(), "stages": [dict(s) for s in stages], "schedule": None}
    return validate(values, _in_memory(values, "recipe"))


def data_of_file(path: str, *, overrides: Iterable[str] = ()) -> DataSpec:
    """The `data` section of a recipe that trains on one file, folder or hub name. Raises `RecipeError`."""
    values: dict[str, Any] = {
        "model": {"architecture": "llama"},
        "data": {"train": path},
        "stages": [{"learn": "all", "steps": 1, "lr": 1.0}],
    }
    applied = [apply_override(values, text) for text in overrides]
    make_paths_absolute(values, base=Path.cwd(), elsewhere={o.path: Path.cwd() for o in applied})
    return validate(values, _in_memory(values, "data", applied)).data


def _in_memory(values: Any, where: str, overrides: Sequence[Override] = ()) -> Origin:
    return Origin(document=YamlDocument(values=values, lines={}), where=where, overrides=overrides)


def validate(values: Mapping[str, Any], origin: Origin) -> Recipe:
    """The recipe that plain values are, their paths absolute. Raises `RecipeError`."""
    written: list[KeyPath] = []
    if isinstance(values.get("stages"), (list, tuple)):
        stages, written = _plain_stages(values["stages"], origin)
        values = {**values, "stages": stages}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [describe(e, origin=origin, stages=written) for e in innermost(error.errors())]
        if "stages" not in values and "schedule" not in values:
            problems.append(f"{origin.where}: {NO_STAGES}")
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None
