"""What is said about FFNs over attention that has never learned, settled by measurement on a model.

Row S9 of the question the project grew from: whether it can be done at all. What it is worth from scratch, against
everything learning, `frostline compare scratch-ffn` measures over seeds. Read the first function.
"""

from __future__ import annotations

import torch

from frostline.anatomy import put, take
from frostline.experiment.bench import SEED, Bench, Claim

N_STEPS = 5
LR = 1e-4
SPREAD = 0.02
"""Standard deviation of the weights as most models draw them."""


def the_ffn_learns_over_attention_that_has_not(bench: Bench) -> Claim:
    """S9: attention drawn anew at random, and blank, in the model as it is; frozen, while only the FFN learns."""
    found = {kind: _learn_over(bench, spread) for kind, spread in (("random", SPREAD), ("blank", 0.0))}
    told = [f"over {kind} attention the loss falls from {a:.4f} to {b:.4f}" for kind, (a, b, _) in found.items()]
    changed = sum(n for _, _, n in found.values())
    return Claim(
        key="S9",
        belief="An FFN cannot learn over attention that has never learned, be it random or blank.",
        verdict="FALSE",
        measured=f"In {N_STEPS} AdamW steps with only the FFN learning, {' and '.join(told)}, on one batch; {changed} "
        "attention bytes changed. What that is worth from scratch: `frostline compare scratch-ffn`.",
        holds=all(b < a for a, b, _ in found.values()) and changed == 0,
        numbers={
            **{f"loss_before_{kind}": a for kind, (a, _, _) in found.items()},
            **{f"loss_after_{kind}": b for kind, (_, b, _) in found.items()},
            "attention_bytes_changed": changed,
        },
    )


def _learn_over(bench: Bench, spread: float) -> tuple[float, float, int]:
    """Loss before and after a few steps of the FFN over attention of this spread, and attention bytes that changed."""
    active = bench.learn("ffn", lr=LR)
    matrices = [s for s in bench.select("attn").slices if bench.parameters[s.tensor].dim() > 1]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for s in matrices:
            parameter = bench.parameters[s.tensor]
            drawn = spread * torch.randn(take(parameter, s).shape, generator=generator)
            put(parameter, s, drawn.to(parameter))
    drawn_as = [take(bench.parameters[s.tensor].detach(), s).clone() for s in matrices]
    losses = []
    for i in range(N_STEPS + 1):
        losses.append(bench.backward())
        if i < N_STEPS:
            bench.update(active)
    now = [take(bench.parameters[s.tensor].detach(), s) for s in matrices]
    changed = sum(a.element_size() * int((a != b).sum()) for a, b in zip(now, drawn_as, strict=True))
    return losses[0], losses[-1], changed
