"""Causal attention on a CPU, made of products and as torch has it: time, and error against float64.

python benchmarks/attention.py [--threads 2] [--rounds 10] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line sets it

import torch
from torch.nn.functional import scaled_dot_product_attention

from frostline.engine.freed_memory import kept
from frostline.engine.product_attention import causal_attention

SHAPES = [(4, 8, 8, 512, 64), (16, 8, 2, 128, 64), (2, 8, 8, 300, 64), (1, 16, 4, 2048, 64)]
"""Rows, heads, key/value heads, length, width."""


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value as layers lay them out, and a gradient of the output."""
    rows, heads, n_keys, length, width = shape
    torch.manual_seed(0)
    made = [torch.randn(rows, length, n, width, dtype=dtype).transpose(1, 2) for n in (heads, n_keys, n_keys)]
    return [t.requires_grad_() for t in made], torch.randn(rows, length, heads, width, dtype=dtype).transpose(1, 2)


def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """With keys repeated, as transformers calls it for grouped queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Made of products."""
    return causal_attention(query, key, value, query.shape[-1] ** -0.5)


def timed(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds, the median of `rounds` after two that do not count."""
    found = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        call()
        if i > 1:
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    """Print a line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[asked.dtype]
    with kept(True):
        for shape in SHAPES:
            for name, attend in (("torch", torchs), ("products", ours)):
                print(f"{shape} {asked.dtype} {name}: {measured(shape, dtype, attend, asked.rounds)}", flush=True)


def measured(shape: tuple[int, ...], dtype: torch.dtype, attend: Callable[..., torch.Tensor], rounds: int) -> str:
    """Time of one attention, and how far its gradients of query, key and value are from float64's, relative."""
    inputs, gradient = tensors(shape, dtype)
    right = torch.autograd.grad(torchs(*(t.double() for t in inputs)), inputs, gradient.double())

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, gradient)

    forward, whole = timed(lambda: attend(*inputs), rounds), timed(both, rounds)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(both(), right, strict=True)]
    return f"forward {forward:.1f} ms, with backward {whole:.1f} ms; " + ", ".join(f"{e:.1e}" for e in errors)


if __name__ == "__main__":
    main()
