"""What is counted over examples: lengths, bytes, what occurs twice, what is on two sides. Read `Counts` first.

Of an example its lengths and two hashes are kept, never its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from frostline.data.example import Example

PAIRS = 5
"""Of duplicates and leaks, so many are named."""


@dataclass(frozen=True, slots=True)
class Same:
    """Two places that hold the same."""

    source: str
    other: str


@dataclass(slots=True)
class Counts:
    """What is counted over the examples of a part."""

    lengths: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Hash of each example, mask included."""
    prompts: list[bytes] = field(default_factory=list)
    """Hash of what comes before the first learning token; empty where there is no such thing."""
    n_learning: int = 0
    n_bytes: int = 0
    seen: dict[bytes, str] = field(default_factory=dict)
    n_duplicates: int = 0
    duplicates: list[Same] = field(default_factory=list)


def count(example: Example, counts: Counts) -> None:
    """Add an example."""
    counts.lengths.append(len(example.ids))
    counts.sources.append(example.source)
    counts.n_learning += int(example.learns.sum())
    counts.n_bytes += example.n_bytes
    key = _hash(example.ids.tobytes(), example.learns.tobytes())
    first = counts.seen.setdefault(key, example.source)
    if first != example.source:
        counts.n_duplicates += 1
        if len(counts.duplicates) < PAIRS:
            counts.duplicates.append(Same(example.source, first))
    start = int(np.argmax(example.learns))
    counts.keys.append(key)
    counts.prompts.append(_hash(example.ids[:start].tobytes()) if start > 1 else b"")  # one token is no prompt


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.digest()


def leaks_between(trained: list[tuple[bytes, str]], held_out: list[tuple[bytes, str]]) -> list[Same]:
    """Held-out examples that stand in another place of what is trained on, too."""
    at = {key: source for key, source in reversed(trained) if key}
    found = [Same(source, at[key]) for key, source in held_out if key in at]
    return [same for same in found if same.source != same.other]


def histogram(lengths: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
    """Examples per range of lengths, each range twice as wide as the one before it."""
    if not len(lengths):
        return
    start = 1 << max(0, int(lengths.min()).bit_length() - 1)
    while start <= lengths.max():
        yield start, 2 * start, int(((lengths >= start) & (lengths < 2 * start)).sum())
        start *= 2


def quantiles(lengths: np.ndarray[Any, Any]) -> tuple[int, int, int]:
    """So many tokens half of the examples have at most, 90 % of them, 99 %."""
    if not len(lengths):
        return 0, 0, 0
    half, most, nearly = (int(np.quantile(lengths, q, method="inverted_cdf")) for q in (0.5, 0.9, 0.99))
    return half, most, nearly
