"""The Trainer's optimizer over what learns: leaves take the places of the parameters that they are parts of.

Read `own`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Trainer

from frostline.errors import FrostlineError
from frostline.learning import Learning
from frostline.selection import Selection


def check_given(trainer: Trainer, selection: Selection) -> None:
    """Raise `FrostlineError` when the Trainer was given an optimizer over parameters of which nothing learns."""
    if trainer.optimizer is None:
        return
    learns = {s.tensor for s in selection.slices}
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {p: n for n, p in trainer.model.named_parameters()}
    frozen = [n for p, n in names.items() if p in held and selection.anatomy.storage_name(n) not in learns]
    if frozen:
        raise FrostlineError(_of_the_optimizer(f"holds {_listed(frozen)}, which does not learn"))


def leaves_apart(run: Learning) -> dict[nn.Parameter, list[nn.Parameter]]:
    """The leaves of every parameter that learns in part."""
    apart: dict[nn.Parameter, list[nn.Parameter]] = {}
    for o in run.ownership.owned:
        if o.value is not o.parameter:
            apart.setdefault(o.parameter, []).append(o.value)
    return apart


def own(optimizer: torch.optim.Optimizer, run: Learning, *, is_users: bool) -> torch.optim.Optimizer:
    """Put leaves into an optimizer's groups in place of the parameters that they are parts of, before its first step.

    So decay and rate are what the Trainer gave the tensor. Raises `FrostlineError` unless it then holds what learns,
    and nothing else; `is_users`: and unless nothing of it had to be changed.
    """
    apart = leaves_apart(run)
    if apart and is_users:
        raise FrostlineError(_of_the_optimizer("holds whole tensors of which only parts learn"))
    if apart and optimizer.state:
        raise FrostlineError(
            f"{type(optimizer).__name__} keeps state of whole tensors before its first step: choose another `optim` "
            "where parts of tensors learn"
        )
    if apart and callable(getattr(optimizer, "eval", None)):
        raise FrostlineError(
            f"{type(optimizer).__name__} changes weights outside of its steps, where parts of tensors are not copied "
            "back: choose another `optim` where parts of tensors learn"
        )
    for group in optimizer.param_groups:
        group["params"] = [leaf for p in group["params"] for leaf in apart.get(p, [p])]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    learns = {o.value for o in run.ownership.owned}
    if held == learns:
        return optimizer
    names = [n for n, p in run.model.named_parameters() if p in held - learns]
    without = {o.parameter for o in run.ownership.owned if o.value not in held}
    lacking = [n for n, p in run.model.named_parameters() if p in without]
    what = f"holds {_listed(names)}, which does not learn" if names else f"lacks {_listed(lacking)}, which learns"
    raise FrostlineError(_of_the_optimizer(what))


def _of_the_optimizer(what: str) -> str:
    return (
        f"the Trainer's optimizer {what}: leave `optimizers` out and the Trainer makes one over what learns "
        "(optimizer_cls_and_kwargs names another kind)"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "something else"
