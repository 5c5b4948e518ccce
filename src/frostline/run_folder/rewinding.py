"""How far the records of a run have come, and taking them back to that: what came after a checkpoint is written again.

A checkpoint keeps `record_sizes`; a resume calls `check_kept` and `rewind` with them. Read these three.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from frostline.errors import RunFolderError
from frostline.run_folder.folder import RunFolder
from frostline.storage import storage_errors, sync

NUMBERED = {"boundaries": "boundary-*.json", "entries": "entry-*.safetensors"}
"""Evidence that comes in one file per stage: what their number is called → their names."""
MADE_LATER = ("report.html", "plan.json", "claims.json", "samples.json", "evidence/model-files.json")
"""Files that are made from a finished run."""


def record_sizes(folder: RunFolder) -> dict[str, int]:
    """How far the records that grow have come: bytes, or numbers of files. They are on disk afterwards."""
    sizes = {}
    for name, path in _growing(folder).items():
        if path.exists():
            with storage_errors(path):
                sync(path)
            sizes[name] = path.stat().st_size
    sizes["boundaries"] = len(folder.read_boundaries())
    sizes["entries"] = sum(1 for _ in folder.evidence.glob(NUMBERED["entries"]))
    return sizes


def rewind(folder: RunFolder, sizes: Mapping[str, int]) -> None:
    """Take the records back to what they were. Raises `RunFolderError` when less is there than there was, and changes
    nothing then; `{}` takes away everything."""
    check_kept(folder, sizes)
    for name, path in _growing(folder).items():
        _cut(path, sizes.get(name, 0))
    for kind, pattern in NUMBERED.items():
        _remove_from(sizes.get(kind, 0), folder.evidence, pattern)
    for name in MADE_LATER:
        with storage_errors(folder.path / name):
            (folder.path / name).unlink(missing_ok=True)
    shutil.rmtree(folder.model, ignore_errors=True)


def check_kept(folder: RunFolder, sizes: Mapping[str, int]) -> None:
    """Raise `RunFolderError` when less is there than there was, or what is there cannot be read: better before a run
    goes on than at its end."""
    for name, path in _growing(folder).items():
        _check_not_less(path, sizes.get(name, 0))
        _check_lines(path, sizes.get(name, 0))
    for i in range(sizes.get("boundaries", 0)):
        folder.read_json(f"evidence/boundary-{i}.json")
    for i in range(sizes.get("entries", 0)):
        _check_weights(folder.entry(i))


def _growing(folder: RunFolder) -> dict[str, Path]:
    """The records that grow by a line at a time, by their names in the folder."""
    return {path.relative_to(folder.path).as_posix(): path for path in folder.growing}


def _check_not_less(path: Path, n_bytes: int) -> None:
    there = path.stat().st_size if path.exists() else 0
    if there < n_bytes:
        raise RunFolderError(f"{path} has lost lines: it has {there} bytes and had {n_bytes} at the checkpoint")


def _check_lines(path: Path, n_bytes: int) -> None:
    """Every line of the first `n_bytes` must be one that was written."""
    if not n_bytes:
        return
    try:
        with path.open("rb") as file:
            for line in file.read(n_bytes).splitlines():
                json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not readable: {error}") from None


def _check_weights(path: Path) -> None:
    """A file of tensors must be there, and have the shapes that it says."""
    if not path.is_file():
        raise RunFolderError(f"{path} is gone: it holds the values that a stage started with, which the audit needs")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path} is not readable: {error}") from None


def _cut(path: Path, n_bytes: int) -> None:
    """Leave the first `n_bytes` of a file; a file with nothing in it goes."""
    with storage_errors(path):
        if path.exists() and n_bytes:
            os.truncate(path, n_bytes)
        elif path.exists():
            path.unlink()


def _remove_from(first: int, folder: Path, pattern: str) -> None:
    """Remove the numbered files from number `first` on."""
    for path in folder.glob(pattern):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) >= first:
            with storage_errors(path):
                path.unlink()
