"""The next-token loss without full logits, where the model's logits are its head's output and nothing else.

The model runs as it is, its head standing aside for the call: what the model then returns as logits is the head's
input, and `linear_cross_entropy` computes head and loss a few rows at a time. Read `choose_loss` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from frostline.anatomy import Anatomy, module_of
from frostline.engine.linear_loss import linear_cross_entropy
from frostline.engine.loss import logits_of, next_token_loss
from frostline.engine.step import LossFunction
from frostline.errors import AnatomyError, ModelError

PAYS_FROM = 1 << 24
"""Logits of a micro-batch from which `loss: auto` computes them in chunks: 64 MiB in fp32."""

How = Literal["auto", "fused", "plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The loss of a run, and why it is computed in that way."""

    loss: LossFunction
    how: Literal["fused", "plain"]
    why: str


def choose_loss(how: How, model: nn.Module, anatomy: Anatomy, *, n_tokens: int) -> Chosen:
    """The next-token loss for micro-batches of at most `n_tokens`. Raises `ModelError` for `fused` where it is not
    exact."""
    if how == "plain":
        return Chosen(loss=next_token_loss, how="plain", why="asked for")
    n_logits = n_tokens * model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    if how == "auto" and n_logits < PAYS_FROM:
        return Chosen(loss=next_token_loss, how="plain", why=f"few logits: {n_logits:,} a micro-batch")
    try:
        head = find_head(model, anatomy)
    except ModelError as error:
        if how == "fused":
            raise ModelError(f"loss: fused would not be exact: {error}") from None
        return Chosen(loss=next_token_loss, how="plain", why=str(error))
    loss = FusedLoss(head, least=PAYS_FROM if how == "auto" else 0)
    return Chosen(loss=loss, how="fused", why="asked for" if how == "fused" else f"{n_logits:,} logits a micro-batch")


class FusedLoss:
    """(model, micro-batch) → the summed next-token loss, head and loss computed together from `least` logits on."""

    def __init__(self, head: nn.Linear, *, least: int = 0) -> None:
        self.head, self.least = head, least

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The sum over the targets of the micro-batch."""
        if batch.labels.numel() * self.head.out_features < self.least:
            return next_token_loss(model, batch)
        with standing_aside(self.head):
            hidden_ND = logits_of(model, batch).flatten(0, -2)
        labels_N = batch.labels.flatten()
        if batch.n_targets < len(labels_N):
            counts = (labels_N != -100).nonzero()[:, 0]
            hidden_ND, labels_N = hidden_ND[counts], labels_N[counts]
        return linear_cross_entropy(hidden_ND, self.head.weight, self.head.bias, labels_N)


@contextmanager
def standing_aside(head: nn.Module) -> Iterator[None]:
    """Inside, the head gives back what it is given."""
    head.forward = _as_given
    try:
        yield
    finally:
        del head.forward


def _as_given(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def find_head(model: nn.Module, anatomy: Anatomy) -> nn.Linear:
    """The head whose output is the model's logits, unchanged. Raises `ModelError` with the reason where there is none.

    The model is run on four tokens, with values or without.
    """
    try:
        head = module_of(model, anatomy, "head")
    except AnatomyError:
        raise ModelError("the model has no head of its own") from None
    if type(head) is not nn.Linear or "forward" in vars(head) or isinstance(head.weight, DTensor):
        raise ModelError(f"the head is no plain linear layer but {type(head).__name__}")
    given: list[tuple[torch.Tensor, int]] = []
    handle = head.register_forward_hook(lambda _module, _args, out: given.append((out, out._version)))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 4), dtype=torch.long, device=head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    if len(given) != 1:
        raise ModelError(f"the head is called {len(given)} times for one pass")
    out, version = given[0]
    if logits is not out or out._version != version:
        raise ModelError("the model scales, caps or converts what its head gives")
    return head
