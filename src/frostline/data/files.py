"""Files, folders and hub names → rows: named values with their place, one after another, whatever the file's kind.

Text files are one row with `text`. What the values mean is `formats.py`'s business. JSON lines, CSV, TSV and gzip are
read by the standard library, Parquet, Zstandard, saved `datasets` and hub names by the packages of the extra `data`.
Read `rows_of` first; it is lazy, and only a `.json` file is ever in memory as a whole.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from frostline.data.stored import parquet_rows, saved_rows, stored_kind, zstd_stream
from frostline.errors import DataError
from frostline.recipe.data_spec import COMPRESSED, DATA_SUFFIXES, SUFFIXES

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_NO_TEXT = {
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive (.docx and .xlsx are such)",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"\x1f\x8b": "packed by gzip, which is unpacked where the name ends in .gz",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard, which is unpacked where the name ends in .zst",
    b"PAR1\x15": "a Parquet file, which is read where the name ends in .parquet",
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
}
"""How files begin that are often given for texts → what they are."""

LINE_BYTES = 1 << 28
"""The longest line that is read: a file that has no line feeds, or unpacks without end, must not fill the memory."""

Errors = Literal["strict", "replace"]


@dataclass(frozen=True, slots=True)
class Row:
    """Named values from one place."""

    values: dict[str, Any]
    source: str
    """`file` for a text, `file:line` where lines are rows, `file[index]` (0-based) where items of a list are."""
    is_text: bool = False
    """From a text file, so that there is nothing to detect."""


class RowError(DataError):
    """One row cannot be used; the ones after it may be."""


def rows_of(file: Path, *, errors: Errors = "strict") -> Iterator[Row | RowError]:
    """The rows of one file, an error in the place of each that is none. Raises `DataError` for an unreadable file."""
    kind = kind_of(file)
    with _reading(file):
        match kind:
            case ".jsonl":
                with _opened(file) as stream:
                    yield from _json_lines(_lines(file, stream, errors), file)
            case ".json":
                yield from _json(file, errors)
            case ".csv" | ".tsv":
                with _opened(file) as stream:
                    yield from _csv(_lines(file, stream, errors), file, "," if kind == ".csv" else "\t")
            case ".parquet":
                for i, values in enumerate(parquet_rows(file)):
                    yield Row(values, f"{file}[{i}]")
            case _:
                yield from _text(file, errors)


def kind_of(file: Path) -> str:
    """The suffix that decides how a file is read, without the one of its compression."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for, those of a folder sorted by name. Raises `DataError`."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"no text at {path}: there is no such file or folder")
    named = sorted(f for f in path.rglob("*") if kind_of(f) in SUFFIXES and f.name not in _NOT_DATA)
    files = [f for f in named if f.is_file() or f.is_symlink()]  # a broken link is an error when it is read
    if any(kind_of(f) in DATA_SUFFIXES for f in files):
        files = [f for f in files if not _is_dataset_card(f)]
    if not files:
        raise DataError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return files


def _is_dataset_card(file: Path) -> bool:
    """A README beside data that begins with YAML, as dataset hubs have it: no training text."""
    if file.name.lower() != "readme.md" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) in (b"---\n", b"---\r")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' own `save_to_disk`."""
    return path.is_dir() and stored_kind(path) is not None


def saved_dataset_rows(path: Path, *, split: str | None) -> Iterator[Row]:
    """The rows of a saved dataset."""
    for i, values in enumerate(saved_rows(path, split=split)):
        yield Row(values, f"{path}[{i}]")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What files raise when they cannot be read, as `DataError`s with the file's name."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file}: its compression is broken: {error}") from None
    except csv.Error as error:
        raise DataError(f"{file}: not valid CSV: {error}") from None


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    match file.suffix.lower():
        case ".gz":
            with gzip.open(file, "rb") as stream:
                yield stream  # type: ignore[misc]
        case ".zst":
            with zstd_stream(file) as stream:
                yield stream
        case _:
            with file.open("rb") as stream:
                yield stream


def _text(file: Path, errors: Errors) -> Iterator[Row]:
    if file.suffix.lower() in COMPRESSED:
        with _opened(file) as stream:
            content = stream.read()
    else:
        content = file.read_bytes()
    for begins, what in _NO_TEXT.items():
        if content.startswith(begins):
            raise DataError(f"{file}: this is {what}, no text: save its text as .txt, or its rows as .jsonl")
    yield Row({"text": _decoded(content, file, errors).removeprefix("\ufeff")}, str(file), is_text=True)


