"""What is computed together: rows of tokens, and which tokens of a row may see each other. Read `Batch` first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch

Kept = Literal["calls", "mask"]
"""How documents of one row are kept apart: attention is called for each (`calls`), or a mask covers what lies in
another document (`mask`; transformers makes it from positions that begin again)."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents lie in rows that hold several: one after another from each row's start."""

    lengths: tuple[tuple[int, ...], ...]
    """Tokens of every document, row by row; what is left of a row after them is padding."""
    kept_by: Kept = "calls"

    def spans(self, row: int) -> list[tuple[int, int]]:
        """(start, end) of every document of a row."""
        ends = list(accumulate(self.lengths[row]))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def positions(self, length: int) -> torch.Tensor:
        """(rows, length), int64: the place of each token in its own document; padding counts as one."""
        out = torch.zeros(len(self.lengths), length, dtype=torch.long)
        for row, lengths in enumerate(self.lengths):
            rest = length - sum(lengths)
            parts = [torch.arange(n) for n in (*lengths, rest) if n]
            out[row] = torch.cat(parts)
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that are computed together."""

    input_ids: torch.Tensor
    """(rows, length), int64."""
    labels: torch.Tensor
    """(rows, length), int64: the next token; -100 counts for nothing."""
    indices: tuple[int, ...] | None = None
    """Which rows of the data these are; None where a row has no fixed shape."""
    documents: Documents | None = None
    """Where a row holds several documents; None where each row is one text."""
    attention_mask: torch.Tensor | None = None
    """(rows, length), int64: 0 where a row is padding, where rows differ in length."""
    counted: int | None = None
    """Tokens that count in the loss, where they were counted: a device need not be asked, and waited for, again."""

    @property
    def n_targets(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != -100).sum()) if self.counted is None else self.counted

    @property
    def inputs(self) -> dict[str, Any]:
        """What a causal language model of transformers is called with."""
        return model_inputs(self.input_ids, self.documents, self.attention_mask)

    def to(self, device: torch.device) -> Batch:
        """The same rows on another device."""
        mask = None if self.attention_mask is None else _moved(self.attention_mask, device)
        ids, labels = _moved(self.input_ids, device), _moved(self.labels, device)
        return replace(self, input_ids=ids, labels=labels, attention_mask=mask, counted=self.n_targets)

    def split(self, n: int) -> list[Batch]:
        """`n` micro-batches of equal size: of rows, or of the documents of a single row (`n` divides them)."""
        if n == 1:
            return [self]
        if self.documents is not None and len(self.documents.lengths) == 1:
            return self._split_row(self.documents, n)
        each = len(self.input_ids) // n
        return [self._rows(at, at + each) for at in range(0, len(self.input_ids), each)]

    def _rows(self, start: int, end: int) -> Batch:
        documents, mask, indices = self.documents, self.attention_mask, self.indices
        length = self.input_ids.shape[1]
        if mask is not None:
            mask = mask[start:end]
            length = int(mask.sum(1).max())  # no longer than its own longest row
            mask = mask[:, :length]
        return Batch(
            input_ids=self.input_ids[start:end, :length],
            labels=self.labels[start:end, :length],
            indices=None if indices is None else indices[start:end],
            documents=None if documents is None else replace(documents, lengths=documents.lengths[start:end]),
            attention_mask=mask,
        )

    def _split_row(self, documents: Documents, n: int) -> list[Batch]:
        (lengths,), spans = documents.lengths, documents.spans(0)
        each, out = len(lengths) // n, []
        for at in range(0, len(lengths), each):
            start, end = spans[at][0], spans[at + each - 1][1]
            inside = replace(documents, lengths=(lengths[at : at + each],))
            ids, labels = self.input_ids[:, start:end], self.labels[:, start:end]
            out.append(Batch(input_ids=ids, labels=labels, documents=inside))
        return out


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; CUDA takes it from pinned memory while it still computes what came before."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def model_inputs(
    input_ids: torch.Tensor, documents: Documents | None = None, attention_mask: torch.Tensor | None = None
) -> dict[str, Any]:
    """What a causal language model of transformers is called with for such rows."""
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if documents is not None:
        inputs["position_ids"] = documents.positions(input_ids.shape[1]).to(input_ids.device)
        if documents.kept_by == "calls":
            inputs["documents"] = documents
    return inputs
