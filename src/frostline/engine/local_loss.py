"""Local losses: every block's output is read by the final norm and the head, and has a loss of its own.

With `block.in` stopped everywhere each block learns from its own loss alone. Read `local_loss` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from frostline.data import Batch
from frostline.engine.route_points import watched
from frostline.engine.routes import Points
from frostline.engine.step import LossFunction


def local_loss(points: Points) -> LossFunction:
    """(model, micro-batch) → the sum over blocks of the summed next-token loss of each block's output.

    The last block's is the model's own loss. Norm and head are the model's, shared by all blocks.
    """

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return torch.stack(_block_losses(points, model, batch)).sum()

    return loss


def _block_losses(points: Points, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    logits, outputs = run_watched(points, model, batch.inputs)
    assert points.tail is not None
    return [_summed(x, batch.labels) for x in (*map(points.tail, outputs[:-1]), logits)]


def run_watched(points: Points, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The model's logits and every block's output."""
    blocks = [b.block for b in points.blocks]
    with watched(blocks):
        logits = model(**inputs, use_cache=False).logits
        outputs = [b.gave for b in blocks]
    return logits, [o for o in outputs if o is not None]


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
