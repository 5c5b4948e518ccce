"""What is wrong with a recipe, in words: where it was written, and what is there instead. Read `describe` first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from frostline.errors import did_you_mean
from frostline.recipe.data_spec import SOURCE_TAGS
from frostline.recipe.overrides import Override, format_key, shortened
from frostline.recipe.recipe import Recipe
from frostline.recipe.schedule_spec import SCHEDULES
from frostline.recipe.yaml_text import KeyPath, YamlDocument

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the keys of a recipe were written: on a line of a file, or in a `--set`."""

    document: YamlDocument
    where: str
    """The file, or what stands for it."""
    overrides: Sequence[Override] = ()

    def of(self, path: KeyPath) -> str:
        """The `--set` that a key comes from, or file and line."""
        for override in reversed(self.overrides):
            if path[: len(override.path)] == override.path:
                return str(override)
        line = self.document.line_of(path)
        return f"{self.where}:{line}" if line else self.where

    def is_known(self, path: KeyPath) -> bool:
        """Whether there is more to say than the file."""
        return self.of(path) != self.where

    def beside(self, path: KeyPath, message: str) -> str:
        """The `--set`s inside `path`, which may be what a check on all of it refuses; of the whole recipe, those that
        the message names."""
        inside = [o for o in self.overrides if len(o.path) > len(path) and o.path[: len(path)] == path]
        if not path:
            words = set(re.findall(r"\w+", message))
            inside = [o for o in inside if words.intersection(o.path)]
        return f" (with {', '.join(map(str, inside))})" if inside else ""


def describe(error: Any, *, origin: Origin, stages: Sequence[KeyPath], record: type[BaseModel] = Recipe) -> str:
    """An error of pydantic in a line: where, which key, what is wrong with it. `stages`: where each was written.
    `record`: what was read."""
    loc = _without_tags(error["loc"])
    there = (*stages[loc[1]], *loc[2:]) if loc[:1] == ("stages",) and len(loc) > 1 and isinstance(loc[1], int) else loc
    place, key = origin.of(there), format_key(there)
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key '{key}'.{did_you_mean(str(loc[-1]), _keys_at(error['loc'][:-1], record))}"
        case "missing":
            return f"{place}: '{key}' is missing"
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{place}: '{key}': {_which_schedule(error['input'])}"
        case "value_error":
            message = str(error["ctx"]["error"])
            about = re.match(r"stages\[(\d+)\]", message)
            if about and not loc and stages:  # a check on the whole recipe names the stage itself
                stage = stages[int(about[1])]
                line = f"{origin.of(stage)}: " if origin.is_known(stage) else ""
                return line + format_key(stage) + message[about.end() :] + origin.beside(stage, message)
            return f"{place}: {key + ': ' if key else ''}{message}{origin.beside(there, message)}"
        case _:
            return f"{place}: '{key}': {_lower_first(error['msg'])}, found {shown(error['input'])}"


def innermost(errors: Sequence[Any]) -> list[Any]:
    """Errors without those that only repeat, for the list or record around it, that something inside is wrong."""
    places = [e["loc"] for e in errors]
    return [
        e
        for e, here in zip(errors, places, strict=True)
        if not (e["type"] == "too_short" and any(p != here and p[: len(here)] == here for p in places))
    ]


def _which_schedule(value: Any) -> str:
    """What is wrong with a named schedule whose name is missing or unknown."""
    known = ", ".join(SCHEDULES)
    if not isinstance(value, dict):
        return f"a named schedule is a mapping with a name ({known}) and settings, found {shown(value)}"
    if "name" not in value:
        return f"its name is missing; schedules are {known}"
    near = did_you_mean(str(value["name"]), SCHEDULES)
    return f"no schedule is named {shown(value['name'])}; schedules are {known}.{near}"


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


def _keys_at(loc: KeyPath, record: Any) -> list[str]:
    """The keys of the record at a place in `record` as pydantic names it, the tags of unions included."""
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


def shown(value: object) -> str:
    """A value as it stands in a message."""
    return shortened(repr(value))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
