"""What a run feeds its model: tokenizer, rows to train on and rows held out, and the batch of every step.

Files become examples in `data/`; here a recipe's examples become its rows, and a step its batch.
Read `make_feed` first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from frostline.data import (
    Batch,
    Cutting,
    FileTally,
    FlatRows,
    Kept,
    Layout,
    PackedRows,
    PaddedRows,
    Pieces,
    Rows,
    RowSource,
    Store,
    Tally,
    cut,
    found_lines,
    rows_at,
    texts_of,
    train_byte_bpe,
)
from frostline.data.caching import load_store
from frostline.data.pieces import Long
from frostline.data.store import Ints
from frostline.data.templates import read_template
from frostline.engine.apart import keep_apart, padding_changes
from frostline.engine.documents import use_document_attention
from frostline.errors import DataError, ModelError
from frostline.model import load_config, load_tokenizer
from frostline.plan import StepShape
from frostline.recipe import DataSpec, Recipe, TrainedTokenizer, source_names
from frostline.schedule import Stage


def get_tokenizer(recipe: Recipe, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that the recipe names, the model's own, or one trained on the text. Raises a typed error.

    A chat template of the recipe becomes its own, so that the saved model has it.
    """
    tokenizer = _tokenizer(recipe, trust_remote_code=trust_remote_code)
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = read_template(recipe.data.chat_template)
    return tokenizer


def _tokenizer(recipe: Recipe, *, trust_remote_code: bool) -> Any:
    spec = recipe.tokenizer
    if isinstance(spec, str):
        return load_tokenizer(spec, trust_remote_code=trust_remote_code)
    if spec is None and isinstance(recipe.model, str):
        return load_tokenizer(recipe.model, trust_remote_code=trust_remote_code)
    texts = texts_of(recipe.data, recipe.data.train)
    first = next(texts, None)
    if first is None:
        raise DataError(f"no text to train on in {source_names(recipe.data.train)}")
    own = spec or TrainedTokenizer(train="byte-bpe")
    return train_byte_bpe(
        chain([first], texts),
        n_vocabulary=own.vocab_size or load_config(recipe.model).vocab_size,
        special_tokens=own.special_tokens,
    )


Say = Callable[[str], None]

