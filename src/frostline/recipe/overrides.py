"""`--set stages[0].lr=1e-4`: which key, and the value put there. Read `apply_override` first; `put` does the same
with a value that is at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from frostline.errors import RecipeError
from frostline.recipe.schedule_spec import SCHEDULES
from frostline.recipe.yaml_text import BrokenYamlError, KeyPath, read_yaml


@dataclass(frozen=True, slots=True)
class Override:
    """One `--set`, or one key that a strategy of a comparison changes."""

    path: KeyPath
    text: str
    """As it was typed, shortened."""
    place: str | None = None
    """Where it was written, when that was no `--set`."""

    def __str__(self) -> str:
        return self.place or f"--set {self.text}"


def format_key(path: KeyPath) -> str:
    """`("stages", 0, "lr")` → `stages[0].lr`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def parse_key(text: str, override: str) -> KeyPath:
    """`stages[0].lr` → `("stages", 0, "lr")`. Raises `RecipeError` that names the whole `override`."""
    if not re.fullmatch(r"\w+(\[\d{1,6}\])*(\.\w+(\[\d{1,6}\])*)*", text):
        raise RecipeError(f"--set {shortened(override)}: write a key as in stages[0].lr, counted from 0")
    return tuple(int(p[1:-1]) if p[0] == "[" else p for p in re.findall(r"\w+|\[\d+\]", text) if p)


def apply_override(values: dict[str, Any], override: str) -> Override:
    """Put the value of `key=value`, read as YAML, into `values`. Raises `RecipeError` for no place to put it."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write key=value, as in stages[0].lr=1e-4")
    path = parse_key(key.strip(), override)
    holder, last = _holder(values, path, override)
    holder[last] = _value(override, text)
    return Override(path, shortened(override))


def put(values: dict[str, Any], key: str, value: Any, *, place: str) -> Override:
    """Put a value at `key` of `values`. `place`: where that was written. Raises `RecipeError` for no place for it."""
    path = parse_key(key.strip(), key)
    holder, last = _holder(values, path, key)
    holder[last] = value
    return Override(path, shortened(key), place)


def _holder(values: dict[str, Any], path: KeyPath, override: str) -> tuple[Any, str | int]:
    """The mapping or list that the last step of `path` is in, and that step; mappings on the way are made."""
    _check_has_stages(values, path, override)
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
    return target, last


def _value(override: str, text: str) -> Any:
    """The value that ends an `override`. Raises `RecipeError` that points at the place in it."""
    try:
        return read_yaml(text).values
    except BrokenYamlError as problem:
        at = None if problem.index is None else len(override) - len(text) + problem.index
        column = "" if at is None else f" (column {at + 1})"
        pointer = "" if at is None else "\n" + pointed(override, at)
        raise RecipeError(f"--set {shortened(override)}{column}: {problem}{pointer}") from None


def pointed(text: str, at: int, *, around: int = 50) -> str:
    """What stands around a place (characters before it) in a text, in one line, and a `^` below the place."""
    start = max(0, at - around)
    before, after = ("…" if start else "") + text[start:at], text[at : at + around]
    more = "…" if len(text) > at + around else ""
    return f"  {in_a_line(before + after)}{more}\n  {' ' * len(before)}^"


def _check_has_stages(values: dict[str, Any], path: KeyPath, override: str) -> None:
    """A recipe whose stages come from a schedule has none to set a key of."""
    spec = values.get("schedule")
    if path[0] != "stages" or len(path) == 1 or "stages" in values or not isinstance(spec, dict):
        return
    name = str(spec.get("name"))
    keys = [k for k in SCHEDULES[name].model_fields if k != "name"] if name in SCHEDULES else []
    takes = f": {', '.join(keys)}" if keys else ""
    raise RecipeError(
        f"--set {override}: the stages of this recipe come from its schedule '{name}', so they have no keys to set; "
        f"set those of the schedule, as in schedule.lr=1e-4{takes} (`frostline schedule RECIPE --yaml` writes the "
        "stages out, to be edited)"
    )


def _item(target: Any, part: str | int, override: str) -> Any:
    if not isinstance(part, int) or not isinstance(target, list):
        raise RecipeError(f"--set {override}: there is nothing at '{part}'")
    if part >= len(target):
        raise RecipeError(f"--set {override}: index {part} is out of range, the recipe has {len(target)} (0-based)")
    return target[part]


def shortened(text: str) -> str:
    """The beginning of a long text, in one line."""
    return in_a_line(text if len(text) <= 60 else text[:57] + "…")


def in_a_line(text: str) -> str:
    """A text with spaces in place of line ends and characters that cannot be shown."""
    return "".join(c if c.isprintable() else " " for c in text)
