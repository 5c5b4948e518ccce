"""What older versions of transformers do wrong, put right where a model is made.

Each part is for the versions before the one that `mend` names, and goes when that is the oldest supported one.
Read `mend` first.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import library, nn
from transformers.integrations import moe

VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])


def mend(model: nn.Module) -> None:
    """Let a model of an older transformers compute what it is, and be compiled; newer ones need nothing."""
    if VERSION < (5, 21):
        _compute_caps(model)
    if VERSION < (5, 15):
        _mark_constants()
    if VERSION < (5, 23):
        _trace_backward_of_experts()


def _compute_caps(model: nn.Module) -> None:
    """Gemma 2 and VaultGemma take torch's attention, which silently leaves their cap on attention scores out."""
    config: Any = model.config
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # type: ignore[operator]


@cache
def _mark_constants() -> None:
    """While experts are compiled, torch's version is asked for; what is marked as constant there is the question's
    cache instead of the question, which dynamo then traces into a logger."""
    for ask in (moe.is_torch_less_or_equal, moe.is_torch_greater_or_equal):
        ask.__wrapped__._dynamo_marked_constant = True  # what torch._dynamo.assume_constant_result does


@cache
def _trace_backward_of_experts() -> None:
    """The products of compiled experts in other dtypes than bf16 have a backward pass that reads values, of which no
    graph can be made. Here it is one operation, as it is in 5.23."""

    @library.custom_op("frostline::experts_backward", mutates_args=())
    def backward(
        rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_rows, of_weight = torch.zeros_like(rows), torch.zeros_like(weight)
        for e, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            of_rows[start:end] = gradient[start:end] @ weight[e].mT
            of_weight[e] = rows[start:end].mT @ gradient[start:end]
        return of_rows, of_weight

    @backward.register_fake
    def _(rows: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(rows), torch.empty_like(weight)

    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG001  torch's order
        ctx.save_for_backward(*inputs)

    def gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_rows, of_weight = backward(*ctx.saved_tensors, gradient)
        return of_rows, of_weight, None

    library.register_autograd("transformers::grouped_mm_fallback", gradients, setup_context=keep)
