"""Losses on data that nothing is learned from. Read `held_out_loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from frostline.engine.compiled import as_it_is
from frostline.engine.loop_settings import LoopSettings
from frostline.engine.step import Countable, LossFunction


def held_out_loss(model: nn.Module, batches: Sequence[Countable], loss: LossFunction, settings: LoopSettings) -> float:
    """Mean loss per target over `batches`, in evaluation mode (no dropout)."""
    model.eval()
    with as_it_is(), torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        total = sum(loss(model, b).item() for b in batches)
    return total / max(sum(b.n_targets for b in batches), 1)


def bits_per_byte(loss: float, bytes_per_target: float | None) -> float | None:
    """Mean loss per target in nats → bits per byte of text, which does not depend on the tokenizer."""
    return None if not bytes_per_target else loss / math.log(2) / bytes_per_target
