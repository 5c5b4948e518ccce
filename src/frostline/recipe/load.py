"""A recipe file (plus `--set` overrides) → a `Recipe`, or one message that names the place and the remedy.

Paths in the file are relative to the file, paths in `--set` to the working directory; the resolved recipe holds
absolute ones. Read `load_recipe` first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from frostline.errors import RecipeError, did_you_mean
from frostline.recipe.data_spec import SOURCE_TAGS, DataSpec, is_hub_name
from frostline.recipe.recipe import NO_STAGES, Recipe
from frostline.recipe.schedule_spec import SCHEDULES
from frostline.recipe.shipped import shipped_recipes
from frostline.recipe.yaml_text import KeyPath, YamlDocument, parse_yaml

_TAGS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model",): ("name", "record"),
    ("tokenizer",): ("name", "record"),
    ("data", "held_out"): ("share", "files"),
    ("lr",): ("one", "by part"),
    ("weight_decay",): ("one", "by part"),
    ("betas",): ("one", "by part"),
    ("schedule",): tuple(SCHEDULES),
}
"""Keys (or how they end, in a stage) that take one of several kinds → the tags of the kinds in the record."""
PLACEHOLDERS = ("model", "moe")
"""What stands for the model in a recipe of the package that trains one that is there already."""
MAX_STAGES = 10_000
"""Stages of one run, repeated ones counted as often as they run."""
_FOLDERS_OR_HUB_NAMES: tuple[tuple[str, ...], ...] = (("model",), ("tokenizer",))
_SOURCES = ("train", "held_out", "keep")
"""Keys whose values may also be hub names, or sources with settings of their own."""
_PATHS: tuple[tuple[str, ...], ...] = (
    ("data", "train"),
    ("data", "held_out"),
    ("data", "chat_template"),
    ("cache", "dir"),
    ("data", "cache"),
    ("eval", "keep"),
)


def load_recipe(path: str | Path, *, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, or a recipe of the package by its name; the paths of that one are relative to the working
    directory.

    `overrides` are `key=value` texts such as `stages[0].lr=1e-4`; the value is read as YAML.
    Raises `RecipeError` naming file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = shipped_recipes()
        if str(path) not in shipped:
            hint = did_you_mean(str(path), shipped) or " `frostline recipes` lists those of the package."
            raise RecipeError(f"no recipe at {path}.{hint}") from None
        text = shipped[str(path)]
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
    document = parse_yaml(text, where=str(path))
    if not isinstance(document.values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with model, data and stages; this is not one")
    values = document.values
    overridden = [_apply_override(values, text) for text in overrides]
    if not path.is_file() and values.get("model") in PLACEHOLDERS and ("model",) not in overridden:
        raise RecipeError(
            f"the recipe {path} trains a model of yours: say which, and on what text: --set model=… --set data.train=…"
        )
    _make_paths_absolute(values, base=path.resolve().parent, overridden=overridden)
    _make_esft_paths_absolute(values, base=path.resolve().parent, overridden=overridden)
    return _validate(values, document=document, where=str(path))


def _plain_stages(stages: Any, document: YamlDocument, where: str) -> tuple[list[Any], list[KeyPath]]:
    """Stages with every `{repeat: 3, stages: […]}` written out, and where each stood. Raises `RecipeError`."""
    plain: list[Any] = []
    origins: list[KeyPath] = []

    def add(stage: Any, path: KeyPath, suffix: str, depth: int) -> None:
        place = f"{where}:{document.line_of(path)}" if document.line_of(path) else where
        if not isinstance(stage, dict) or "repeat" not in stage:
            named = isinstance(stage, dict) and isinstance(stage.get("name"), str) and suffix
            plain.append({**stage, "name": stage["name"] + suffix} if named else stage)
            origins.append(path)
            if len(plain) > MAX_STAGES:
                raise RecipeError(f"{place}: more than {MAX_STAGES} stages")
            return
        times, inner = stage["repeat"], stage.get("stages")
        key = format_key(path)
        if set(stage) != {"repeat", "stages"} or not isinstance(inner, (list, tuple)) or not inner or depth > 8:
            raise RecipeError(f"{place}: '{key}': a repetition has the keys repeat and stages (a list), nothing else")
        if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= MAX_STAGES:
            raise RecipeError(f"{place}: '{key}.repeat' must be a whole number from 1 on, found {_shown(times)}")
        for k in range(times):
            for i, one in enumerate(inner):
                add(one, (*path, "stages", i), f"{suffix}-{k + 1}", depth + 1)

    for i, stage in enumerate(stages):
        add(stage, ("stages", i), "", 0)
    return plain, origins


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; paths are relative to the working directory. Raises `RecipeError`."""
    copied = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    if isinstance(copied.get("stages"), (list, tuple)):
        copied["stages"] = deepcopy(list(copied["stages"]))
    _make_paths_absolute(copied, base=Path.cwd(), overridden=[])
    _make_esft_paths_absolute(copied, base=Path.cwd(), overridden=[])
    return _validate(copied, document=YamlDocument(values=copied, lines={}), where="recipe")


