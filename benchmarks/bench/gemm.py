"""The matrix products of a job and nothing else, into outputs that exist already: what no system can be faster than.

A product counts forward always, for a weight's gradient where that weight learns, for its input's where anything at or
below that input learns. Read `products`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from job import learns


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama with as many key as query heads."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int


def products(sizes: Sizes, learn: str, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(m, k, n) of every product of one step, m × k times k × n."""
    d, f = sizes.hidden, sizes.ffn
    alive = learns("model.embed_tokens.weight", learn, sizes.layers)
    for layer in range(sizes.layers):
        attn, mlp = (learns(f"model.layers.{layer}.{part}.", learn, sizes.layers) for part in ("self_attn", "mlp"))
        for _ in range(3):
            yield from _linear(tokens, d, d, learns=attn, alive=alive)
        yield from _linear(tokens, d, d, learns=attn, alive=alive or attn)
        alive = alive or attn
        for _ in range(2):
            yield from _linear(tokens, d, f, learns=mlp, alive=alive)
        yield from _linear(tokens, f, d, learns=mlp, alive=alive or mlp)
        alive = alive or mlp
    yield from _linear(tokens, d, sizes.vocabulary, learns=learns("lm_head.weight", learn, sizes.layers), alive=alive)


def _linear(tokens: int, inner: int, outer: int, *, learns: bool, alive: bool) -> Iterator[tuple[int, int, int]]:
    yield tokens, inner, outer
    if alive:
        yield tokens, outer, inner
    if learns:
        yield inner, tokens, outer


def replay_seconds(sizes: Sizes, learn: str, tokens: int, dtype: torch.dtype) -> tuple[float, int]:
    """The median of three replays, and their FLOPs."""
    todo = list(products(sizes, learn, tokens))
    operands = {
        size: (
            torch.randn(size[0], size[1]).to(dtype),
            torch.randn(size[1], size[2]).to(dtype),
            torch.empty(size[0], size[2], dtype=dtype),
        )
        for size in set(todo)
    }
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for size in todo:
            a, b, out = operands[size]
            torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), sum(2 * m * k * n for m, k, n in todo)
