"""The loss of a language model: cross-entropy on the next token."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from frostline.data import Batch
from frostline.engine.local_loss import local_loss
from frostline.engine.router_loss import RouterLoss
from frostline.engine.routes import Points
from frostline.engine.step import LossFunction
from frostline.errors import RouteError
from frostline.schedule import Stage


def logits_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the model says of every token of a micro-batch: (rows, length, vocabulary)."""
    logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
    return logits


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum over `batch.n_targets` tokens of −log p(label), natural logarithm, in fp32 or wider; shape ()."""
    logits_BTV = logits_of(model, batch)
    if logits_BTV.dtype != torch.float64:
        logits_BTV = logits_BTV.float()
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=-100
    )


def loss_of(stage: Stage, points: Points | None, language: LossFunction = next_token_loss) -> LossFunction:
    """What a stage of a language model minimises: `language`, or local losses, and the routers' losses.

    Raises `RouteError` for local losses without `points`.
    """
    loss = _language_loss(stage, points, language)
    return RouterLoss(loss, stage.spec.moe, stage.selection.anatomy) if stage.spec.moe else loss


def _language_loss(stage: Stage, points: Points | None, language: LossFunction) -> LossFunction:
    if stage.spec.local_loss == "none":
        return language
    if points is None:
        raise RouteError(f"stage {stage.name}: local losses need the points of a transformers model")
    return local_loss(points)
