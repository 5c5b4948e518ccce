"""Text files and folders → documents. A file that is not UTF-8, or not what it says, is an error with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from frostline.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl")
"""What is read from a folder; a file named by hand may have another suffix and is then read as text."""


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
        for file in _files_of(path):
            yield from _documents_of(file)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"no text at {path}: there is no such file or folder")
    named = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    files = [f for f in named if f.is_file() or f.is_symlink()]  # a broken link is an error when it is read
    if not files:
        raise DataError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return files


def _documents_of(file: Path) -> Iterator[Document]:
    text = _read_utf8(file)
    if file.suffix.lower() == ".jsonl":
        yield from _json_lines(text, file)
    elif text.strip():
        yield Document(text, str(file))


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _json_lines(text: str, file: Path) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = type(row).__name__ if not isinstance(row, dict) else "keys " + (", ".join(map(repr, row)) or "none")
            if isinstance(row, dict) and "text" in row:
                found = f"{type(row['text']).__name__} under 'text'"
            raise DataError(f"{where}: expected an object with a string under 'text', found {found}")
        if any("\ud800" <= c <= "\udfff" for c in row["text"]):
            raise DataError(f"{where}: 'text' holds half of a surrogate pair, which is no character")
        if row["text"].strip():
            yield Document(row["text"], where)
