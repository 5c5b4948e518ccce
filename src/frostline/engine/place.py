"""Placing the points of gradient routes in a model: read from the proof of its anatomy, confirmed by a trial.

Read `place` first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from frostline.anatomy import Anatomy, module_of, part_modules, prove_model, read_anatomy, tiny_model
from frostline.engine.local_loss import run_watched
from frostline.engine.route_trial import tried
from frostline.engine.routes import Points, Signature, Wiring, placed, signature_of, wire
from frostline.errors import AnatomyError, RouteError


def place(model: nn.Module, anatomy: Anatomy, *, local_losses: bool = False) -> Points:
    """Make every confirmed point of a transformers model permanent; nothing changes until `set_routes`.

    Before compiling and before `recompute_blocks`. Raises `RouteError` when no tiny model of this kind can be proved,
    or for `local_losses` when the model's logits are not those of its final norm and head.
    """
    wirings = confirmed_wirings(model.config)
    if local_losses:  # a tiny one of its kind says whether its logits allow it, before this one is touched
        small = tiny_model(model.config)
        parts = read_anatomy(small)
        find_tail(small, parts, placed(small, parts, wirings))
    points = placed(model, anatomy, wirings)
    return replace(points, tail=find_tail(model, anatomy, points)) if local_losses else points


def _has_no_values(model: nn.Module) -> bool:
    first = next(model.parameters())
    return first.is_meta or isinstance(first, FakeTensor)


def confirmed_wirings(config: Any) -> dict[Signature, Wiring]:
    """Kind of block → its wiring, read from the proof of a tiny model and confirmed by a trial on it.

    What the trial does not confirm is refused, with the reason in the wiring. Raises `RouteError`.
    """
    try:
        model = tiny_model(config)
        proof = prove_model(model)
    except AnatomyError as error:
        raise RouteError(f"gradient routes need a proved anatomy: {error}") from None
    anatomy = read_anatomy(model)
    found: dict[Signature, Wiring] = {}
    for block in proof.blocks:
        modules = part_modules(model, anatomy, block.layer)
        kind, wiring = signature_of(modules), wire(block, modules, anatomy)
        if found.setdefault(kind, wiring) != wiring:
            found[kind] = Wiring(
                branches=(),
                residual_argument={},
                skips={},
                refused={"*": "blocks made of the same parts are wired differently in this model"},
            )
    return tried(model, anatomy, found)


def find_tail(model: nn.Module, anatomy: Anatomy, points: Points) -> nn.Module:
    """The model's final norm and head as one module. Raises `RouteError` where that does not give its logits.

    A model without values is taken at its word.
    """
    try:
        tail = nn.Sequential(*(module_of(model, anatomy, part) for part in ("final_norm", "head")))
    except AnatomyError as error:
        raise RouteError(f"local losses need a final norm and a head: {error}") from None
    if _has_no_values(model):
        return tail
    ids = (torch.arange(4, device=next(model.parameters()).device) % model.config.get_text_config().vocab_size)[None]  # type: ignore[union-attr, operator]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        logits, outputs = run_watched(points, model, {"input_ids": ids})
        same = torch.equal(logits, tail(outputs[-1]))
    for module, training in modes.items():
        module.training = training
    if not same:
        raise RouteError(
            "local losses: this model's logits are not head(final_norm(last block)) (they are scaled or capped), so "
            "the blocks before the last have no loss of their own"
        )
    return tail