SAMPLE_TOKENS = 1 << 20
"""Of the training documents, for what is measured on them before a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """What a run trains on and is measured on."""

    layout: Layout
    kept_by: Kept | None
    """How documents of one row are kept apart; None where a row is one text."""
    train: RowSource
    held_out: RowSource
    text: Rows
    """The training text as one stream, whatever the layout: for measuring what it is like."""
    tokens_per_step: int
    """On the average, padding not counted."""
    cutting: dict[str, Cutting]
    """`train` and `held_out` → what became of their documents; empty for a stream."""
    held_out_store: Store
    held_out_documents: Ints
    """Documents of it that are held out; in a stream, those that begin in what is."""
    found: tuple[FileTally, ...] = ()
    """What the files were, held-out ones too."""

    def lines(self) -> list[str]:
        """What a person is told of it; of a stream, in which every token counts, only what its files were."""
        out = found_lines(self.found)
        for name, c in self.cutting.items():
            rows = self.train if name == "train" else self.held_out
            out.append(f"{name.replace('_', ' ')}: {c.documents:,} documents, {self.layout} in {len(rows):,} rows")
            if c.long:
                out[-1] += f"; {c.long:,} longer than a row: {c.policy}"
            if c.without_target:
                out[-1] += f"; {c.without_target:,} without a token to learn left out"
            if c.tokens_left_out:
                out[-1] += f"; {c.tokens_left_out:,} tokens left out"
        return out

    def to_json(self) -> dict[str, Any]:
        """What a run folder keeps of it."""
        return {
            "layout": self.layout,
            "kept_apart_by": self.kept_by,
            "rows": {"train": len(self.train), "held_out": len(self.held_out)},
            "tokens_per_step": self.tokens_per_step,
            "documents": {name: asdict(c) for name, c in self.cutting.items()},
            "files": [asdict(f) for f in self.found],
        }


def make_feed(recipe: Recipe, tokenizer: Any, *, say: Say = lambda _: None) -> Feed:
    """Rows to train on and rows held out. `say`: told how far making tokens is.

    Raises `DataError` when there is too little text, and `ModelError` when the model cannot keep documents apart as its
    layout needs.
    """
    tally, other, held_out = Tally(), Tally(), recipe.data.held_out
    store = _store(recipe, recipe.data.train, tokenizer, tally, say)
    apart = None if isinstance(held_out, float) else _store(recipe, held_out, tokenizer, other, say)
    formats = {f.format for f in tally.files.values()}
    layout = layout_of(recipe.data, formats, everything_learns=store.learns is None)
    feed = _streamed(recipe, store, apart) if layout == "stream" else _laid(recipe, layout, store, apart)
    return replace(feed, found=(*tally.files.values(), *other.files.values()))


def layout_of(data: DataSpec, formats: set[str], *, everything_learns: bool) -> Layout:
    """The layout that the recipe says, or the one of its kind of data."""
    return data.layout or ("stream" if formats <= {"", "text", "tokens"} and everything_learns else "packed")


def long_of(data: DataSpec, *, everything_learns: bool) -> Long:
    """What becomes of a document that is longer than a row."""
    return data.long or ("split" if everything_learns else "truncate")


def _store(recipe: Recipe, paths: Any, tokenizer: Any, tally: Tally, say: Say) -> Store:
    n_vocabulary = load_config(recipe.model).get_text_config().vocab_size
    return load_store(recipe.data, paths, tokenizer, n_vocabulary=n_vocabulary, tally=tally, say=say)


def _streamed(recipe: Recipe, store: Store, apart: Store | None) -> Feed:
    """All text in one stream; what is held out is its end, or a stream of its own."""
    data = recipe.data
    rows = stream_of(store, data.length)
    needed = 1 if apart else 2
    if len(rows) < needed:
        raise DataError(
            f"too little text: {source_names(data.train)} gives {len(rows.tokens)} tokens, and {needed} rows of "
            f"{data.length} need {needed * data.length + 1}"
        )
    if apart is None:
        assert isinstance(data.held_out, float)
        rows, held_out = rows.split_end(data.held_out)
    else:
        held_out = stream_of(apart, data.length)
    if not len(held_out):
        assert not isinstance(data.held_out, float)
        raise DataError(
            f"too little held-out text: {source_names(data.held_out)} gives {len(held_out.tokens)} tokens, and one row "
            f"of {data.length} needs {data.length + 1}"
        )
    return Feed(
        layout="stream",
        kept_by=None,
        train=rows,
        held_out=held_out,
        text=rows,
        tokens_per_step=data.batch * data.length,
        cutting={},
        held_out_store=apart or store,
        held_out_documents=np.arange(apart.n_documents) if apart else _begin_in_the_end(store, len(rows) * data.length),
    )


def _begin_in_the_end(store: Store, start: int) -> Ints:
    return np.flatnonzero(store.offsets.numpy()[:-1] >= start)


def stream_of(store: Store, length: int, documents: Ints | None = None, *, n_tokens: int | None = None) -> Rows:
    """All documents in one stream, or some of them, as many as hold `n_tokens`."""
    if documents is None:
        return Rows(store.tokens, length, store.learns)
    enough = documents[: 1 + int(np.searchsorted(np.cumsum(store.lengths[documents]), n_tokens or np.inf))]
    begins, ends = store.offsets.numpy()[enough], store.offsets.numpy()[enough + 1]
    places = [slice(b, e) for b, e in zip(begins, ends, strict=True)]
    if not places:
        return Rows(store.tokens[:0], length)
    learns = None if store.learns is None else torch.cat([store.learns[p] for p in places])
    return Rows(torch.cat([store.tokens[p] for p in places]), length, learns)


def _sample_of(store: Store, length: int, documents: Ints) -> Rows:
    """Documents spread evenly over these, as many as hold about `SAMPLE_TOKENS`, in one stream."""
    share = SAMPLE_TOKENS / max(int(store.lengths[documents].sum()), 1)
    return stream_of(store, length, documents[spread(len(documents), share)] if share < 1 else documents)


def _laid(recipe: Recipe, layout: Literal["packed", "padded", "flat"], store: Store, apart: Store | None) -> Feed:
    """Whole documents in rows; what is held out is spread evenly over them, or documents of their own."""
    data = recipe.data
    kept_by = _kept_by(recipe, layout)
    long = long_of(data, everything_learns=store.learns is None)
    if apart is None:
        assert isinstance(data.held_out, float)
        chosen = spread(store.n_documents, data.held_out)
        rest = np.setdiff1d(np.arange(store.n_documents), chosen)
    else:
        chosen, rest = np.arange(apart.n_documents), np.arange(store.n_documents)
    train, pieces = lay(recipe, layout, kept_by, store, long, rest)
    held_out, held_out_pieces = lay(recipe, layout, kept_by, apart or store, long, chosen)
    cutting = {"train": pieces.cutting, "held_out": held_out_pieces.cutting}
    for name, found in cutting.items():
        if not found.pieces:
            raise DataError(
                f"too little text in {name}: {found.documents} documents, of which nothing can be learnt "
                f"({found.without_target} pieces without a target; long documents: {long})"
            )
    return Feed(
        layout=layout,
        kept_by=kept_by,
        train=train,
        held_out=held_out,
        text=_sample_of(store, data.length, rest),
        tokens_per_step=max(1, round(int(pieces.lengths.sum()) / len(train) * data.batch)),
        cutting=cutting,
        held_out_store=apart or store,
        held_out_documents=chosen,
    )


def lay(
    recipe: Recipe, layout: Layout, kept_by: Kept | None, store: Store, long: Long, documents: Ints
) -> tuple[RowSource, Pieces]:
    """Some documents in rows of whole ones."""
    pieces = cut(store, recipe.data.length, long, documents)
    match layout:
        case "packed":
            assert kept_by is not None
            return PackedRows.of(pieces, recipe.data.length, seed=recipe.seed, kept_by=kept_by), pieces
        case "flat":
            assert kept_by is not None
            return FlatRows(pieces, kept_by), pieces
        case "padded":
            return PaddedRows(pieces), pieces
        case "stream":
            raise AssertionError("a stream has no whole documents")


def _kept_by(recipe: Recipe, layout: Layout) -> Kept | None:
    """Measured on a tiny model of the recipe's kind. Raises `ModelError` when the layout is not for it."""
    config = load_config(recipe.model)
    if layout == "padded":
        why = padding_changes(config)
        if why:
            raise ModelError(f"{config.model_type} is not to be trained on padded rows: {why}; use `layout: stream`")
        return None
    return keep_apart(config, None if recipe.data.apart == "auto" else recipe.data.apart)