def with_stages(recipe: Recipe, stages: Sequence[Mapping[str, Any]]) -> Recipe:
    """The same recipe with plain stages in place of its schedule, checked as if they had been written. Raises
    `RecipeError`."""
    values = {**recipe.as_dict(), "stages": [dict(s) for s in stages], "schedule": None}
    return _validate(values, document=YamlDocument(values=values, lines={}), where="recipe")


def data_of_file(path: str, *, overrides: Iterable[str] = ()) -> DataSpec:
    """The `data` section of a recipe that trains on one file, folder or hub name. Raises `RecipeError`."""
    values: dict[str, Any] = {
        "model": {"architecture": "llama"},
        "data": {"train": path},
        "stages": [{"learn": "all", "steps": 1, "lr": 1.0}],
    }
    overridden = [_apply_override(values, text) for text in overrides]
    _make_paths_absolute(values, base=Path.cwd(), overridden=overridden)
    return _validate(values, document=YamlDocument(values=values, lines={}), where="data").data


def _validate(values: Mapping[str, Any], *, document: YamlDocument, where: str) -> Recipe:
    origins: list[KeyPath] = []
    if isinstance(values.get("stages"), (list, tuple)):
        stages, origins = _plain_stages(values["stages"], document, where)
        values = {**values, "stages": stages}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_describe(e, document=document, where=where, origins=origins) for e in _innermost(error.errors())]
        if "stages" not in values and "schedule" not in values:
            problems.append(f"{where}: {NO_STAGES}")
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def _innermost(errors: Sequence[Any]) -> list[Any]:
    """Errors without those that only repeat, for the list or record around it, that something inside is wrong."""
    places = [e["loc"] for e in errors]
    return [
        e
        for e, here in zip(errors, places, strict=True)
        if not (e["type"] == "too_short" and any(p != here and p[: len(here)] == here for p in places))
    ]


def _describe(error: Any, *, document: YamlDocument, where: str, origins: Sequence[KeyPath]) -> str:
    loc = _without_tags(error["loc"])
    there = (*origins[loc[1]], *loc[2:]) if loc[:1] == ("stages",) and len(loc) > 1 and isinstance(loc[1], int) else loc
    line = document.line_of(there)
    place = f"{where}:{line}" if line else where
    key = format_key(there)
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key '{key}'.{did_you_mean(str(loc[-1]), _keys_at(error['loc'][:-1]))}"
        case "missing":
            return f"{place}: '{key}' is missing"
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{place}: '{key}': {_which_schedule(error['input'])}"
        case "value_error":
            message = str(error["ctx"]["error"])
            about = re.match(r"stages\[(\d+)\]", message)
            if about and not loc and origins:  # a check on the whole recipe names the stage itself
                origin = origins[int(about[1])]
                line = document.line_of(origin)
                return f"{where}:{line}: " * bool(line) + format_key(origin) + message[about.end() :]
            return f"{place}: {key + ': ' if key else ''}{message}"
        case _:
            return f"{place}: '{key}': {_lower_first(error['msg'])}, found {_shown(error['input'])}"


def _which_schedule(value: Any) -> str:
    """What is wrong with a named schedule whose name is missing or unknown."""
    known = ", ".join(SCHEDULES)
    if not isinstance(value, dict):
        return f"a named schedule is a mapping with a name ({known}) and settings, found {_shown(value)}"
    if "name" not in value:
        return f"its name is missing; schedules are {known}"
    near = did_you_mean(str(value["name"]), SCHEDULES)
    return f"no schedule is named {_shown(value['name'])}; schedules are {known}.{near}"


def _without_tags(loc: tuple[str | int, ...]) -> KeyPath:
    """Drop what pydantic adds to say which member of a union it tried: it stands right after the union's key."""
    loc = tuple(p for p in loc if p not in SOURCE_TAGS)
    for at in range(1, len(loc)):
        for key, tags in _TAGS.items():
            outer = loc[: at - len(key)]
            if loc[:at][-len(key) :] == key and outer[:1] in ((), ("stages",), ("schedule",)) and loc[at] in tags:
                rest = (*loc[:at], *loc[at + 1 :])
                return _without_tags(rest) if key == ("schedule",) else rest
    return loc


def _keys_at(loc: KeyPath) -> list[str]:
    """The keys of the record at a place as pydantic names it, the tags of unions included."""
    record: Any = Recipe
    for before, part in zip(("", *loc), loc, strict=False):
        if before == "schedule" and part in SCHEDULES:
            record = SCHEDULES[str(part)]
        elif isinstance(part, str) and part in record.model_fields:
            record = _record_in(record.model_fields[part].annotation)
        if record is None:
            return []
    return list(record.model_fields)


