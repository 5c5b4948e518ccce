"""The frozen prefix is computed once for a row, and read from then on: exactly, or not at all.

While a stage runs, the first pass over a row keeps what its frozen blocks give; every later one reads it. Before that
is believed, it is tried on the run's own model and rows: the same bits whatever else is in the batch and wherever the
row stands in it, the same loss, and another loss for other activations. What was kept by an earlier run is computed
once more before it is used. Read `PrefixCache.language` first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo.eval_frame
from torch import nn

from frostline.anatomy import Anatomy, fingerprint
from frostline.data import Batch
from frostline.engine.prefix import AFTER, NoPrefixError, Split, split_of
from frostline.engine.prefix_store import RowStore, make_room, token_hashes
from frostline.engine.step import LossFunction
from frostline.errors import StorageError
from frostline.schedule import Stage
from frostline.units import format_bytes

FORMAT = 1
"""Of the stores: another number is another key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSettings:
    """What a run says about its cache."""

    how: Literal["auto", "on", "off"]
    folder: Path
    limit_bytes: int
    n_rows: int
    """Rows of the training data."""
    batch: Callable[[Stage], Batch]
    """A micro-batch of a stage, to try it on."""
    bf16: bool
    """Products are in bf16 (autocast)."""
    depends_on: Callable[[], Mapping[str, Any]]
    """What else the activations depend on: software, machine, data; asked for when it is needed."""
    worth: Callable[[Stage], str | None]
    """Why a stage's cache does not pay; None where it does."""
    say: Callable[[Stage, str, str], None]
    """(stage, on or off, why)."""


