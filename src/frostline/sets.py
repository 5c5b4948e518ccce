"""The sets that a run is measured on beside its held-out data: what is to be kept, and single sources of both.

Read `eval_sets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frostline.data import FlatRows, PackedRows, PaddedRows, RowSource, Store, Tally
from frostline.data.caching import load_store
from frostline.data.store import Ints
from frostline.engine.loop_settings import EvalSet
from frostline.errors import DataError
from frostline.feed import Feed, Say, held_out_batches, lay, long_of, stream_of
from frostline.model import load_config
from frostline.recipe import Recipe, source_names


def eval_sets(
    recipe: Recipe, feed: Feed, tokenizer: Any, device: torch.device, *, say: Say = lambda _: None
) -> tuple[EvalSet, ...]:
    """What is measured where the held-out loss is, in this order: `keep`, then single files. Raises `DataError`."""
    found: list[EvalSet] = []
    if recipe.eval.keep is not None:
        n_vocabulary = load_config(recipe.model).get_text_config().vocab_size
        keep = load_store(recipe.data, recipe.eval.keep, tokenizer, n_vocabulary=n_vocabulary, tally=Tally(), say=say)
        everything = np.arange(keep.n_documents)
        whole = _set("keep", recipe, feed, keep, everything, device)
        if whole is None:
            raise DataError(
                f"eval.keep: too little text: {source_names(recipe.eval.keep)} gives {len(keep.tokens)} tokens, not "
                f"one row of {recipe.data.length}"
            )
        found.append(whole)
        found += _by_file("keep", recipe, feed, keep, everything, device, say) if recipe.eval.by_source else ()
    if recipe.eval.by_source:
        found += _by_file("held_out", recipe, feed, feed.held_out_store, feed.held_out_documents, device, say)
    return tuple(found)


def _by_file(
    name: str, recipe: Recipe, feed: Feed, store: Store, documents: Ints, device: torch.device, say: Say
) -> Iterator[EvalSet]:
    """A set for every file, where there are several."""
    sources = store.sources.numpy()[documents]
    files = np.unique(sources).tolist()
    titles = short_names(store.files[i] for i in files)
    for i, title in zip(files, titles, strict=True) if len(files) > 1 else ():
        of_file = _set(f"{name}/{title}", recipe, feed, store, documents[sources == i], device)
        if of_file is None:
            say(f"{name}/{title}: less than a row, so it is not measured by itself")
        else:
            yield of_file


def short_names(paths: Iterable[str]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [Path(p).parts for p in paths]
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(p) for p in parts]


def _set(name: str, recipe: Recipe, feed: Feed, store: Store, documents: Ints, device: torch.device) -> EvalSet | None:
    """The first batches of some documents in the run's layout; None where they do not fill a row."""
    rows: RowSource
    if feed.layout == "stream":
        enough = recipe.eval.batches * recipe.data.batch * recipe.data.length + 1
        rows = stream_of(store, recipe.data.length, documents, n_tokens=enough)
    else:
        long = long_of(recipe.data, everything_learns=store.learns is None)
        rows = lay(recipe, feed.layout, feed.kept_by, store, long, documents)[0]
    if not len(rows):
        return None
    batches = held_out_batches(recipe, rows, device)
    measured = _measured(recipe, rows, store, documents)
    return EvalSet(name=name, batches=batches, bytes_per_target=bytes_per_target(store, measured))


def _measured(recipe: Recipe, rows: RowSource, store: Store, documents: Ints) -> Ints:
    """The documents that lie in the first `eval.batches` batches of rows; in a stream, that begin there."""
    n = min(len(rows), recipe.eval.batches * recipe.data.batch)
    match rows:
        case PackedRows():
            return rows.pieces.documents[rows.plan.members[: rows.plan.starts[n]]]
        case PaddedRows() | FlatRows():
            return rows.pieces.documents[:n]
        case _:
            begins = np.cumsum(store.lengths[documents]) - store.lengths[documents]
            return documents[begins < n * recipe.data.length]


def bytes_per_target(store: Store, documents: Ints) -> float | None:
    """UTF-8 bytes that a target stands for, over whole documents."""
    documents = np.unique(documents)
    targets = _n_learning(store, documents)
    n_bytes = int(store.n_bytes.numpy()[documents].sum())
    return n_bytes / targets if targets and n_bytes else None


def _n_learning(store: Store, documents: Ints) -> int:
    lengths = store.lengths[documents]
    if store.learns is None:
        return int(np.maximum(lengths - 1, 0).sum())
    learns, begins = store.learns.numpy(), store.offsets.numpy()[:-1][documents]
    return sum(int(np.count_nonzero(learns[b : b + n])) for b, n in zip(begins, lengths, strict=True))


def held_out_bytes(recipe: Recipe, feed: Feed) -> float | None:
    """Of the held-out data that is measured."""
    store = feed.held_out_store
    return bytes_per_target(store, _measured(recipe, feed.held_out, store, feed.held_out_documents))