def spread(n: int, share: float) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of `share` of `n` documents, at least one, spread evenly over them."""
    n_chosen = min(n, max(1, round(n * share)))
    return ((np.arange(n_chosen) + 0.5) * n / max(n_chosen, 1)).astype(np.int64)


def fit_attention(model: nn.Module, kept_by: Kept | None) -> None:
    """Let a model attend as its rows need; before it is compiled."""
    if kept_by == "calls":
        use_document_attention(model)


LOOKED_AT = 64
"""Steps that a typical one is chosen from."""


def step_shapes(recipe: Recipe, feed: Feed, *, n_steps: int) -> tuple[StepShape | None, StepShape | None]:
    """A step near the average of the first 64, and the largest of them where they differ in size; None for a stream.

    Other steps differ from the average in documents; the larger a batch, the less.
    """
    if isinstance(feed.train, Rows):
        return None, None
    assert isinstance(feed.train, (PackedRows, PaddedRows, FlatRows))
    assert feed.layout != "stream"
    shapes, n_rows = [], len(feed.train)
    for step in range(min(n_steps, LOOKED_AT, -(-n_rows // recipe.data.batch))):
        indices = rows_at(step, seed=recipe.seed, n_rows=n_rows, batch=recipe.data.batch)
        lengths = feed.train.lengths(indices)
        shapes.append(StepShape(layout=feed.layout, lengths=lengths, length=recipe.data.length, kept_by=feed.kept_by))
    computed, squares = np.array([s.computed for s in shapes]), np.array([s.squares for s in shapes])
    off = np.abs(computed / computed.mean() - 1) + np.abs(squares / squares.mean() - 1)
    typical = shapes[int(np.argmin(off))]
    return typical, None if feed.layout == "packed" else shapes[int(np.argmax(computed))]


def batches_of(recipe: Recipe, rows: RowSource, device: torch.device) -> Callable[[int, Stage], list[Batch]]:
    """The pure function from a step to its micro-batches."""

    def batches(step: int, stage: Stage) -> list[Batch]:
        indices = rows_at(step, seed=recipe.seed, n_rows=len(rows), batch=recipe.data.batch)
        return [b.to(device) for b in rows.batch(indices).split(stage.spec.accumulate)]

    return batches


def held_out_batches(recipe: Recipe, rows: RowSource, device: torch.device) -> list[Batch]:
    """The first `eval.batches` batches of rows, the last one possibly smaller."""
    size = recipe.data.batch
    n = min(len(rows), size * recipe.eval.batches)
    return [rows.batch(range(at, min(at + size, n))).to(device) for at in range(0, n, size)]
