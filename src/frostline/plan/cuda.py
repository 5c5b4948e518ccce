"""What CUDA kernels keep where CPU kernels keep something else, as a table: fake CUDA tensors need a CUDA build.

Rules, with torch 2.11 to 2.13 in mind:
- attention in fp32 with fewer key than query heads has no fused kernel: the scores of every head are stored;
  all other attention is fused, with dropout too (the CPU stores the scores there);
- a dropout mask is one byte per element (on the CPU it has the input's type);
- the head and loss in one (`linear_loss.py`) take more rows at a time;
- the allocator hands out multiples of 512 bytes.
Not counted: the CUDA context, workspaces of cuBLAS (up to 32 MiB), fragmentation. Read `cuda_kernels` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from frostline.engine.linear_loss import CHUNK_ELEMENTS

BLOCK = 512
"""Bytes that the caching allocator rounds up to."""


def allocated_bytes(n: int) -> int:
    """What the allocator takes for a storage of `n` bytes."""
    return -(-n // BLOCK) * BLOCK


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Inside, attention and dropout are traced by the kernels that CUDA would choose."""
    original, plain_dropout = functional.scaled_dot_product_attention, functional.dropout

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0.0 or inplace:
            return plain_dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    def chosen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs |= dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False))
        if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and query.shape[1] != key.shape[1]:
            with sdpa_kernel(SDPBackend.MATH):
                return original(query, key, value, **kwargs)
        return original(query, key, value, **(kwargs | {"dropout_p": 0.0}))

    with (
        patch.object(functional, "scaled_dot_product_attention", chosen),
        patch.object(functional, "dropout", dropout),
        patch.dict(CHUNK_ELEMENTS, cpu=CHUNK_ELEMENTS["cuda"]),
    ):
        yield
