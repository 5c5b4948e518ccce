"""What one step takes, where its rows are made of documents: lengths stand for values. Read `StepShape` first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from frostline.data import Documents, Kept, model_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """One step in documents."""

    layout: Literal["packed", "padded", "flat"]
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of every document, row by row; a flat step is one row."""
    length: int
    """Tokens per packed row."""
    kept_by: Kept | None = None
    """How documents of one row are kept apart."""

    @property
    def tokens(self) -> int:
        """Tokens of documents."""
        return sum(map(sum, self.lengths))

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding included."""
        match self.layout:
            case "packed":
                return len(self.lengths) * self.length
            case "padded":
                return len(self.lengths) * max(map(sum, self.lengths))
            case "flat":
                return self.tokens

    @property
    def squares(self) -> int:
        """Σ n² over documents: what attention grows with."""
        return sum(n * n for row in self.lengths for n in row)

    def split(self, n: int) -> list[StepShape]:
        """The shapes of `n` micro-batches."""
        if self.layout == "flat":
            (row,) = self.lengths
            each = len(row) // n
            parts: list[tuple[tuple[int, ...], ...]] = [(row[at : at + each],) for at in range(0, len(row), each)]
        else:
            each = len(self.lengths) // n
            parts = [self.lengths[at : at + each] for at in range(0, len(self.lengths), each)]
        return [StepShape(layout=self.layout, lengths=part, length=self.length, kept_by=self.kept_by) for part in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeRows:
    """A micro-batch of rows without values: every target counts."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    n_targets: int
    documents: Documents | None = None
    attention_mask: torch.Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return model_inputs(self.input_ids, self.documents, self.attention_mask)


def micro_batches(
    rows: int, length: int, accumulate: int, ids: torch.Tensor | None = None, shape: StepShape | None = None
) -> Sequence[FakeRows]:
    """The micro-batches of a step: all alike, or as `shape` says; of `ids` (rows, at least as long), or of zeros."""
    if shape is not None:
        return [_of_shape(part, ids) for part in shape.split(accumulate)]
    each = rows // accumulate
    ids = torch.zeros((each, length), dtype=torch.long) if ids is None else ids[:each]
    return [FakeRows(input_ids=ids, labels=ids, n_targets=each * length)] * accumulate


def _of_shape(shape: StepShape, ids: torch.Tensor | None) -> FakeRows:
    rows = 1 if shape.layout == "flat" else len(shape.lengths)
    size = (rows, shape.computed // rows)
    device = None if ids is None else ids.device
    ids = torch.zeros(size, dtype=torch.long) if ids is None else ids.flatten()[: shape.computed].view(size)
    mask = torch.ones(size, dtype=torch.long, device=device) if shape.layout == "padded" else None
    documents = Documents(shape.lengths, shape.kept_by) if shape.kept_by is not None else None
    return FakeRows(input_ids=ids, labels=ids, n_targets=shape.tokens, documents=documents, attention_mask=mask)
