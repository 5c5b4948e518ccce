"""The frozen prefix: the blocks below everything that learns, and a pass that leaves them out.

The model's own forward runs in either case: embedding, positions and masks are made as always, and only the blocks
below the split are replaced, by what the last of them gave before. So nothing has to be known about a family, and what
follows meets the same tensors. Read `split_of`, then `Split.entered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from frostline.anatomy import Anatomy, Component, find_blocks
from frostline.schedule import Stage

AFTER = ("final_norm", "head")
"""Parts that come after every block."""


class NoPrefixError(Exception):
    """Why the activations below what learns are not kept."""


class ChanceError(NoPrefixError):
    """They depend on chance."""


@dataclass(kw_only=True, slots=True)
class Split:
    """A model's blocks, cut in two."""

    blocks: tuple[nn.Module, ...]
    at: int
    """So many blocks, from the first one on, lie below what learns."""
    packed: Callable[[torch.Tensor], Any] = lambda stream: stream
    """A stream → what a block of this model gives; known once a pass was looked at."""

    @contextmanager
    def captured(self) -> Iterator[list[torch.Tensor]]:
        """Inside, what the last block of the prefix gives goes to the list."""
        found: list[torch.Tensor] = []

        def look(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            found.append(self._stream_of(out).detach().clone())  # what follows may write to it
            return out

        with _instead(self.blocks[self.at - 1], look):
            yield found

    @contextmanager
    def entered(self, activations: torch.Tensor) -> Iterator[list[int]]:
        """Inside, no block of the prefix is computed: the last one gives `activations`. Each use goes to the list."""
        uses: list[int] = []

        def pass_on(_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self.packed(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        def give(_call: Callable[..., Any], *_args: Any, **_kwargs: Any) -> Any:
            uses.append(1)
            return self.packed(activations)

        below = [_instead(block, pass_on) for block in self.blocks[: self.at - 1]]
        with _all([*below, _instead(self.blocks[self.at - 1], give)]):
            yield uses

    def boundary(self, run: Callable[[], object]) -> torch.Tensor:
        """What the prefix gives for a pass, which ends there."""

        def stop(call: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
            raise _Reached(self._stream_of(call(*args, **kwargs)))

        try:
            with torch.no_grad(), _instead(self.blocks[self.at - 1], stop):
                run()
        except _Reached as reached:
            return reached.stream
        raise NoPrefixError("the model does not call its blocks one after another")

    def _stream_of(self, out: Any) -> torch.Tensor:
        """The stream in what a block gives; what is packed with it is left out afterwards, and tried without."""
        if isinstance(out, torch.Tensor):
            return out
        kind, n = type(out), len(out) if isinstance(out, (tuple, list)) else 0
        if kind not in (tuple, list) or not n or not isinstance(out[0], torch.Tensor):
            raise NoPrefixError(f"a block gives no stream but {kind.__name__}")
        self.packed = lambda stream: kind((stream, *[None] * (n - 1)))
        stream: torch.Tensor = out[0]
        return stream


class _Reached(Exception):  # noqa: N818 (no error: a pass has come to where it was to end)
    def __init__(self, stream: torch.Tensor) -> None:
        super().__init__()
        self.stream = stream


def split_of(model: nn.Module, anatomy: Anatomy, stage: Stage) -> Split:
    """Where a stage's frozen prefix ends. Raises `NoPrefixError` with the reason where there is none to be kept."""
    return Split(blocks=tuple(block for _, block in find_blocks(model)), at=depth_of(anatomy, stage))


def depth_of(anatomy: Anatomy, stage: Stage) -> int:
    """How many blocks lie below everything that learns in a stage. Raises `NoPrefixError` where none can be kept."""
    lowest = anatomy.n_layers
    for c in _learning(anatomy, stage):
        first, layer = c.path[0]
        if first != "layers" and first not in AFTER:
            raise NoPrefixError(f"{c.name} learns, which lies below every block")
        lowest = min(lowest, layer) if first == "layers" and layer is not None else lowest
    if lowest == 0:
        raise NoPrefixError("the first block learns")
    _check_stage(anatomy, stage, lowest)
    return lowest


def learns_before_blocks(stage: Stage) -> bool:
    """Whether something of the embedding, or else before the first block, learns in a stage."""
    return any(c.path[0][0] not in ("layers", *AFTER) for c in _learning(stage.selection.anatomy, stage))


def _learning(anatomy: Anatomy, stage: Stage) -> Iterator[Component]:
    """Components of which a tensor learns, or one that it is tied to."""
    learning = {anatomy.storage_name(s.tensor) for s in stage.selection.slices}
    return (c for c in anatomy.components if any(anatomy.storage_name(s.tensor) in learning for s in c.slices))


def _check_stage(anatomy: Anatomy, stage: Stage, at: int) -> None:
    if stage.spec.local_loss != "none":
        raise NoPrefixError("local losses read every block's output")
    if any(r.point == "embed.out" or any(layer < at for layer in r.layers) for r in stage.routes):
        raise NoPrefixError("a gradient route lies below what learns")
    for c in anatomy.components:
        first, layer = c.path[0]
        below = first == "layers" and layer is not None and layer < at
        if below and any(name in ("router", "experts") for name, _ in c.path):
            raise NoPrefixError(
                f"{c.name} is below: what experts compute for a row differs in the last bits with the other rows"
            )


@contextmanager
def _all(contexts: Sequence[Any]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _all(contexts[1:]):
        yield


@contextmanager
def _instead(block: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the block calls `call`, with what the block would do first; compiled blocks too.

    Modules look at this attribute first of all, and it is where `Module.compile` puts what it made.
    """
    before = block._compiled_call_impl
    original = before or block._call_impl

    def instead(*args: Any, **kwargs: Any) -> Any:
        return call(original, *args, **kwargs)

    block._compiled_call_impl = instead
    try:
        yield
    finally:
        block._compiled_call_impl = before
