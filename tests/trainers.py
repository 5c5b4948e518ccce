"""Trainers of transformers over tiny models and random tokens, on the CPU: for the tests of the integrations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

KNOWN = {field.name for field in dataclasses.fields(TrainingArguments)}
RECOMPUTE = "activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"
"""What this version calls gradient checkpointing."""


class InOrder(Trainer):
    """A Trainer that reads its rows in order, and does more around its loss, as TRL's do."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        self.n_losses = getattr(self, "n_losses", 0) + 1
        return (loss, outputs) if return_outputs else loss


def rows(n_rows: int = 32, *, seed: int = 0, length: int = 17) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens that are their own labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(tiny.VOCABULARY, (n_rows, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Six steps with a large learning rate, weight decay, and clipping that bites."""
    usual = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(usual | settings))


def trainer(
    model: nn.Module,
    folder: Path,
    *,
    kind: type[Trainer] = Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A Trainer of `model`; `settings` are its arguments', `more` its own."""
    args = arguments(folder, **settings)
    return kind(model=model, args=args, train_dataset=rows(), callbacks=list(callbacks), **(more or {}))


class Overflows(InOrder):
    """Its first loss is infinite. With torch's gradient scaler for the CPU, where accelerate has none for fp16."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler, self.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True

    def compute_loss(self, *args: Any, **more: Any) -> Any:
        loss = super().compute_loss(*args, **more)
        return loss if self.n_losses > 1 else loss * math.inf


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bytes."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}
