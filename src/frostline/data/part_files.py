"""The files that tokens are in: parts while they are made, then all of them one after another in a few flat files.

Read `write_part` and `append_all`; when which is written is `token_files.py`'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from frostline.data.sources import SHOWN, Tally
from frostline.data.store import Block
from frostline.storage import storage_errors

FILES = {
    "tokens": torch.int32,
    "learns": torch.uint8,
    "offsets": torch.int64,
    "n_bytes": torch.int64,
    "sources": torch.int32,
}


def part_name(index: int) -> str:
    """The file of a part."""
    return f"part-{index:07d}.safetensors"


def write_part(path: Path, block: Block, notes: dict[str, Any]) -> None:
    """A part that appears whole."""
    arrays: dict[str, Any] = {"tokens": block.tokens, "lengths": block.lengths, "n_bytes": block.n_bytes}
    arrays["sources"] = block.sources
    if block.learns is not None:
        arrays["learns"] = block.learns
    temporary = path.with_suffix(".tmp")
    with storage_errors(path):
        save_file(arrays, temporary, {"files": json.dumps(block.files), "notes": json.dumps(notes)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)


def readable(path: Path) -> bool:
    """Whether a part is there and whole."""
    try:
        read_part(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        return False
    return True


def read_part(path: Path) -> tuple[Block, dict[str, Any]]:
    """What was written: the examples, and what was left out of them."""
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a mapping)
    block = Block(
        tokens=arrays["tokens"],
        learns=arrays.get("learns"),
        lengths=arrays["lengths"],
        n_bytes=arrays["n_bytes"],
        sources=arrays["sources"],
        files=tuple(json.loads(about["files"])),
    )
    return block, json.loads(about["notes"])


class _Hashed:
    """A file that is written once, from its beginning to its end, and knows its size and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.name, self.file, self.size, self.hash = path.name, path.open("wb"), 0, hashlib.sha256()

    def write(self, array: np.ndarray[Any, Any]) -> None:
        """Append the array's bytes."""
        content = np.ascontiguousarray(array).view(np.uint8).data
        self.file.write(content)
        self.hash.update(content)
        self.size += len(content)


def append_all(folder: Path, parts: list[Path], tally: Tally) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """(what documents came from, name → bytes and SHA-256 of every file written)."""
    files: dict[str, int] = {}
    at, some_do_not_learn = 0, any(_says_what_learns(p) for p in parts)
    with ExitStack() as closing:
        names = [n for n in FILES if n != "learns" or some_do_not_learn]
        streams = {name: _Hashed(folder / f"{name}.bin") for name in names}
        for stream in streams.values():
            closing.enter_context(stream.file)
        streams["offsets"].write(np.zeros(1, np.int64))
        for path in parts:
            block, notes = read_part(path)
            streams["tokens"].write(block.tokens)
            streams["offsets"].write(at + np.cumsum(block.lengths, dtype=np.int64))
            streams["n_bytes"].write(block.n_bytes)
            numbers = np.asarray([files.setdefault(f, len(files)) for f in block.files], np.int32)
            streams["sources"].write(numbers[block.sources] if len(numbers) else numbers)
            if some_do_not_learn:
                streams["learns"].write(_learns(block))
            at += int(block.lengths.sum())
            _note(tally, notes)
    return list(files), {s.name: {"bytes": s.size, "sha256": s.hash.hexdigest()} for s in streams.values()}


def _says_what_learns(path: Path) -> bool:
    with safe_open(path, framework="numpy") as file:
        return "learns" in file.keys()  # noqa: SIM118 (a handle, not a mapping)


def _learns(block: Block) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if block.learns is not None:
        return block.learns
    learns = np.ones(len(block.tokens), np.uint8)
    first = np.cumsum(block.lengths) - block.lengths
    learns[first[block.lengths > 0]] = 0
    return learns


def _note(tally: Tally, notes: dict[str, Any]) -> None:
    """What the makers of parts left out, and how they found what learns."""
    for path, found in notes.items():
        if not path:  # copies of a mixture are not counted again
            continue
        of = tally.of(path)
        of.dropped += found["dropped"]
        of.reasons += found["reasons"][: max(0, SHOWN - len(of.reasons))]
        for method, n in found["methods"].items():
            of.methods[method] = of.methods.get(method, 0) + n
