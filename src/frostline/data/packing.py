"""Documents of many lengths into rows of one length, as full as they get. Read `pack_lengths` first.

How many rows there are and what lengths lie in them depends on the lengths alone; which document of a length goes where
is drawn. A million documents take no longer than their sorting: rows of the same lengths are made together, after
"Efficient sequence packing without cross-contamination" (Krell et al., 2021), which calls it histogram packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frostline.randomness import derive_seed

Ints = np.ndarray[Any, np.dtype[np.int64]]


def pack_lengths(lengths: Ints, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Patterns of rows and how often each comes: best fit, the longest first. Every length is 1 to `capacity`."""
    values, counts = np.unique(lengths, return_counts=True)
    open_rows: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    """Room left → patterns with that much room, and how many rows have each."""
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = min((r for r in open_rows if r >= length), default=None)
            if room is None:
                each = capacity // length
                for n in ((each, left // each), (left % each, 1)):
                    if all(n):
                        _put(open_rows, capacity - n[0] * length, (length,) * n[0], n[1])
                break
            pattern, rows = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
            used = min(rows, left)
            left -= used
            _put(open_rows, room - length, (*pattern, length), used)
            _put(open_rows, room, pattern, rows - used)
    return [found for room in sorted(open_rows) for found in open_rows[room]]


def _put(open_rows: dict[int, list[tuple[tuple[int, ...], int]]], room: int, pattern: tuple[int, ...], n: int) -> None:
    if n:
        open_rows.setdefault(room, []).append((pattern, n))


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which documents lie in which row."""

    members: Ints
    """Indices of documents, row after row."""
    starts: Ints
    """(rows + 1,): where each row's members begin in `members`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Ints:
        """The documents of a row, in their order."""
        return self.members[self.starts[index] : self.starts[index + 1]]


def plan_rows(lengths: Ints, capacity: int, *, seed: int) -> RowPlan:
    """Every document in exactly one row, none longer than `capacity`; a pure function of its arguments."""
    patterns = pack_lengths(lengths, capacity)
    sizes = np.concatenate([np.empty(0, np.int64), *(np.full(n, len(p), np.int64) for p, n in patterns)])
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    places = np.concatenate([np.empty(0, np.int64), *(np.tile(np.asarray(p, np.int64), n) for p, n in patterns)])
    generator = torch.Generator().manual_seed(derive_seed(seed, "packing"))
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    by_length = drawn[np.argsort(-lengths[drawn], kind="stable")]
    members = np.empty(len(lengths), np.int64)
    members[np.argsort(-places, kind="stable")] = by_length
    return RowPlan(members, starts)
