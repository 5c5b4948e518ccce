"""The frozen prefix is computed once for a row, and read from then on: exactly, or not at all.

While a stage runs, the first pass over a row keeps what its frozen blocks give; every later one reads it. Before that
is believed, it is tried on the run's own model and rows (`prefix_trial`), and what was kept by an earlier run is
computed once more before it is used (`prefix_reader`). Read `PrefixCache.language` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch._dynamo.eval_frame
from torch import nn

from frostline.anatomy import Anatomy
from frostline.data import Batch
from frostline.engine.prefix import ChanceError, NoPrefixError, Split, split_of
from frostline.engine.prefix_reader import PrefixSettings, Reader
from frostline.engine.prefix_trial import cuda_devices, tried
from frostline.engine.step import LossFunction
from frostline.errors import StorageError
from frostline.schedule import Stage

Batches = Callable[[int, Stage], Sequence[Batch]]


class PrefixCache:
    """The caches of a run's stages: one at a time, shared by stages with the same prefix."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, settings: PrefixSettings) -> None:
        self.model, self.anatomy, self.settings = model, anatomy, settings
        self._stage: int | None = None
        self._loss: LossFunction | None = None
        self._reader: Reader | None = None
        self._bypassed = False
        self._step = 0

    def language(self, stage: Stage, plain: LossFunction) -> LossFunction:
        """The loss of a stage, which must have been entered: `plain`, its prefix read where that is exact and pays."""
        if self.settings.how == "off":
            return plain
        if stage.index != self._stage:
            self._stage = stage.index
            self._loss = self._enter(stage, plain)
        assert self._loss is not None
        return self._loss

    def measuring(self, stage: Stage, plain: LossFunction) -> LossFunction:
        """The same for batches that are measured while a stage is in progress: in evaluation mode, as they are."""
        self.language(stage, plain)
        reader = self._reader
        return plain if reader is None else lambda model, batch: reader.measure(model, batch, plain)

    def watched(self, batches: Batches) -> Batches:
        """The same batches; the one that was asked for last is the one in progress, and its rows' followers are read
        while it is computed."""

        def of_step(step: int, stage: Stage) -> Sequence[Batch]:
            self._step = step
            return batches(step, stage)

        return of_step

    def following(self, batch: Batch) -> Sequence[int]:
        """The rows of the micro-batch after this one; none where the order is not known."""
        if self.settings.rows_of is None or batch.indices is None:
            return ()
        rows, each = tuple(self.settings.rows_of(self._step)), len(batch.indices)
        places = (at for at in range(0, len(rows), each) if rows[at : at + each] == batch.indices)
        after = next(places, len(rows)) + each
        return rows[after : after + each] or tuple(self.settings.rows_of(self._step + 1))[:each]

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

    def _tried(self, stage: Stage, split: Split, plain: LossFunction) -> Reader | None:
        """A reader, once it was tried on a batch of the stage; None where it would not be exact, or has no room."""
        batch = self.settings.batch(stage)
        if batch.indices is None:
            self._refuse(stage, "rows of this data have no fixed length")
            return None
        device = batch.input_ids.device.type
        with (
            torch.random.fork_rng(devices=cuda_devices(batch)),
            torch.autocast(device, torch.bfloat16, enabled=self.settings.bf16),
        ):
            try:
                found = tried(split, self.model, batch, plain)
                return Reader(self.settings, self.model, self.anatomy, stage, split, batch=batch, boundary=found)
            except ChanceError as error:
                self._refuse(stage, f"{error}; {self._without_chance(stage)}")
                return None
            except (NoPrefixError, StorageError) as error:
                self._refuse(stage, str(error))
                return None

    def _without_chance(self, stage: Stage) -> str:
        """What would make it the same every time."""
        if stage.spec.frozen_dropout == "on":
            return "with `frozen_dropout: off` in the stage, dropout is off where nothing learns"
        rates = self.model.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
        named = [f"`{k}`" for k, v in rates.items() if "drop" in k and isinstance(v, float) and v]
        return f"with {' and '.join(named) or 'every dropout'} of the model's configuration at 0 there is none"

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

    def __init__(self, cache: PrefixCache, reader: Reader, plain: LossFunction) -> None:
        self.cache, self.reader, self.plain = cache, reader, plain

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The plain loss."""
        fits = batch.indices is not None and batch.input_ids.shape == self.reader.shape
        if self.cache.is_bypassed or _uncompiled_for_now() or not self.reader.is_open or not fits:
            return self.plain(model, batch)
        loss = self.reader.loss(model, batch, self.plain)
        self.reader.read_ahead(self.cache.following(batch))
        return loss


def _uncompiled_for_now() -> bool:
    """Whether compiled blocks are computed as they are, for a comparison: their bits may be others."""
    return bool(torch._dynamo.eval_frame._stance.stance == "force_eager")
