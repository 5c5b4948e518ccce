"""Whether what a frozen prefix gives may be kept: tried on the run's own model and rows. Read `tried`.

It has to be a row's own (whatever the other rows of the batch are, wherever the row stands, whatever the seed), and all
that the rest of the model needs of what lies below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from frostline.data import Batch
from frostline.engine.prefix import ChanceError, NoPrefixError, Split
from frostline.engine.step import LossFunction


def tried(split: Split, model: nn.Module, batch: Batch, plain: LossFunction) -> torch.Tensor:
    """What the prefix gives for a batch, once that is shown to be all that what follows needs, and a row's own.

    Raises `NoPrefixError` where other rows beside a row, its place or another seed change its bits, where the loss is
    another one with the activations given, or where it is the same with others.
    """
    order = torch.arange(len(batch.input_ids)).flip(0)
    by_chance = seeded(1, lambda: split.boundary(lambda: plain(model, batch)))
    moved = seeded(0, lambda: split.boundary(lambda: plain(model, _reordered(batch, order))))
    # last of the passes that compute the blocks, and whole: nothing they leave behind is there for what follows
    with torch.no_grad(), split.captured() as found:
        computed = seeded(0, lambda: plain(model, batch))
    here = found[-1]
    if not same_bytes(here, by_chance):
        raise ChanceError("what a frozen block gives depends on chance (dropout below what learns)")
    kept = torch.arange(1, len(order), 2)  # every other row has other tokens now
    if not same_bytes(here[kept], moved.flip(0)[kept]):
        raise NoPrefixError("what a frozen block gives for a row depends on the other rows of the batch")
    with torch.no_grad():
        try:
            with split.entered(here.clone()) as uses:
                read = seeded(0, lambda: plain(model, batch))
            with split.entered(here.flip(0, 1)):
                other = seeded(0, lambda: plain(model, batch))
        except Exception as error:  # a model may do anything with what its blocks left out
            raise NoPrefixError(f"the model needs its frozen blocks for more than their output ({error})") from error
    if len(uses) != 1 or not same_bytes(computed, read):
        raise NoPrefixError("what lies above the frozen blocks reads more of them than their output")
    if same_bytes(computed, other):
        raise NoPrefixError("the loss does not depend on what the frozen blocks give")
    return here


def _reordered(batch: Batch, order: torch.Tensor) -> Batch:
    """The rows in another order, those at even places with other tokens."""
    index = order.to(batch.input_ids.device)
    ids = batch.input_ids.clone()
    ids[::2] = ids[::2].flip(1)
    documents, mask = batch.documents, batch.attention_mask
    if documents is not None:
        documents = replace(documents, lengths=tuple(documents.lengths[i] for i in order.tolist()))
    return replace(
        batch,
        input_ids=ids[index],
        labels=batch.labels[index],
        documents=documents,
        attention_mask=None if mask is None else mask[index],
    )


def seeded(seed: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a pass gives when chance begins at a seed."""
    torch.manual_seed(seed)
    return run()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def cuda_devices(batch: Batch) -> list[int]:
    """For `fork_rng`: the device of a batch, where it has chance of its own."""
    return [batch.input_ids.device.index or 0] if batch.input_ids.is_cuda else []
