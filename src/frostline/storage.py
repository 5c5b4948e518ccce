"""Files that appear whole or not at all, and the system's errors about them as `StorageError`.

What stands in the files is their owners' business. Read `storage_errors` and `write_text` first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from frostline.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path` into a `StorageError`."""
    try:
        yield
    except OSError as error:
        read = isinstance(error.filename, str) and error.filename2 is None and not _belongs(Path(error.filename), path)
        what = f"cannot read {error.filename}" if read else f"cannot write {path}"
        raise StorageError(f"{what}: {error.strerror or error}") from error
    except SafetensorError as error:  # what safetensors makes of the system's errors
        raise StorageError(f"cannot write {path}: {error}") from error


def _belongs(other: Path, path: Path) -> bool:
    """Whether `other` is `path`, leads to it, lies in it, or is what stands beside it until it is whole."""
    if path.is_relative_to(other):
        return True
    if not other.is_relative_to(path.parent):
        return False
    return path.name in other.relative_to(path.parent).parts[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises `StorageError`."""
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A place beside `target`, for a file or a folder, that becomes it at the end; nothing is left of it when something
    fails. Raises `StorageError`."""
    temporary = target.with_name(f".{target.name}.tmp-{uuid4().hex[:8]}")
    try:
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
