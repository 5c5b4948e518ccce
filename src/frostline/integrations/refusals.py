"""What of a Trainer's settings would make a run something else than what was asked: each with its reason.

Here is what is known not to be exact, and what could not be tried: several processes and devices. Read `refusals`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from frostline.errors import FrostlineError

ONE_PROCESS = "a gradient of part of a tensor is taken before it is averaged over processes"
BY_HOOK = ("galore", "lomo", "apollo")
"""What the names of optimizers begin with or hold that update weights by hooks of their own."""


def check(trainer: Trainer, *, n_stages: int, has_parts: bool, frozen_dropout: bool) -> None:
    """Raise `FrostlineError` with every reason why this Trainer cannot be attached to."""
    found = [*refusals(trainer, n_stages=n_stages, has_parts=has_parts, frozen_dropout=frozen_dropout)]
    if found:
        raise FrostlineError("this Trainer cannot be attached to:\n  " + "\n  ".join(found))


def refusals(trainer: Trainer, *, n_stages: int, has_parts: bool, frozen_dropout: bool) -> Iterator[str]:
    """Every reason, each with what to do."""
    args: Any = trainer.args
    yield from _model(trainer, has_parts=has_parts)
    yield from _devices(trainer)
    if args.auto_find_batch_size:
        yield "auto_find_batch_size=True: it starts the run over without saying so; name the batch size"
    if any(name in str(args.optim) for name in BY_HOOK):
        yield f"optim={str(args.optim)!r}: it updates the model by hooks of its own, and owns what learns by itself"
    if args.neftune_noise_alpha is not None and not frozen_dropout:
        yield (
            "neftune_noise_alpha: where nothing of the embedding learns its noise would be off, as dropout is; attach "
            "with frozen_dropout=True"
        )
    if args.load_best_model_at_end and n_stages > 1:
        yield "load_best_model_at_end=True: it would put weights of another stage into what is frozen by then"
    if trainer.optimizer is not None and n_stages > 1:
        yield "optimizers=…: each stage needs an optimizer of its own; leave it out, or use optimizer_cls_and_kwargs"
    if trainer.optimizer is None and trainer.lr_scheduler is not None:
        yield "optimizers=(None, scheduler): the scheduler is of an optimizer that nothing steps; leave it out"


def _model(trainer: Trainer, *, has_parts: bool) -> Iterator[str]:
    model = trainer.model
    if trainer.model_init is not None:
        yield "model_init=…: every train() would make another model; pass the model itself"
    known = isinstance(model, PreTrainedModel) or type(model).__name__.startswith("Peft")
    if not known and not has_parts:
        yield f"the model is a {type(model).__name__}, none of transformers: name its parts with parts={{…}}"


def _devices(trainer: Trainer) -> Iterator[str]:
    args, model = trainer.args, trainer.model
    assert isinstance(model, nn.Module)
    kind = trainer.accelerator.distributed_type.value
    if args.world_size > 1 or kind != "NO":
        yield f"{max(args.world_size, 1)} processes ({kind}): {ONE_PROCESS}; use one"
    elif args.n_gpu > 1:
        yield (
            f"{args.n_gpu} GPUs in one process (DataParallel): the copies of the model do not keep what is frozen in "
            "evaluation mode; set CUDA_VISIBLE_DEVICES to one of them"
        )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        yield f"the model is spread over {', '.join(sorted(devices))}: put it on one device"
