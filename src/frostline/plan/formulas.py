"""FLOPs of operations: torch's own formulas, and those that it lacks. Read `flops_of`.

A multiplication and an addition count as two. torch's counter has no formula for attention on the CPU nor for grouped
products, and says 0 for what it does not know; here an operation that does arithmetic and has no formula is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from frostline.errors import PlanError

aten = torch.ops.aten


def _attention(args: tuple[Any, ...], _: Any) -> int:
    """Scores and their sum over values, every head of the query's: query (…, T, D), key (…, S, D), value (…, S, V).

    In full, without what a causal kernel may leave out. Heads that share keys and values compute as much as others
    (torch's own formula refuses them before 2.13).
    """
    query, key, value = (tuple(t.shape) for t in args[:3])
    scores = prod(query[:-1]) * key[-2]
    return int(2 * scores * (query[-1] + value[-1]))


def _attention_backward(args: tuple[Any, ...], _: Any) -> int:
    """Scores again, then gradients of values, of scores, of query and of key: five products."""
    query, key, value = (tuple(t.shape) for t in args[1:4])
    scores = prod(query[:-1]) * key[-2]
    return int(2 * scores * (3 * query[-1] + 2 * value[-1]))


def _grouped_product(args: tuple[Any, ...], out: Any) -> int:
    """Rows of one operand meet one group's matrix each: 2 · (elements of the result) · (inner size).

    Where the groups lie along the inner size, (M, K) × (K, N) → (G, M, N), every inner index belongs to one group.
    """
    first, second = (tuple(t.shape) for t in args[:2])
    if len(first) == len(second) == 2:
        return 2 * int(first[0] * first[1] * second[1])
    return 2 * int(prod(out.shape) * first[-1])


def _added_product(args: tuple[Any, ...], _: Any) -> int:
    (rows, inner), (_inner, columns) = (tuple(t.shape) for t in args[1:3])
    return 2 * int(rows * inner * columns)


_KERNELS = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
_KERNELS_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)

FORMULAS: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten.addmm_: _added_product,
    **dict.fromkeys(_KERNELS, _attention),
    **dict.fromkeys(_KERNELS_BACKWARD, _attention_backward),
    aten._grouped_mm: _grouped_product,
}
"""Operation → (arguments, result) → FLOPs, beside torch's own."""

ARITHMETIC = re.compile(
    r"mm$|mm_|matmul|conv|attention|linear|einsum|addmv|addbmm|addr$|^dot|^vdot|bilinear|_fft|lstm|gru"
)
"""Names of operations that multiply and add many numbers per result: they must have a formula."""


def flops_of(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one call of an operation; 0 for what moves, compares or maps single elements. Raises `PlanError`."""
    if packet in FORMULAS:
        return FORMULAS[packet](args, out)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    name = str(packet).rpartition(".")[2]
    if ARITHMETIC.search(name):
        raise PlanError(f"the operation {packet} does arithmetic, and the plan has no formula for its FLOPs")
    return 0
