"""Balance without a loss: a number per expert, added to the scores that choose experts, moves against the load.

After every step b_e += rate · sign(mean load − load_e), over the step's tokens (Wang et al., arXiv 2408.15664). The
bias is a buffer of the router; the audit knows that it moves by this rule. Read `move_corrections` first.
"""

from __future__ import annotations

import torch
from torch import nn

from frostline.engine.dispatch import take_load
from frostline.schedule import Stage


def forget_load(model: nn.Module, stage: Stage) -> None:
    """Called before a step: what a measurement, or a step that did not count, has routed moves nothing. Counts are no
    part of a checkpoint, so a run that was resumed would move by others."""
    if stage.by_rule:
        take_load(model)


@torch.no_grad()
def move_corrections(model: nn.Module, stage: Stage) -> list[str]:
    """Move the correction biases that `stage` says, by the load of the step just done; returns their names."""
    if not stage.by_rule:
        return []
    assert stage.spec.moe is not None
    assert stage.spec.moe.bias is not None
    anatomy, buffers, load = (
        stage.selection.anatomy,
        dict(model.named_buffers(remove_duplicate=False)),
        take_load(model),
    )
    for piece in stage.by_rule:
        site = anatomy.owner[piece].name.rpartition(".")[0]
        bias = buffers[piece.tensor]
        counts = load[site].double()
        bias += stage.spec.moe.bias * (counts.mean() - counts).sign().to(bias)
    return [piece.tensor for piece in stage.by_rule]
