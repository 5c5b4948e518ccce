"""Plain texts: every file and every row with `text` is a document. Raises `DataError` with the place otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.data.files import Row, RowError, files_of, rows_of


@dataclass(frozen=True, slots=True)
class Document:
    """One text that stands for itself."""

    text: str
    source: str
    """File, and line where a file holds many."""


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """Every document of the files and folders, in the order given, folders sorted by name. Raises `DataError`."""
    return list(iter_documents(paths))


def iter_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The same, one after another."""
    for path in map(Path, paths):
        for file in files_of(path):
            for row in rows_of(file):
                if isinstance(row, RowError):
                    raise row
                document = as_document(row)
                if document.text.strip():
                    yield document


def as_document(row: Row) -> Document:
    """A row's `text`. Raises `RowError`."""
    if not isinstance(row.values.get("text"), str):
        found = "keys " + (", ".join(map(repr, row.values)) or "none")
        if "text" in row.values:
            found = f"{type(row.values['text']).__name__} under 'text'"
        raise RowError(f"{row.source}: expected an object with a string under 'text', found {found}")
    return Document(proper(row.values["text"], f"{row.source}: 'text'"), row.source)


def proper(text: Any, where: str) -> str:
    """A string that can be written as UTF-8. Raises `RowError`; `where` names it."""
    if not isinstance(text, str):
        raise RowError(f"{where}: expected a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} holds half of a surrogate pair, which is no character") from None
    return text
