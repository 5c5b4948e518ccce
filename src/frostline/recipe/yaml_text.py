"""YAML 1.2 text → plain values plus the line of every key.

YAML 1.2 because in it `1e-4` is a number. Only plain data is read: a tag such as `!!python/object` is an error,
a duplicate key is an error. Read `parse_yaml` first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from frostline.errors import RecipeError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class YamlDocument:
    """The values of one YAML document, and the 1-based line on which each key path stands."""

    values: Any
    lines: dict[KeyPath, int]

    def line_of(self, path: KeyPath) -> int | None:
        """The line of `path`, or of its nearest parent that is in the text."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return None


class BrokenYamlError(Exception):
    """What is wrong with a YAML text, and where in it."""

    def __init__(self, what: str, mark: Any = None) -> None:
        super().__init__(what)
        self.place: tuple[int, int] | None = None if mark is None else (mark.line + 1, mark.column + 1)
        """Line and column, from 1 on, where they are known."""
        self.index: int | None = None if mark is None else mark.index
        """The same as characters before it."""


def parse_yaml(text: str, *, where: str) -> YamlDocument:
    """Parse one YAML 1.2 document. `where` names the file in errors. Raises `RecipeError` with line and column."""
    try:
        return read_yaml(text)
    except BrokenYamlError as problem:
        place = f"{where}:{problem.place[0]}:{problem.place[1]}" if problem.place else where
        raise RecipeError(f"{place}: {problem}") from None


def read_yaml(text: str) -> YamlDocument:
    """Parse one YAML 1.2 document. Raises `BrokenYamlError`."""
    yaml = YAML(typ="safe", pure=True)
    lines: dict[KeyPath, int] = {}
    _refuse_directives_and_aliases(text)
    try:
        values = yaml.load(text)
        root = YAML(typ="safe", pure=True).compose(text)
        if root is not None:
            _collect_lines(root, (), lines)
    except MarkedYAMLError as error:
        what = re.sub(r"\('<stream end>',\)|'<stream end>'", "the end of it", str(error.problem or error.context))
        raise BrokenYamlError(f"not valid YAML: {what}", error.problem_mark or error.context_mark) from None
    except RecursionError:
        raise BrokenYamlError("not valid YAML here: nested too deeply, or without end") from None
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise BrokenYamlError(f"not valid YAML: {first}") from None
    return YamlDocument(values=values, lines=lines)


def _refuse_directives_and_aliases(text: str) -> None:
    """A recipe has no use for `%YAML 1.1` (other numbers) or aliases (a few lines of which can mean gigabytes)."""
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, AliasEvent):
                raise BrokenYamlError(
                    f"a recipe has no aliases (*{event.anchor}); write the value out", event.start_mark
                )
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                version = ".".join(map(str, event.version))
                raise BrokenYamlError(f"a recipe is YAML 1.2, not {version}", event.start_mark)
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # reported by the reader itself


def dump_yaml(values: Any) -> str:
    """Plain values as YAML text that `parse_yaml` reads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the record
    stream = StringIO()
    yaml.allow_unicode = False  # some characters, such as U+0085, would be read back as line ends
    yaml.width = 2**31  # a folded text in quotes is not always read back as it was
    yaml.dump(values, stream)
    return stream.getvalue()


def _collect_lines(node: Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if not isinstance(key.value, str):
                raise TypeError(f"a key must be a plain word (line {key.start_mark.line + 1})")
            child = (*path, key.value)
            lines[child] = key.start_mark.line + 1
            _collect_lines(value, child, lines)
    elif isinstance(node, SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = value.start_mark.line + 1
            _collect_lines(value, (*path, i), lines)
