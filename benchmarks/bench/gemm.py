"""The matrix products of a job and nothing else, into outputs that exist already: the rate that no system can exceed.

A product counts forward always, for a weight's gradient where that weight learns, for its input's where anything at or
below that input learns. Attention's own products (scores and values, the causal half) are counted, and not replayed.
Read `products`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from job import learns


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama, or of a mixture of experts, with as many key as query heads."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int
    experts: int = 0
    """0: dense."""
    chosen: int = 1
    """Experts a token goes to."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """From the fields of a configuration."""
        return cls(
            hidden=config["hidden_size"],
            ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            experts=config.get("num_local_experts") or config.get("num_experts") or 0,
            chosen=config.get("num_experts_per_tok") or 1,
        )


def products(sizes: Sizes, learn: str, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(m, k, n) of every product of one step, m × k times k × n; experts get equally many tokens."""
    d, f = sizes.hidden, sizes.ffn
    alive = learns("model.embed_tokens.weight", learn, sizes.layers)
    for layer in range(sizes.layers):
        attn, mlp, norm = _learning(sizes, learn, layer)
        alive = alive or norm
        for _ in range(3):
            yield from _linear(tokens, d, d, learns=attn, alive=alive)
        yield from _linear(tokens, d, d, learns=attn, alive=alive or attn)
        alive = alive or attn
        if sizes.experts:
            yield from _linear(tokens, d, sizes.experts, learns=mlp, alive=alive)
        each = tokens * sizes.chosen // sizes.experts if sizes.experts else tokens
        for _ in range(sizes.experts or 1):
            for _ in range(2):
                yield from _linear(each, d, f, learns=mlp, alive=alive)
            yield from _linear(each, f, d, learns=mlp, alive=alive or mlp)
        alive = alive or mlp
    yield from _linear(tokens, d, sizes.vocabulary, learns=learns("lm_head.weight", learn, sizes.layers), alive=alive)


def attention_flops(sizes: Sizes, learn: str, tokens: int, length: int) -> int:
    """Of scores and weighted values, for rows of `length` tokens: forward once, backward twice as much where a
    gradient passes."""
    alive = learns("model.embed_tokens.weight", learn, sizes.layers)
    total = 0
    for layer in range(sizes.layers):
        attn, mlp, norm = _learning(sizes, learn, layer)
        alive = alive or norm
        total += (3 if alive or attn else 1) * 2 * tokens * length * sizes.hidden
        alive = alive or attn or mlp
    return total


def _learning(sizes: Sizes, learn: str, layer: int) -> tuple[bool, bool, bool]:
    """Whether a layer's attention, its FFN or experts, and the norm before its attention learn."""
    attn, mlp, norm = (
        learns(f"model.layers.{layer}.{part}.", learn, sizes.layers)
        for part in ("self_attn", "mlp.experts", "input_layernorm")
    )
    return attn, mlp, norm


def _linear(tokens: int, inner: int, outer: int, *, learns: bool, alive: bool) -> Iterator[tuple[int, int, int]]:
    yield tokens, inner, outer
    if alive:
        yield tokens, outer, inner
    if learns:
        yield inner, tokens, outer


def replay_rate(sizes: Sizes, learn: str, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of one step's products, the median of three replays."""
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
    return sum(2 * m * k * n for m, k, n in todo) / statistics.median(seconds[1:])


def step_flops(sizes: Sizes, learn: str, tokens: int, length: int) -> int:
    """What one step multiplies and adds in matrix products, attention's included."""
    linear = sum(2 * m * k * n for m, k, n in products(sizes, learn, tokens))
    return linear + attention_flops(sizes, learn, tokens, length)