def _record_in(annotation: Any) -> Any:
    """The first record class inside an annotation such as `tuple[StageSpec, ...]` or `str | ScratchModel`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple) or get_args(annotation):
        return next((r for a in get_args(annotation) if (r := _record_in(a)) is not None), None)
    return None


def _shown(value: object) -> str:
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def format_key(path: KeyPath) -> str:
    """`("stages", 0, "lr")` → `stages[0].lr`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def parse_key(text: str) -> KeyPath:
    """`stages[0].lr` → `("stages", 0, "lr")`. Raises `RecipeError`."""
    if not re.fullmatch(r"\w+(\[\d{1,6}\])*(\.\w+(\[\d{1,6}\])*)*", text):
        raise RecipeError(f"--set {_shortened(text)}: write a key as in stages[0].lr")
    return tuple(int(p[1:-1]) if p[0] == "[" else p for p in re.findall(r"\w+|\[\d+\]", text) if p)


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write key=value, as in stages[0].lr=1e-4")
    path = parse_key(key.strip())
    target: Any = values
    for i, part in enumerate(path[:-1]):
        if isinstance(part, str) and isinstance(target, dict):
            target = target.setdefault(part, {} if isinstance(path[i + 1], str) else [])
        else:
            target = _item(target, part, override)
    last = path[-1]
    if isinstance(last, int):
        _item(target, last, override)
    elif not isinstance(target, dict):
        raise RecipeError(f"--set {override}: {format_key(path[:-1])} has no keys of its own")
    target[last] = parse_yaml(text, where=f"--set {_shortened(override)}").values
    return path


def _item(target: Any, part: str | int, override: str) -> Any:
    if not isinstance(part, int) or not isinstance(target, list):
        raise RecipeError(f"--set {override}: there is nothing at '{part}'")
    if part >= len(target):
        raise RecipeError(f"--set {override}: index {part} is out of range, the recipe has {len(target)} (0-based)")
    return target[part]


def _make_paths_absolute(values: dict[str, Any], *, base: Path, overridden: list[KeyPath]) -> None:
    for path in _PATHS + _FOLDERS_OR_HUB_NAMES:
        parent = values if len(path) == 1 else values.get(path[0])
        if not isinstance(parent, dict) or path[-1] not in parent:
            continue

        def absolute(value: Any, key: KeyPath, names: bool = path in _FOLDERS_OR_HUB_NAMES) -> Any:
            if isinstance(value, dict) and key[1] in _SOURCES:  # a source with settings of its own
                return {**value, "path": absolute(value["path"], (*key, "path"))} if "path" in value else value
            names = names or (isinstance(value, str) and key[1] in _SOURCES and is_hub_name(value))
            start = Path.cwd() if any(o == key[: len(o)] for o in overridden) else base
            return _absolute(value, start, key=key, may_be_name=names)

        value = parent[path[-1]]
        if isinstance(value, str) or (isinstance(value, dict) and path[-1] in _SOURCES):
            parent[path[-1]] = absolute(value, path)
        elif isinstance(value, (list, tuple)):
            parent[path[-1]] = [absolute(v, (*path, i)) for i, v in enumerate(value)]


def _make_esft_paths_absolute(values: dict[str, Any], *, base: Path, overridden: list[KeyPath]) -> None:
    """In every stage's `learn`, the files of `esft("…")`."""

    def visit(stages: Any, path: KeyPath) -> None:
        for i, stage in enumerate(stages if isinstance(stages, list) else ()):
            key = (*path, i, "learn")
            if isinstance(stage, dict) and isinstance(stage.get("learn"), str):
                start = Path.cwd() if any(o == key[: len(o)] for o in overridden) else base
                stage["learn"] = _ESFT.sub(partial(_absolute_esft, base=start, key=key), stage["learn"])
            if isinstance(stage, dict):
                visit(stage.get("stages"), (*path, i, "stages"))

    visit(values.get("stages"), ("stages",))


_ESFT = re.compile(r"""(\besft\s*\(\s*)(["'])([^"']+)\2""")


def _absolute_esft(match: re.Match[str], base: Path, key: KeyPath) -> str:
    return f"{match[1]}{match[2]}{_absolute(match[3], base, key=key, may_be_name=False)}{match[2]}"


def _absolute(value: Any, base: Path, *, key: KeyPath, may_be_name: bool) -> Any:
    """`value` as an absolute path; a hub name such as `org/model` stays as it is unless such a folder exists."""
    if not isinstance(value, str):
        return value
    try:
        if not value:
            raise ValueError("it is empty")
        value.encode()
        candidate = base / Path(value).expanduser()
        if may_be_name and not value.startswith((".", "/", "~")) and not candidate.exists():
            return value
        return str(candidate.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"'{format_key(key)}': {_shown(value)} cannot be a path: {reason}") from None
