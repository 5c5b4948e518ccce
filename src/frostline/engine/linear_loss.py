"""Cross-entropy of a linear head, a few rows at a time: the logits of all rows never exist together.

The gradients are computed on the way forward, while a chunk's probabilities are at hand, and only those that are
wanted: none of the weight where the head is frozen, none of the input where nothing below learns. Rows without a label
are left out beforehand. N rows, D features, V vocabulary. Read `linear_cross_entropy` first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that are alive at once, about: 32 MiB in fp32 on a CPU, 256 MiB on CUDA, whose products want many rows.
Measured in `benchmarks/fused_loss.py` and `benchmarks/bench/gpu.py`."""

_thread = threading.local()


def gradient_kind() -> Literal["input gradients", "weight gradients"] | None:
    """Which gradient this thread is computing on the way forward; for who counts what is computed."""
    kind: Literal["input gradients", "weight gradients"] | None = getattr(_thread, "kind", None)
    return kind


@contextmanager
def _computing(kind: str) -> Iterator[None]:
    _thread.kind = kind
    try:
        yield
    finally:
        _thread.kind = None


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of −log softmax(hidden · weightᵀ + bias)[label], in fp32 or wider; shape (). Every row has a label.

    Products are in the type that autocast asks for, the softmax is in fp32 or wider, as in the loss it stands for.
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(to), weight_VD.to(to)
        bias_V = bias_V.to(to) if bias_V is not None else None
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden_ND, weight_VD, bias_V)]
    with torch.autocast(device, enabled=False):
        summed: torch.Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, wanted)  # type: ignore[no-untyped-call]
    return summed


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        wanted: list[bool],
    ) -> torch.Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        n, v = len(hidden_ND), len(weight_VD)
        dx = torch.empty_like(hidden_ND) if wanted[0] else None
        dw = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
        db = torch.zeros(v, dtype=wide, device=hidden_ND.device) if wanted[2] else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        rows = max(1, min(n, CHUNK_ELEMENTS[hidden_ND.device.type] // v))
        for start in range(0, n, rows):
            x_CD, labels_C1 = hidden_ND[start : start + rows], labels_N[start : start + rows, None]
            p_CV = functional.linear(x_CD, weight_VD, bias_V).to(wide)
            torch.log_softmax(p_CV, dim=-1, out=p_CV)
            total -= p_CV.gather(1, labels_C1).sum()
            if any(wanted):
                p_CV.exp_().scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=wide))
                _add_gradients(p_CV, x_CD, weight_VD, dx[start : start + rows] if dx is not None else None, dw, db)
            del p_CV  # before the next chunk's are made
        ctx.gradients = (dx, dw, db)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy can be taken once")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, and handed over
        scaled = [g.mul_(scale).to(t) if g is not None else None for g, t in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


def _add_gradients(
    g_CV: torch.Tensor,
    x_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    dx_CD: torch.Tensor | None,
    dw_VD: torch.Tensor | None,
    db_V: torch.Tensor | None,
) -> None:
    """Put the gradients of one chunk in their places, from that of its logits."""
    if db_V is not None:
        db_V += g_CV.sum(0)
    g_CV = g_CV.to(x_CD.dtype)
    if dx_CD is not None:
        with _computing("input gradients"):
            torch.mm(g_CV, weight_VD, out=dx_CD)
    if dw_VD is not None:
        with _computing("weight gradients"):
            if dw_VD.dtype == g_CV.dtype:
                dw_VD.addmm_(g_CV.T, x_CD)
            else:
                dw_VD += g_CV.T @ x_CD
