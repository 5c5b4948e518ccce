"""Grouped products of experts with our own backward pass: weight gradients of the experts that learn, and of no others.

transformers lets an experts module choose how it multiplies (`experts_implementation`); `use_own_experts` chooses the
way that is registered here. It differs from transformers' `grouped_mm` in two things: under autocast the products are
taken in bf16 (torch's grouped product ignores autocast), and the gradient of a packed weight is computed only for the
experts named by `let_experts_learn`; the rows of the others are zero. Read `experts_forward` first.

Shapes: S choices, that is tokens times experts per token; E experts; K and N, inner and outer size of a product.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "frostline"
"""Of the experts implementation."""
PIECE = 16
"""Bytes that torch's grouped product reads at once: its operands' rows are so many bytes long, or a multiple."""
_learning: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packed weight → the experts of it that learn, where that is not all of them."""


def use_own_experts(model: nn.Module) -> bool:
    """Let a model of transformers compute its experts by `experts_forward`; whether it can.

    Types whose experts choose no implementation (Llama 4, DBRX, JetMoE, LongCat) and types with a norm behind each
    expert go on as they did: all weight gradients are computed, and what does not learn is left out afterwards.
    """
    can = bool(own_modules(model))
    if can:
        model.set_experts_implementation(NAME)  # type: ignore[operator]
    return can


def own_modules(model: nn.Module) -> list[nn.Module]:
    """The experts modules that `experts_forward` can compute."""
    return [m for m in model.modules() if _is_known(m)]


def _is_known(module: nn.Module) -> bool:
    facts = vars(module)  # set by transformers' decorator of experts classes
    special = facts.get("has_post_expert_norm") or facts.get("_is_expert_parallel")  # older versions know neither
    return "is_transposed" in facts and not special


def odd_width(model: nn.Module, dtype: torch.dtype) -> int | None:
    """A width of the model's experts at which torch has no grouped products in `dtype`; None where it has them.

    There `experts_forward` multiplies expert by expert: the same products, slower.
    """
    for module in own_modules(model):
        for weight in module.parameters(recurse=False):
            odd = [n for n in weight.shape[1:] if weight.dim() == 3 and n * dtype.itemsize % PIECE]
            if odd:
                return odd[0]
    return None


def let_experts_learn(weight: torch.Tensor, experts: Iterable[int] | None) -> None:
    """Of a packed weight (E, …), only these experts get a gradient; `None`: all. The rows of others will be zero."""
    if experts is None:
        _learning.pop(weight, None)
    else:
        _learning[weight] = tuple(experts)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What an experts module computes, as transformers' `grouped_mm` does: choices sorted by expert, two products."""
    # which experts learn is looked up outside of the graph, so compiled blocks compute as transformers does
    if not _is_known(self) or torch.compiler.is_compiling():
        result: torch.Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return result
    n_chosen, device = top_k_index.shape[-1], hidden_states.device.type
    experts, order = torch.sort(top_k_index.reshape(-1))
    # a histogram's shape does not depend on values, as bincount's does; on the CPU it takes floats only
    counted = experts.float() if device == "cpu" else experts.int()
    load = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
    ends = torch.cumsum(load, dim=0, dtype=torch.int32)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    rows = _linear(self, first, hidden_states[order // n_chosen], experts, ends)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _linear(self, "down_proj", rows, experts, ends) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    by_token = rows[back].view(hidden_states.shape[0], n_chosen, -1)
    return by_token.sum(dim=1).to(hidden_states.dtype)


def _linear(self: Any, name: str, rows: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    weight, device = getattr(self, name), rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    learning = _learning.get(weight) if torch.is_grad_enabled() else None
    out: torch.Tensor = _Product.apply(rows.to(dtype), weight, ends, self.is_transposed, learning)  # type: ignore[no-untyped-call]
    return out + getattr(self, f"{name}_bias")[experts].to(dtype) if self.has_bias else out


class _Product(torch.autograd.Function):
    """Rows (S, K), sorted by expert, times each expert's matrix; in the rows' dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        transposed: bool,
        learning: tuple[int, ...] | None,
    ) -> torch.Tensor:
        """`rows`: (S, K). `weight`: (E, N, K), or (E, K, N) where `transposed`. `ends`: (E,)."""
        cast = weight.to(rows.dtype)
        ctx.transposed, ctx.learning = transposed, learning
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, ends)
        return _grouped(rows, cast if transposed else cast.mT, ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradients of rows and of the learning experts' weights."""
        rows, weight, ends = ctx.saved_tensors
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            cast = weight.to(gradient.dtype)
            of_rows = _grouped(gradient, cast.mT if ctx.transposed else cast, ends)
        if ctx.needs_input_grad[1]:
            left, right = (rows, gradient) if ctx.transposed else (gradient, rows)
            of_weight = _weight_gradient(left, right, weight, ends, ctx.learning)
        return of_rows, of_weight, None, None, None


def _weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    learning: tuple[int, ...] | None,
) -> torch.Tensor:
    """Each learning expert's left.T @ right over its rows, zero for the others; in the weight's shape and dtype."""
    if learning is None and not _one_by_one(left, right):
        return functional.grouped_mm(left.mT, right, offs=ends).to(weight.dtype)
    out, edges = torch.zeros_like(weight), [0, *_numbers(ends, len(left))]
    for e in range(len(weight)) if learning is None else learning:
        mine = slice(edges[e], edges[e + 1])
        out[e] = left[mine].mT @ right[mine]
    return out


def _grouped(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if not _one_by_one(rows, matrices):
        return functional.grouped_mm(rows, matrices, offs=ends)
    spans = pairwise([0, *_numbers(ends, len(rows))])
    return torch.cat([rows[a:b] @ w for (a, b), w in zip(spans, matrices, strict=True)])


def _one_by_one(*operands: torch.Tensor) -> bool:
    """Whether torch's grouped product refuses these: fp64, rows that are not whole pieces of 16 bytes (on any device),
    and on the CPU memory that is not aligned to 16 bytes."""
    if operands[0].dtype == torch.float64 or not all(_in_whole_pieces(t) for t in operands):
        return True
    on_cpu = operands[0].device.type == "cpu" and not isinstance(operands[0], FakeTensor)
    return on_cpu and any(t.data_ptr() % PIECE for t in operands)


def _in_whole_pieces(matrix: torch.Tensor) -> bool:
    """Whether one of the two inner dimensions is dense and the other one's stride a multiple of 16 bytes."""
    (rows, columns), (down, right) = matrix.shape[-2:], matrix.stride()[-2:]
    if down == 1 and right >= max(1, rows):
        return right * matrix.element_size() % PIECE == 0
    return right == 1 and down >= max(1, columns) and down * matrix.element_size() % PIECE == 0


def _numbers(ends: torch.Tensor, n_rows: int) -> list[int]:
    """Where each expert's rows end, on the host. Without values (a plan): as if each expert got its equal share."""
    if isinstance(ends, FakeTensor):
        n = len(ends)
        return [n_rows * (e + 1) // n for e in range(n)]
    found: list[int] = ends.tolist()
    return found


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
