"""Gradient checkpointing: a block keeps its input only, and is computed again when its backward pass comes.

transformers' own switch makes the input of the model require a gradient, so that backward runs through every block
whatever is frozen, and leaves out blocks in evaluation mode; here neither happens. Read `recompute_blocks` first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_thread = threading.local()


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """Let every block of `blocks` keep no more than its input between forward and backward.

    Gradients are bitwise those without (dropout included), where the same kernels give the same bits twice. Below the
    frontier nothing is kept or computed again, and backward stops where it stopped. Hooks on the block itself run
    once, outside of what is computed again.
    """
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)


@contextmanager
def recomputed(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, every block of `forwards` is its given forward pass and keeps no more than its input."""
    before = {block: block.forward for block in forwards}
    try:
        for block, forward in forwards.items():
            block.forward = partial(_checkpointed, block, forward)
        yield
    finally:
        for block, forward in before.items():
            block.forward = forward


def left_out(frozen: Iterable[nn.Module]) -> list[nn.Module]:
    """Blocks that transformers' own switch is on for, and that it leaves out because they are in evaluation mode."""
    layers = (b for module in frozen for b in module.modules() if isinstance(b, GradientCheckpointingLayer))
    return [b for b in layers if b.gradient_checkpointing and not is_recomputed(b)]


def is_recomputed(block: nn.Module) -> bool:
    """Whether `recompute_blocks` was here."""
    return isinstance(block.forward, partial) and block.forward.func is _checkpointed


def recomputing() -> bool:
    """Whether this thread is computing a block for the second time."""
    return getattr(_thread, "active", False)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _needs_gradients(block, args, kwargs):  # keeps nothing anyway, and the compiler stumbles over it
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # the compiler decides what of the block its backward pass computes again
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _needs_gradients(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    return any(t.requires_grad for t in given) or any(p.requires_grad for p in block.parameters())


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Marked()


class _Marked(AbstractContextManager[None]):
    """Entered for every computation that is done again; torch before 2.13 enters one object more than once."""

    def __enter__(self) -> None:
        _thread.active = True

    def __exit__(self, *_: object) -> None:
        _thread.active = False
