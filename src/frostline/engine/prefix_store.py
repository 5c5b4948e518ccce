"""Activations of rows on disk: memory-mapped, checked, and safe to be killed at any instant.

    rows.bin      one row of activations after another
    entries.bin   16 bytes a row: a hash of its tokens, a checksum of its activations, a mark; zeros while it is empty
    key.json      what the activations depend on: another key is another folder
    lock          held by the one process that writes

An entry is written after its row is on disk, so that a kill leaves rows without an entry and no entry without a row. A
row is believed when its tokens are those asked for and its checksum agrees, which is looked at once a process. Read
`RowStore` first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frostline.errors import StorageError
from frostline.storage import storage_errors, write_text

ENTRY = struct.Struct("<QII")
MARK = 0x66726F73
COMMIT_BYTES = 64 << 20
"""Rows that are written before they are put on disk and entered."""


class RowStore:
    """Rows of one shape and type, by their index. Raises `StorageError` where nothing can be written."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, n_rows: int, like: torch.Tensor) -> None:
        """`like`: one row. What is there under the same key is used; what is damaged is made anew."""
        self.folder, self.n_rows = folder, n_rows
        self.shape, self.dtype, self.row_bytes = tuple(like.shape), like.dtype, like.nbytes
        self.was_damaged = False
        self._fresh: dict[int, bytes] = {}
        self._verified: set[int] = set()
        self._data = self._table = -1
        self._key = json.dumps(
            {**key, "rows": n_rows, "shape": list(self.shape), "dtype": str(self.dtype)}, sort_keys=True, indent=1
        )
        with storage_errors(folder):
            self._lock = _opened_lock(folder)
            try:
                self.writes = self._lock is not None and _lock(self._lock)
                if not self._is_whole():
                    self.was_damaged = (folder / "key.json").exists()
                    self._make()
                self._open()
            except BaseException:
                self._let_go()
                raise

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written into the folder, so that what is there is only read."""
        return self._lock is None

    @property
    def n_filled(self) -> int:
        """Rows that are there."""
        return int((self._entries["mark"] == MARK).sum()) + len(self._fresh)

    @property
    def n_bytes(self) -> int:
        """Of all rows."""
        return self.n_rows * self.row_bytes

    def has(self, rows: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether every one of the rows is there, made of these tokens (their hashes), and undamaged."""
        return all(self._has(row, t) for row, t in zip(rows, tokens, strict=True))

    def _has(self, row: int, tokens: int) -> bool:
        if self.tokens_of(row) != tokens:
            return False
        if row not in self._verified:
            if zlib.crc32(self._rows[row]) != self._entry(row)[1]:
                self.was_damaged = True
                return False
            self._verified.add(row)
        return True

    def tokens_of(self, row: int) -> int | None:
        """The hash of what a row was made of; None while it is not there."""
        if not 0 <= row < self.n_rows:
            return None
        tokens, _, mark = self._entry(row)
        return int(tokens) if mark == MARK else None

    def _entry(self, row: int) -> tuple[int, int, int]:
        tokens, checksum, mark = ENTRY.unpack(self._fresh.get(row) or bytes(self._entry_bytes[row]))
        return tokens, checksum, mark

    def read(self, rows: Sequence[int], *, pinned: bool = False) -> torch.Tensor:
        """The activations of rows that are there. `pinned`: in memory that a CUDA device reads by itself, which torch
        keeps for the next time: fresh pages for every batch took longer than most steps."""
        found = torch.empty((len(rows), self.row_bytes), dtype=torch.uint8, pin_memory=pinned)
        np.take(self._rows, list(rows), axis=0, out=found.numpy(), mode="clip")  # other modes copy once more
        return found.view(self.dtype).reshape(len(rows), *self.shape)

    def write(self, rows: Sequence[int], tokens: Sequence[int], activations: torch.Tensor) -> None:
        """Keep what is not there yet. Raises `StorageError`."""
        if not self.writes:
            return
        with storage_errors(self.folder):
            for row, t, values in zip(rows, tokens, activations, strict=True):
                data = values.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
                entry = ENTRY.pack(t, zlib.crc32(data), MARK)
                if self._has(row, t):
                    if entry == ENTRY.pack(*self._entry(row)):
                        continue
                    self.clear()  # what is there is whole, and not true: nor may the rest be
                    self.was_damaged = True
                self._write_at(self._data, data, row * self.row_bytes)
                self._fresh[row] = entry
                self._verified.add(row)
        if len(self._fresh) * self.row_bytes >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Put the written rows on disk, then enter them. Raises `StorageError`."""
        if not self._fresh:
            return
        with storage_errors(self.folder):
            os.fsync(self._data)
            reached("rows synced")
            for row, entry in self._fresh.items():
                self._write_at(self._table, entry, row * ENTRY.size)
            os.fsync(self._table)
            reached("entries synced")
        self._fresh.clear()

    def close(self) -> None:
        """Enter what was written and let go of the files. Raises `StorageError`."""
        try:
            if self._data >= 0:
                self.commit()
        finally:
            self._let_go()

    def _let_go(self, *, of_lock: bool = True) -> None:
        for file in (f for f in (self._data, self._table) if f >= 0):
            os.close(file)
        self._data = self._table = -1
        if of_lock and self._lock is not None:
            self._lock.close()

    def clear(self) -> None:
        """Forget every row. The files are new ones then: a process that reads keeps those that it has, for which it has
        looked whether they are true. Raises `StorageError`."""
        self._fresh.clear()
        self._verified.clear()
        if self.writes:
            self._let_go(of_lock=False)
            try:
                with storage_errors(self.folder):
                    self._make()
                    self._open()
            except StorageError:
                self.writes = False
                raise
        else:
            self._entry_bytes = np.zeros((self.n_rows, ENTRY.size), dtype=np.uint8)
            self._entries = self._entry_bytes.view(_ENTRY_TYPE)[:, 0]

    def _is_whole(self) -> bool:
        sizes = {"rows.bin": self.n_bytes, "entries.bin": self.n_rows * ENTRY.size}
        try:
            same = (self.folder / "key.json").read_text(encoding="utf-8").rstrip("\n") == self._key
            return same and all((self.folder / n).stat().st_size == size for n, size in sizes.items())
        except (OSError, UnicodeDecodeError):
            return False

    def _make(self) -> None:
        """New files; the key last, so that a kill on the way leaves nothing that looks whole."""
        if self._lock is None:
            raise StorageError(f"{self.folder} is read-only here, and what is in it cannot be used")
        if not self.writes:
            raise StorageError(f"{self.folder} is being made by another process")
        (self.folder / "key.json").unlink(missing_ok=True)
        for name, size in (("rows.bin", self.n_bytes), ("entries.bin", self.n_rows * ENTRY.size)):
            (self.folder / name).unlink(missing_ok=True)
            with (self.folder / name).open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS, not on Windows
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                os.fsync(file.fileno())
        write_text(self.folder / "key.json", self._key + "\n")

    def _open(self) -> None:
        flags = os.O_RDWR if self.writes else os.O_RDONLY
        self._data = os.open(self.folder / "rows.bin", flags)
        self._table = os.open(self.folder / "entries.bin", flags)
        try:
            self._rows = self._mapped("rows.bin", self.row_bytes)
            self._entry_bytes = self._mapped("entries.bin", ENTRY.size)
        except ValueError as error:  # shorter than a moment ago
            raise StorageError(f"{self.folder} is being made by another process") from error
        self._entries = self._entry_bytes.view(_ENTRY_TYPE)[:, 0]
        with suppress(OSError):
            os.utime(self.folder / "key.json")  # used now: the one that was used longest ago goes first

    def _mapped(self, name: str, width: int) -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.folder / name, dtype=np.uint8, mode="r", shape=(self.n_rows, width))

    @staticmethod
    def _write_at(file: int, data: Any, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(file, view, at)
            view, at = view[n:], at + n


_ENTRY_TYPE = np.dtype([("tokens", "<u8"), ("checksum", "<u4"), ("mark", "<u4")])


def token_hashes(input_ids: torch.Tensor) -> list[int]:
    """A number for every row of tokens: rows of other tokens have another one."""
    rows = input_ids.detach().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest()) for row in rows]


def make_room(parent: Path, needed: int, limit: int, *, keep: Path) -> list[Path]:
    """Delete stores under `parent`, those used longest ago first, until `needed` more bytes stay within `limit`.

    A store that a process holds is left alone. Returns what was deleted. Raises `StorageError` when it cannot fit.
    """
    if needed > limit:
        raise StorageError(f"it would hold {needed:,} bytes and the limit is {limit:,}")
    stores = [p.parent for p in parent.glob("*/key.json") if p.parent != keep]
    sizes = {s: _size(s) for s in sorted(stores, key=_last_used)}
    deleted: list[Path] = []
    for store, size in sizes.items():
        if sum(sizes.values()) - sum(sizes[d] for d in deleted) + needed <= limit:
            break
        if size and _delete(store):
            deleted.append(store)
    left = sum(sizes.values()) - sum(sizes[d] for d in deleted)
    if left + needed > limit:
        raise StorageError(f"other caches in use hold {left:,} bytes, it would hold {needed:,}, the limit is {limit:,}")
    free = shutil.disk_usage(parent).free
    if not _size(keep) and needed + (1 << 28) > free:
        raise StorageError(f"it would hold {needed:,} bytes and {free:,} are free on the disk")
    return deleted


def _last_used(store: Path) -> float:
    with suppress(OSError):
        return (store / "key.json").stat().st_mtime
    return 0.0


def _size(store: Path) -> int:
    with suppress(OSError):
        return (store / "rows.bin").stat().st_size
    return 0


def _delete(store: Path) -> bool:
    with suppress(OSError), (store / "lock").open("a") as lock:
        if _lock(lock):
            (store / "key.json").unlink()  # first: without it nothing here is believed
            shutil.rmtree(store, ignore_errors=True)
            return True
    return False


def _opened_lock(folder: Path) -> Any:
    """A store's lock file; None where a store is there and nothing can be written. Raises `OSError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and (folder / "key.json").exists():
            return None
        raise


def _lock(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def reached(point: str) -> None:
    """A moment inside a write; tests replace this function to kill the process there."""
