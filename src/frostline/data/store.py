"""Examples as a few flat arrays: in memory, or mapped from files, where no more of them is in memory than is looked at.

A store knows documents and tokens and nothing of rows. Read `Store` first; `token_files.py` writes and opens files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frostline.data.example import Example

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Documents, one after another."""

    tokens: torch.Tensor
    """(tokens,), int32."""
    learns: torch.Tensor | None
    """(tokens,), uint8: 1 where a token counts as a target; None where all do but the first of each document."""
    offsets: torch.Tensor
    """(documents + 1,), int64: where each document begins in `tokens`."""
    n_bytes: torch.Tensor
    """(documents,), int64: UTF-8 bytes of text that its learning tokens stand for."""
    sources: torch.Tensor
    """(documents,), int32: index into `files`."""
    files: tuple[str, ...]
    """Where documents came from."""

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """(documents,), int64: tokens of each."""
        return np.diff(self.offsets.numpy())

    @property
    def n_learning(self) -> int:
        """Tokens that count as targets."""
        if self.learns is None:
            return len(self.tokens) - self.n_documents
        return int(np.sum(self.learns.numpy(), dtype=np.int64))

    def of_files(self, indices: Iterable[int]) -> Ints:
        """Documents that came from the given files."""
        return np.flatnonzero(np.isin(self.sources.numpy(), list(indices)))

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Store:
        """The examples in memory."""
        block = Block.of(examples)
        return cls(
            tokens=torch.from_numpy(block.tokens),
            learns=None if block.learns is None else torch.from_numpy(block.learns),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int64)),
            n_bytes=torch.from_numpy(block.n_bytes),
            sources=torch.from_numpy(block.sources),
            files=block.files,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some examples as arrays: what one worker makes at a time."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    learns: np.ndarray[Any, np.dtype[np.uint8]] | None
    lengths: Ints
    n_bytes: Ints
    sources: np.ndarray[Any, np.dtype[np.int32]]
    files: tuple[str, ...]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Block:
        """The examples, one after another."""
        files: dict[str, int] = {}
        ids: list[np.ndarray[Any, np.dtype[np.int32]]] = [np.empty(0, np.int32)]
        learns: list[np.ndarray[Any, np.dtype[np.bool_]]] = [np.empty(0, np.bool_)]
        n_bytes, sources, whole = [], [], True
        for e in examples:
            ids.append(e.ids)
            learns.append(e.learns)
            whole = whole and bool(e.learns[1:].all())
            n_bytes.append(e.n_bytes)
            sources.append(files.setdefault(file_of(e.source), len(files)))
        return cls(
            tokens=np.concatenate(ids).astype(np.int32, copy=False),
            learns=None if whole else np.concatenate(learns).view(np.uint8),
            lengths=np.asarray([len(i) for i in ids[1:]], np.int64),
            n_bytes=np.asarray(n_bytes, np.int64),
            sources=np.asarray(sources, np.int32),
            files=tuple(files),
        )


def file_of(source: str) -> str:
    """The file of a place: `a.jsonl:12` and `a.json[3]` are in `a.jsonl` and `a.json`."""
    head, colon, tail = source.rpartition(":")
    if colon and tail.isdigit():
        return head
    head, bracket, tail = source.rpartition("[")
    return head if bracket and tail[:-1].isdigit() and tail.endswith("]") else source
