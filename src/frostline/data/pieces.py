"""Documents no longer than a row: what a document becomes that is longer is a policy with a name, and is counted.

A piece of n + 1 tokens has n inputs and n targets, the targets one token ahead. Read `cut` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from frostline.data.store import Store

Ints = np.ndarray[Any, np.dtype[np.int64]]
Long = Literal["split", "truncate", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """What became of the documents."""

    policy: Long
    documents: int
    """Looked at."""
    long: int
    """Of these, longer than a row."""
    pieces: int
    """That are trained on."""
    without_target: int
    """Pieces left out because no token in them counts: documents of one token, and parts of longer ones."""
    tokens_left_out: int
    """Tokens of what was left out or cut off."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of documents, each at most a row long."""

    store: Store
    starts: Ints
    """Where each begins in the store's tokens."""
    lengths: Ints
    """Inputs of each, one fewer than its tokens."""
    documents: Ints
    """The document of each."""
    cutting: Cutting

    def __len__(self) -> int:
        return len(self.starts)

    def piece(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, labels) of one piece, int64; -100 where a token is no target."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        window = self.store.tokens[start : start + length + 1].long()
        labels = window[1:].clone()
        if self.store.learns is not None:
            labels[self.store.learns[start + 1 : start + length + 1] == 0] = -100
        return window[:-1], labels


def cut(store: Store, length: int, policy: Long, documents: Ints | None = None) -> Pieces:
    """Pieces of at most `length` inputs, of all documents or of some, in their order.

    `split`: a long document becomes pieces that meet at one token, so that every target counts once, each with its
    positions from 0. `truncate`: its beginning. `drop`: nothing.
    """
    chosen = np.arange(store.n_documents) if documents is None else documents
    sizes = store.lengths[chosen]
    inputs, begins = np.maximum(sizes - 1, 0), store.offsets.numpy()[:-1][chosen]
    long = inputs > length
    match policy:
        case "split":
            counts = -(-inputs // length)
        case "truncate":
            counts = np.minimum(inputs, 1)
        case "drop":
            counts = np.where(long, 0, np.minimum(inputs, 1))
    of = np.repeat(np.arange(len(chosen)), counts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begins[of] + nth * length
    lengths = np.minimum(length, inputs[of] - nth * length)
    useful = _n_targets(store, starts, lengths) > 0
    kept = (int(np.sum(lengths[useful])), int(np.sum(useful)))
    cutting = Cutting(
        policy=policy,
        documents=len(chosen),
        long=int(np.sum(long)),
        pieces=kept[1],
        without_target=int(np.sum(inputs == 0)) + len(useful) - kept[1],
        tokens_left_out=int(np.sum(inputs)) - kept[0],
    )
    return Pieces(store, starts[useful], lengths[useful], chosen[of][useful], cutting)


def _n_targets(store: Store, starts: Ints, lengths: Ints) -> Ints:
    """Tokens of each piece that count; read once, in order, when some do not."""
    if store.learns is None or not len(starts):
        return lengths
    learns = store.learns.numpy()
    return np.asarray([int(np.count_nonzero(learns[s + 1 : s + n + 1])) for s, n in zip(starts, lengths, strict=True)])
