"""Paths in a recipe made absolute: those of the file start from the file, those of `--set` from the working directory.

Read `make_paths_absolute` first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from frostline.errors import RecipeError
from frostline.recipe.data_spec import is_hub_name
from frostline.recipe.overrides import format_key
from frostline.recipe.problems import shown
from frostline.recipe.yaml_text import KeyPath

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
NOWHERE: Mapping[KeyPath, Path] = {}


def make_paths_absolute(values: dict[str, Any], *, base: Path, elsewhere: Mapping[KeyPath, Path] = NOWHERE) -> None:
    """Write every path of a recipe's plain values as an absolute one, in place. Raises `RecipeError` for what is none.

    `base`: what relative ones start from; but for the keys of `elsewhere`, which start from the folder given there.
    """
    _paths(values, base=base, elsewhere=elsewhere)
    _esft_paths(values, base=base, elsewhere=elsewhere)


def _start(key: KeyPath, base: Path, elsewhere: Mapping[KeyPath, Path]) -> Path:
    """What a relative path at `key` starts from: where the key, or what it is in, was put last."""
    return next((folder for at, folder in reversed(list(elsewhere.items())) if at == key[: len(at)]), base)


def _paths(values: dict[str, Any], *, base: Path, elsewhere: Mapping[KeyPath, Path]) -> None:
    for path in _PATHS + _FOLDERS_OR_HUB_NAMES:
        parent = values if len(path) == 1 else values.get(path[0])
        if not isinstance(parent, dict) or path[-1] not in parent:
            continue

        def absolute(value: Any, key: KeyPath, names: bool = path in _FOLDERS_OR_HUB_NAMES) -> Any:
            if isinstance(value, dict) and key[1] in _SOURCES:  # a source with settings of its own
                return {**value, "path": absolute(value["path"], (*key, "path"))} if "path" in value else value
            names = names or (isinstance(value, str) and key[1] in _SOURCES and is_hub_name(value))
            return _absolute(value, _start(key, base, elsewhere), key=key, may_be_name=names)

        value = parent[path[-1]]
        if isinstance(value, str) or (isinstance(value, dict) and path[-1] in _SOURCES):
            parent[path[-1]] = absolute(value, path)
        elif isinstance(value, (list, tuple)):
            parent[path[-1]] = [absolute(v, (*path, i)) for i, v in enumerate(value)]


def _esft_paths(values: dict[str, Any], *, base: Path, elsewhere: Mapping[KeyPath, Path]) -> None:
    """In every stage's `learn`, the files of `esft("…")`."""

    def visit(stages: Any, path: KeyPath) -> None:
        for i, stage in enumerate(stages if isinstance(stages, list) else ()):
            key = (*path, i, "learn")
            if isinstance(stage, dict) and isinstance(stage.get("learn"), str):
                start = _start(key, base, elsewhere)
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
        raise RecipeError(f"'{format_key(key)}': {shown(value)} cannot be a path: {reason}") from None
