"""Documents → rows, in three layouts beside the plain stream of `tokens.py`. Read `Layout`, then the class of each.

All have a length, and `batch(indices)`, which is a pure function: what a step trains on follows from seed and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from frostline.data.batch import Batch, Documents, Kept
from frostline.data.packing import RowPlan, plan_rows
from frostline.data.pieces import Pieces

Layout = Literal["stream", "packed", "padded", "flat"]
"""`stream`: all text in one stream, cut into rows. `packed`: rows of one length that hold several documents.
`padded`: a row for each document, filled up to the longest of its batch. `flat`: a batch is one row of its documents.
"""


class RowSource(Protocol):
    """Rows that batches are made of."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, in that order."""
        ...


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of one length, each with as many whole documents as fit; which ones is drawn once, from a seed."""

    pieces: Pieces
    length: int
    plan: RowPlan
    kept_by: Kept

    @classmethod
    def of(cls, pieces: Pieces, length: int, *, seed: int, kept_by: Kept) -> PackedRows:
        """The rows of `pieces`."""
        return cls(pieces, length, plan_rows(pieces.lengths, length, seed=seed), kept_by)

    def __len__(self) -> int:
        return len(self.plan)

    def lengths(self, indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Tokens of every document in the rows at `indices`."""
        return tuple(tuple(self.pieces.lengths[self.plan.row(i)].tolist()) for i in indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, in that order; what is left at their ends is no target."""
        indices = tuple(map(int, indices))
        ids = torch.zeros(len(indices), self.length, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, index in enumerate(indices):
            at = 0
            for member in self.plan.row(index).tolist():
                inputs, targets = self.pieces.piece(member)
                ids[row, at : at + len(inputs)], labels[row, at : at + len(inputs)] = inputs, targets
                at += len(inputs)
        documents = Documents(self.lengths(indices), self.kept_by)
        return Batch(input_ids=ids, labels=labels, indices=indices, documents=documents)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """A row for each document, filled up at its end to the longest of the batch."""

    pieces: Pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def lengths(self, indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Tokens of the document in each row at `indices`."""
        return tuple((n,) for n in self.pieces.lengths[list(indices)].tolist())

    def batch(self, indices: Sequence[int]) -> Batch:
        """The documents at `indices`, in that order."""
        found = [self.pieces.piece(int(i)) for i in indices]
        ids = torch.zeros(len(found), max((len(i) for i, _ in found), default=0), dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (inputs, targets) in enumerate(found):
            ids[row, : len(inputs)], labels[row, : len(inputs)], mask[row, : len(inputs)] = inputs, targets, 1
        return Batch(input_ids=ids, labels=labels, attention_mask=mask)


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Documents that are laid into one row when a batch is made: nothing is padded."""

    pieces: Pieces
    kept_by: Kept

    def __len__(self) -> int:
        return len(self.pieces)

    def lengths(self, indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Tokens of the documents of the one row."""
        return (tuple(self.pieces.lengths[list(indices)].tolist()),)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The documents at `indices` in one row, in that order."""
        found = [self.pieces.piece(int(i)) for i in indices]
        documents = Documents((tuple(len(i) for i, _ in found),), self.kept_by)
        ids, labels = torch.cat([i for i, _ in found])[None], torch.cat([t for _, t in found])[None]
        return Batch(input_ids=ids, labels=labels, documents=documents)
