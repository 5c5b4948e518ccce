"""A store whose rows are read before they are asked for and written while the next step is computed.

One thread does everything with the files, in the order in which it was asked to: a row that is read was written before.
Its errors are raised where the next row is written, or at the end. Nothing that is computed depends on when it does
what. Read `AheadStore` first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from frostline.engine.prefix_store import RowStore

DEPTH = 2
"""Batches that wait to be written, at most: the next one waits for the first of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    tokens: list[int]
    """Hashes of what the rows were made of."""
    activations: torch.Tensor
    """On the CPU, pinned for CUDA."""


class AheadStore:
    """The rows of a store. Close it: what was handed over is on disk then."""

    def __init__(self, store: RowStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="frostline-prefix")
        self._handed: dict[int, int] = {}
        self._writing: deque[tuple[Sequence[int], Future[None]]] = deque()
        self._ahead: tuple[tuple[int, ...], Future[_Loaded | None]] | None = None

    def has(self, rows: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether all of the rows were kept, made of these tokens (their hashes); says nothing of damage."""
        return all(self._tokens_of(row) == t for row, t in zip(rows, tokens, strict=True))

    def read_ahead(self, rows: Sequence[int]) -> None:
        """Rows that will be asked for next; they are read now, if they are there."""
        if self._ahead is not None and self._ahead[0] == tuple(rows):
            return
        if rows and all(self._tokens_of(row) is not None for row in rows):
            self._ahead = tuple(rows), self._thread.submit(self._load, tuple(rows))

    def read(self, rows: Sequence[int], tokens: Sequence[int]) -> torch.Tensor | None:
        """The activations of rows, on the device; None where one is not there, is of other tokens or is damaged."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != tuple(rows):
            ahead = tuple(rows), self._thread.submit(self._load, tuple(rows))
        loaded = ahead[1].result()
        if loaded is None or loaded.tokens != list(tokens):
            return None
        return loaded.activations.to(self.device, non_blocking=True)

    def write(self, rows: Sequence[int], tokens: Sequence[int], activations: torch.Tensor) -> None:
        """Keep rows, soon; `activations` belong to the store from now on. Raises `StorageError` of an earlier one."""
        if not self.store.writes:
            return
        while self._writing and (len(self._writing) >= DEPTH or self._writing[0][1].done()):
            self._finish_one()
        arrived = None
        here = activations.detach().to("cpu", non_blocking=True)  # pinned; CUDA goes on
        if activations.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._handed.update(zip(rows, tokens, strict=True))
        self._writing.append((rows, self._thread.submit(self._write, rows, tokens, here, arrived)))

    def fits(self, activations: torch.Tensor) -> bool:
        """Whether these are rows of the store's shape and type."""
        return (tuple(activations.shape[1:]), activations.dtype) == (self.store.shape, self.store.dtype)

    def damaged(self) -> bool:
        """Whether a row was found damaged since this was asked last."""
        found, self.store.was_damaged = self.store.was_damaged, False
        return found

    def clear(self) -> None:
        """Forget every row."""
        self._ahead = None
        self._handed.clear()
        self._thread.submit(self.store.clear).result()

    def close(self) -> None:
        """Write what was handed over, and let go of the files. Raises `StorageError`."""
        try:
            while self._writing:
                self._finish_one()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self.store.close()

    def _finish_one(self) -> None:
        """Wait for what was handed over first; it is in the store then."""
        rows, done = self._writing.popleft()
        done.result()
        still = {row for others, _ in self._writing for row in others}
        for row in rows:
            if row not in still:
                self._handed.pop(row, None)

    def _tokens_of(self, row: int) -> int | None:
        found = self._handed.get(row)
        return self.store.tokens_of(row) if found is None else found

    def _load(self, rows: Sequence[int]) -> _Loaded | None:
        """On the thread."""
        tokens = [self.store.tokens_of(row) for row in rows]
        there = [t for t in tokens if t is not None]
        if len(there) < len(rows) or not self.store.has(rows, there):
            return None
        return _Loaded(tokens=there, activations=self.store.read(rows, pinned=self.device.type == "cuda"))

    def _write(
        self, rows: Sequence[int], tokens: Sequence[int], here: torch.Tensor, arrived: torch.cuda.Event | None
    ) -> None:
        """On the thread."""
        if arrived is not None:
            arrived.synchronize()
        self.store.write(rows, tokens, here)