class PrefixCache:
    """The caches of a run's stages: one at a time, shared by stages with the same prefix."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, settings: PrefixSettings) -> None:
        self.model, self.anatomy, self.settings = model, anatomy, settings
        self._stage: int | None = None
        self._loss: LossFunction | None = None
        self._reader: _Reader | None = None
        self._bypassed = False

    def language(self, stage: Stage, plain: LossFunction) -> LossFunction:
        """The loss of a stage, which must have been entered: `plain`, its prefix read where that is exact and pays."""
        if self.settings.how == "off":
            return plain
        if stage.index != self._stage:
            self._stage = stage.index
            self._loss = self._enter(stage, plain)
        assert self._loss is not None
        return self._loss

    def _enter(self, stage: Stage, plain: LossFunction) -> LossFunction:
        before, self._reader = self._reader, None
        try:
            split = split_of(self.model, self.anatomy, stage)
            why = None if self.settings.how == "on" else self.settings.worth(stage)
            if why is not None:
                raise NoPrefixError(why)
        except NoPrefixError as error:
            if before is not None:
                before.close()
            self._refuse(stage, str(error))
            return plain
        if before is not None and before.alike(stage, split):  # nothing below it has learned in between
            self._reader = before
        else:
            if before is not None:
                before.close()
            self._reader = self._tried(stage, split, plain)
        if self._reader is None:
            return plain
        self._reader.stage = stage
        return _ReadingLoss(self, self._reader, plain)

    def _tried(self, stage: Stage, split: Split, plain: LossFunction) -> _Reader | None:
        """A reader, once it was tried on a batch of the stage; None where it would not be exact, or has no room."""
        batch = self.settings.batch(stage)
        if batch.indices is None:
            self._refuse(stage, "rows of this data have no fixed length")
            return None
        device = batch.input_ids.device.type
        with (
            torch.random.fork_rng(devices=_cuda_devices(batch)),
            torch.autocast(device, torch.bfloat16, enabled=self.settings.bf16),
        ):
            try:
                boundary = tried(split, self.model, batch, plain)
                return _Reader(self, stage, split, batch.input_ids.shape, boundary)
            except (NoPrefixError, StorageError) as error:
                self._refuse(stage, str(error))
                return None

    def _refuse(self, stage: Stage, why: str) -> None:
        self.settings.say(stage, "off", why)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, everything is computed; for a step that is metered."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @property
    def is_bypassed(self) -> bool:
        """Whether everything is computed for now."""
        return self._bypassed

    def close(self) -> None:
        """Put on disk what was kept. A run need not fail for it: what cannot be written is said."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _ReadingLoss:
    """A loss whose prefix is read where it is there, and kept where it is not."""

    def __init__(self, cache: PrefixCache, reader: _Reader, plain: LossFunction) -> None:
        self.cache, self.reader, self.plain = cache, reader, plain

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The plain loss."""
        fits = batch.indices is not None and batch.input_ids.shape == self.reader.shape
        if self.cache.is_bypassed or _uncompiled_for_now() or self.reader.store is None or not fits:
            return self.plain(model, batch)
        return self.reader.loss(model, batch, self.plain)


class _Reader:
    """One split with its store."""

    def __init__(
        self, cache: PrefixCache, stage: Stage, split: Split, shape: torch.Size, boundary: torch.Tensor
    ) -> None:
        """`shape`: of a micro-batch; `boundary`: what the prefix gives for one. Raises `StorageError`."""
        self.cache, self.stage, self.split, self.shape = cache, stage, split, shape
        self.accumulate = stage.spec.accumulate
        self.frozen_dropout = stage.spec.frozen_dropout
        self.store: RowStore | None = None
        self._unchecked = False
        self._open_store(boundary)

    def alike(self, stage: Stage, split: Split) -> bool:
        """Whether another stage right after this one has the same prefix and the same batches."""
        same = (split.at, stage.spec.accumulate, stage.spec.frozen_dropout)
        return same == (self.split.at, self.accumulate, self.frozen_dropout) and self.store is not None

    def loss(self, model: nn.Module, batch: Batch, plain: LossFunction) -> torch.Tensor:
        """The plain loss of a batch, its prefix read or kept."""
        store, indices = self.store, batch.indices
        assert store is not None
        assert indices is not None
        tokens = hashes_of(batch)
        if store.has(indices, tokens) and self._still_true(model, batch, plain):
            kept = store.read(indices, batch.input_ids.device)
            with self.split.entered(kept):
                return plain(model, batch)
        if store.was_damaged:
            store.was_damaged = False
            self._say("on", "rows that were damaged are computed again")
        with self.split.captured() as found:
            loss = plain(model, batch)
        try:
            store.write(indices, tokens, found[-1])
        except StorageError as error:
            self._stop(str(error))
        return loss

    def _open_store(self, boundary: torch.Tensor) -> None:
        settings = self.cache.settings
        key = self._key()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        needed, folder = settings.n_rows * boundary[0].nbytes, settings.folder / name
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{settings.folder} cannot be made: {error.strerror}") from error
        deleted = make_room(settings.folder, needed, settings.limit_bytes, keep=folder)
        self.store = RowStore(folder, key, n_rows=settings.n_rows, like=boundary[0])
        there = self.store.n_filled
        self._unchecked = there > 0
        made_room = f", {len(deleted)} older ones deleted for it" if deleted else ""
        damaged = " (what was there was damaged)" if self.store.was_damaged else ""
        self.store.was_damaged = False
        others = "" if self.store.writes else "; another process fills it, so this one only reads"
        self._say(
            "on",
            f"what {self.split.at} frozen blocks give is kept: {there} of {settings.n_rows} rows are there{damaged}, "
            f"all take {format_bytes(needed)}{made_room}; {folder}{others}",
        )

    def _key(self) -> dict[str, Any]:
        """Everything that the activations depend on, apart from a row's own tokens."""
        model, anatomy, at = self.cache.model, self.cache.anatomy, self.split.at
        above = {
            s.tensor
            for c in anatomy.components
            for s in c.slices
            if c.path[0][0] in AFTER or (c.path[0][0] == "layers" and (c.path[0][1] or 0) >= at)
        }
        below = {s.tensor for c in anatomy.components for s in c.slices} - above
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        weights = hashlib.sha256()
        for name in sorted(below):
            weights.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
            weights.update(fingerprint(tensors[name]).encode())
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}  # type: ignore[union-attr, operator]
        device = next(model.parameters()).device.type
        return {
            "format": FORMAT,
            "blocks": at,
            "batch": list(self.shape),
            "weights": weights.hexdigest(),
            "model": type(model).__name__,
            "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "attention": str(model.config._attn_implementation),  # type: ignore[union-attr]
            "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
            **self.cache.settings.depends_on(),
        }

    def _still_true(self, model: nn.Module, batch: Batch, plain: LossFunction) -> bool:
        """Before rows of another run are used, those of one batch are computed again."""
        if not self._unchecked:
            return True
        self._unchecked = False
        assert self.store is not None
        assert batch.indices is not None
        with torch.random.fork_rng(devices=_cuda_devices(batch)):
            now = self.split.boundary(lambda: plain(model, batch))
        if _same(now.cpu(), self.store.read(batch.indices)):
            return True
        self.store.clear()
        self._say("on", "what another run kept is not what is computed here now: all rows are computed again")
        return False

    def _stop(self, why: str) -> None:
        self._say("off", why)
        self.close()

    def _say(self, value: str, why: str) -> None:
        self.cache.settings.say(self.stage, value, why)

    def close(self) -> None:
        """Put on disk what was kept."""
        if self.store is None:
            return
        try:
            self.store.close()
        except StorageError as error:
            self._say("off", str(error))
        self.store = None


