"""Which rows a step trains on: a pure function of (seed, step), whatever the workers, the ranks or the restarts."""

from __future__ import annotations

from functools import lru_cache

import torch

from frostline.randomness import derive_seed


def rows_at(step: int, *, seed: int, n_rows: int, batch: int) -> list[int]:
    """The `batch` row indices of a step (0-based).

    Each epoch is a permutation of all rows; epochs follow one another without a gap, so that a batch may span two.
    """
    positions = range(step * batch, (step + 1) * batch)
    return [int(_permutation(seed, p // n_rows, n_rows)[p % n_rows]) for p in positions]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_rows: int) -> torch.Tensor:
    """(rows,), int64: eight bytes a row, for the epoch in progress and the one before."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "data order", epoch))
    return torch.randperm(n_rows, generator=generator)
