"""One frozen prefix with what was kept of it: rows that are trained on, and rows that are measured.

Read `Reader`, then `Kept.loss`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from frostline.anatomy import Anatomy, fingerprint
from frostline.data import Batch
from frostline.engine.prefix import AFTER, Split
from frostline.engine.prefix_ahead import AheadStore
from frostline.engine.prefix_store import RowStore, make_room, token_hashes
from frostline.engine.prefix_trial import cuda_devices, same_bytes
from frostline.engine.step import LossFunction
from frostline.errors import StorageError
from frostline.schedule import Stage
from frostline.units import format_bytes

FORMAT = 1
"""Of the stores: another number is another key."""
Say = Callable[[str, str], None]
"""(on or off, why)."""


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
    measured: Sequence[Batch] = ()
    """Every batch that is measured, again and again: these objects."""
    rows_of: Callable[[int], Sequence[int]] | None = None
    """(batch) → the rows in it, in their order; nothing is read ahead where it is not known."""


class Reader:
    """One split with its stores, for the stages that share it."""

    def __init__(
        self,
        settings: PrefixSettings,
        model: nn.Module,
        anatomy: Anatomy,
        stage: Stage,
        split: Split,
        *,
        batch: Batch,
        boundary: torch.Tensor,
    ) -> None:
        """`batch`: a micro-batch; `boundary`: what the prefix gives for it. Raises `StorageError`."""
        self.settings, self.stage, self.split, self.shape = settings, stage, split, batch.input_ids.shape
        self.is_open = True
        self._n_deleted = 0
        self._places: dict[int, int] = {}
        n_measured = 0
        for one in settings.measured:
            if one.indices is not None and one.input_ids.shape[1:] == self.shape[1:]:
                self._places[id(one)] = n_measured
                n_measured += len(one.input_ids)
        key = key_of(model, anatomy, split, self.shape, settings.depends_on())
        row, device = boundary[0], batch.input_ids.device
        self.trained = Kept(split, self._opened(key, "", settings.n_rows, row, device), self.say, self.stop)
        self.measured: Kept | None = None
        held_out = ""
        try:
            if n_measured:
                shelf = self._opened({**key, "compile": None}, "-held-out", n_measured, row, device)
                self.measured = Kept(split, shelf, self.say, self.stop, is_tried=False)
                held_out = f" and {_how_many(self.measured)} held-out ones{_damage(self.measured)}"
        except StorageError as error:
            held_out = f" (held-out ones are not kept: {error})"
            n_measured = 0
        self._say_what_is_there(held_out, (settings.n_rows + n_measured) * row.nbytes)

    def _opened(
        self, key: Mapping[str, Any], what: str, n_rows: int, row: torch.Tensor, device: torch.device
    ) -> AheadStore:
        settings = self.settings
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] + what
        needed, folder = n_rows * row.nbytes, settings.folder / name
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{settings.folder} cannot be made: {error.strerror}") from error
        self._n_deleted += len(make_room(settings.folder, needed, settings.limit_bytes, keep=folder))
        return AheadStore(RowStore(folder, key, n_rows=n_rows, like=row), device)

    def _say_what_is_there(self, held_out: str, n_bytes: int) -> None:
        store = self.trained.shelf.store
        made_room = f", {self._n_deleted} older ones deleted for it" if self._n_deleted else ""
        others = "" if store.writes else "; another process fills it, so this one only reads"
        others = "; nothing can be written there, so it is only read" if store.is_read_only else others
        self.say(
            "on",
            f"what {self.split.at} frozen blocks give is kept: {_how_many(self.trained)} rows are there"
            f"{_damage(self.trained)}{held_out}, all take {format_bytes(n_bytes)}{made_room}; {store.folder}{others}",
        )

    def alike(self, stage: Stage, split: Split) -> bool:
        """Whether another stage right after this one has the same prefix and the same batches."""

        def what(of: Stage, at: int) -> tuple[Any, ...]:
            return at, of.spec.accumulate, of.spec.frozen_dropout

        return self.is_open and what(stage, split.at) == what(self.stage, self.split.at)

    def loss(self, model: nn.Module, batch: Batch, plain: LossFunction) -> torch.Tensor:
        """The plain loss of a batch of the stage, its prefix read or kept."""
        assert batch.indices is not None
        return self.trained.loss(model, batch, batch.indices, hashes_of(batch), plain)

    def measure(self, model: nn.Module, batch: Batch, plain: LossFunction) -> torch.Tensor:
        """The plain loss of a batch that is measured; computed where it is none of those that were announced."""
        first = self._places.get(id(batch))
        if self.measured is None or first is None or not self.is_open:
            return plain(model, batch)
        rows = range(first, first + len(batch.input_ids))
        return self.measured.loss(model, batch, rows, hashes_of_whole(batch), plain)

    def read_ahead(self, rows: Sequence[int]) -> None:
        """The rows of the next micro-batch."""
        if self.is_open:
            self.trained.shelf.read_ahead(rows)

    def say(self, value: str, why: str) -> None:
        """Tell what became of the cache of this stage."""
        self.settings.say(self.stage, value, why)

    def stop(self, why: str) -> None:
        """Compute everything from now on."""
        self.say("off", why)
        self.close()

    def close(self) -> None:
        """Put on disk what was kept. What cannot be written is said."""
        if not self.is_open:
            return
        self.is_open = False
        for kept in (self.trained, self.measured):
            try:
                if kept is not None:
                    kept.close()
            except StorageError as error:
                self.say("off", str(error))


class Kept:
    """What a prefix gives for rows of one kind."""

    def __init__(
        self, split: Split, shelf: AheadStore, say: Say, stop: Callable[[str], None], *, is_tried: bool = True
    ) -> None:
        self.split, self.shelf, self.say, self.stop = split, shelf, say, stop
        self.is_tried = is_tried
        """Whether the trial was on passes of this kind: in training mode, or not."""
        self._unchecked = shelf.store.n_filled > 0 or not shelf.store.writes
        self._own: set[int] = set()
        """Rows that are as this run has computed them."""

    def loss(
        self, model: nn.Module, batch: Batch, rows: Sequence[int], tokens: Sequence[int], plain: LossFunction
    ) -> torch.Tensor:
        """The plain loss of a batch, which is these rows of these tokens; its prefix read or kept."""
        if self.shelf.has(rows, tokens) and self._still_true(model, batch, rows, tokens, plain):
            kept = self.shelf.read(rows, tokens)
            if kept is not None:
                with self.split.entered(kept):
                    return plain(model, batch)
        if self.shelf.damaged():
            self.say("on", "rows that were damaged are computed again")
        with self.split.captured() as found:
            loss = plain(model, batch)
        if not self.is_tried and not self._suffices(model, batch, found[-1], loss, plain):
            self.stop("in evaluation, what lies above the frozen blocks reads more of them than their output")
            return loss
        if not self.shelf.fits(found[-1]):
            self.stop("what the frozen blocks give has another shape or type than when they were tried")
            return loss
        try:
            self.shelf.write(rows, tokens, found[-1])
            self._own.update(rows if self.shelf.store.writes else ())
        except StorageError as error:
            self.stop(str(error))
        return loss

    def _suffices(
        self, model: nn.Module, batch: Batch, found: torch.Tensor, loss: torch.Tensor, plain: LossFunction
    ) -> bool:
        """Whether a pass that is given what was found has the loss of the pass that found it."""
        self.is_tried = True
        with self.split.entered(found.clone()):
            return same_bytes(plain(model, batch), loss)

    def _still_true(
        self, model: nn.Module, batch: Batch, rows: Sequence[int], tokens: Sequence[int], plain: LossFunction
    ) -> bool:
        """Before rows of another run are used, those of one batch are computed again."""
        if not self._unchecked or self._own.issuperset(rows):
            return True
        kept = self.shelf.read(rows, tokens)
        if kept is None:
            return False
        self._unchecked = False
        with torch.random.fork_rng(devices=cuda_devices(batch)):
            now = self.split.boundary(lambda: plain(model, batch))
        if same_bytes(now, kept):
            return True
        self.say("on", "what another run kept is not what is computed here now: all rows are computed again")
        try:
            self.shelf.clear()
        except StorageError as error:
            self.stop(str(error))
        return False

    def close(self) -> None:
        """Put on disk what was kept. Raises `StorageError`."""
        self.shelf.close()


def _how_many(kept: Kept) -> str:
    return f"{kept.shelf.store.n_filled} of {kept.shelf.store.n_rows}"


def _damage(kept: Kept) -> str:
    return " (what was there was damaged)" if kept.shelf.damaged() else ""


def key_of(
    model: nn.Module, anatomy: Anatomy, split: Split, shape: torch.Size, depends_on: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the activations depend on, apart from a row's own tokens."""
    above = {
        s.tensor
        for c in anatomy.components
        for s in c.slices
        if c.path[0][0] in AFTER or (c.path[0][0] == "layers" and (c.path[0][1] or 0) >= split.at)
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
        "blocks": split.at,
        "batch": list(shape),
        "weights": weights.hexdigest(),
        "model": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": str(model.config._attn_implementation),  # type: ignore[union-attr]
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        **depends_on,
    }


def hashes_of(batch: Batch) -> list[int]:
    """A number for what each row of a batch is made of."""
    made_of = batch.input_ids
    if batch.attention_mask is not None:
        made_of = torch.cat([made_of, batch.attention_mask.to(made_of)], dim=1)
    if batch.documents is not None:
        positions = batch.documents.positions(batch.input_ids.shape[1]).to(made_of)
        made_of = torch.cat([made_of, positions], dim=1)
    return token_hashes(made_of)


def hashes_of_whole(batch: Batch) -> list[int]:
    """The same for rows that come in one batch only: another row beside them, or fewer, and it is another number."""
    whole = hashes_of(batch)
    texts = (f"{i} of {whole}".encode() for i in range(len(whole)))
    return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) for text in texts]