def _decoded(content: bytes, file: Path, errors: Errors, *, line: int = 1, offset: int = 0) -> str:
    """Bytes as text; `line` and `offset` are where they begin in the file."""
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        at = line + content.count(b"\n", 0, error.start)
        is_utf_16 = not offset and content.startswith((b"\xff\xfe", b"\xfe\xff"))
        remedy = " (it is UTF-16: iconv -f UTF-16 -t UTF-8)" if is_utf_16 else ", or set `data.undecodable: replace`"
        raise DataError(
            f"{file}:{at}: not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start} of the file; "
            f"convert the file to UTF-8{remedy}"
        ) from None


def _lines(file: Path, stream: BinaryIO, errors: Errors) -> Iterator[str]:
    """Lines with their line feeds; only a line feed ends one."""
    offset = 0
    for number, raw in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), start=1):
        if len(raw) > LINE_BYTES:
            raise DataError(f"{file}:{number}: a line of more than {LINE_BYTES} bytes; one example is one line")
        text = _decoded(raw, file, errors, line=number, offset=offset)
        offset += len(raw)
        yield text.removeprefix("\ufeff") if number == 1 else text


def _json_lines(lines: Iterable[str], file: Path) -> Iterator[Row | RowError]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield RowError(f"{where}: not valid JSON: {_why_no_json(line, error)}")
            continue
        yield _object(row, where)


def _why_no_json(line: str, error: Exception) -> str:
    """What is wrong with a line, and what its file may be instead."""
    if "\0" in line:
        return "the line holds NUL bytes, as after a write that was cut off"
    if line.lstrip().startswith("[") or line.strip() == "{":
        return "one example is one line; a list, or what is spread over lines, is read from a file that ends in .json"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if error.msg == "Extra data":
        return f"it ends before character {error.colno}, and the line goes on; one example is one line"
    return f"{error.msg} (character {error.colno})"


def _object(row: Any, where: str) -> Row | RowError:
    if not isinstance(row, dict):
        return RowError(f"{where}: expected an object with named values, found {type(row).__name__}")
    return Row(row, where)


def _json(file: Path, errors: Errors) -> Iterator[Row | RowError]:
    """A list of objects, `{"data": [...]}`, or (whatever the suffix says) one object per line."""
    with _opened(file) as stream:
        has_lines = _has_json_lines(stream, errors)
    with _opened(file) as stream:
        if has_lines:
            yield from _json_lines(_lines(file, stream, errors), file)
            return
        text = _decoded(stream.read(), file, errors).removeprefix("\ufeff")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        found = "keys " + _names(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f'{file}: expected a list of objects, {{"data": [...]}} or one object per line, found {found}')
    for i, item in enumerate(items):
        yield _object(item, f"{file}[{i}]")


def _has_json_lines(stream: BinaryIO, errors: Errors) -> bool:
    """Whether the first line is an object by itself, with more lines behind it."""
    first = next((line for line in stream if line.strip()), b"")
    if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") or not any(line.strip() for line in stream):
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig", errors)), dict)
    except (ValueError, RecursionError):
        return False


def _csv(lines: Iterator[str], file: Path, delimiter: str) -> Iterator[Row | RowError]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # its default refuses texts of 128 kB
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header = next((h for h in reader if h), [])
    if len(header) == 1 and any(other in header[0] for other in {",", ";", "\t"} - {delimiter}):
        raise DataError(
            f"{file}:1: the header is one column, {header[0]!r}: columns stand between commas in .csv, tabs in .tsv"
        )
    doubled = sorted({h for h in header if header.count(h) > 1})
    if doubled:
        raise DataError(f"{file}:1: the header names a column twice: {_names(doubled)}")
    line = reader.line_num + 1
    for fields in reader:
        where, line = f"{file}:{line}", reader.line_num + 1
        if not fields:
            continue
        if len(fields) != len(header):
            yield RowError(f"{where}: {len(fields)} fields, but the header names {len(header)} ({_names(header)})")
            continue
        yield Row(dict(zip(header, fields, strict=True)), where)


def _names(names: Iterable[object]) -> str:
    return ", ".join(map(repr, names)) or "none"