def tried(split: Split, model: nn.Module, batch: Batch, plain: LossFunction) -> torch.Tensor:
    """What the prefix gives for a batch, once that is shown to be all that what follows needs, and a row's own.

    Raises `NoPrefixError` where other rows beside a row, its place or another seed change its bits, where the loss is
    another one with the activations given, or where it is the same with others.
    """
    here = _seeded(0, lambda: split.boundary(lambda: plain(model, batch)))
    if not _same(here, _seeded(1, lambda: split.boundary(lambda: plain(model, batch)))):
        raise NoPrefixError("what a frozen block gives depends on chance (dropout below what learns)")
    order = torch.arange(len(batch.input_ids)).flip(0)
    moved = _seeded(0, lambda: split.boundary(lambda: plain(model, _reordered(batch, order))))
    kept = torch.arange(1, len(order), 2)  # every other row has other tokens now
    if not _same(here[kept], moved.flip(0)[kept]):
        raise NoPrefixError("what a frozen block gives for a row depends on the other rows of the batch")
    with torch.no_grad():
        computed = _seeded(0, lambda: plain(model, batch))
        try:
            with split.entered(here.clone()) as uses:
                read = _seeded(0, lambda: plain(model, batch))
            with split.entered(here.flip(0, 1)):
                other = _seeded(0, lambda: plain(model, batch))
        except Exception as error:  # a model may do anything with what its blocks left out
            raise NoPrefixError(f"the model needs its frozen blocks for more than their output ({error})") from error
    if len(uses) != 1 or not _same(computed, read):
        raise NoPrefixError("what lies above the frozen blocks reads more of them than their output")
    if _same(computed, other):
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


def hashes_of(batch: Batch) -> list[int]:
    """A number for what each row of a batch is made of."""
    made_of = batch.input_ids
    if batch.attention_mask is not None:
        made_of = torch.cat([made_of, batch.attention_mask.to(made_of)], dim=1)
    if batch.documents is not None:
        positions = batch.documents.positions(batch.input_ids.shape[1]).to(made_of)
        made_of = torch.cat([made_of, positions], dim=1)
    return token_hashes(made_of)


def _seeded(seed: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(seed)
    return run()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _uncompiled_for_now() -> bool:
    """Whether compiled blocks are computed as they are, for a comparison: their bits may be others."""
    return bool(torch._dynamo.eval_frame._stance.stance == "force_eager")


def _cuda_devices(batch: Batch) -> list[int]:
    return [batch.input_ids.device.index or 0] if batch.input_ids.is_cuda else []
