"""Examples in parts, made by several processes: what is read is read here, in order; what costs is done by the others.

Which examples are in which part depends on the sources alone, so that a part that exists need not be made again.
Read `chunks_of`, then `made`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from frostline.data.example import Maker
from frostline.data.formats import Pair, Shape, TokenRow
from frostline.data.sources import FileTally, Found, Tally, shapes_of
from frostline.data.store import Block
from frostline.data.text import Document
from frostline.errors import DataError
from frostline.recipe import DataSpec, SourceSpec

CHARACTERS = 1 << 21
"""Of text in a part, about: enough that a part takes long against its overhead."""
TOGETHER = 256
"""Examples given to a tokenizer at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one part is made of."""

    index: int
    shapes: tuple[tuple[Shape, str, str, str], ...]
    """Shape, its file (empty for a copy of a mixture), the file's format, and what to do when it cannot be used."""


def chunks_of(spec: DataSpec, sources: Iterable[SourceSpec], tally: Tally) -> Iterator[Chunk]:
    """All shapes of the sources, in order, about `CHARACTERS` at a time; `tally` is filled with what was read."""
    held: list[tuple[Shape, str, str, str]] = []
    size = index = 0
    for found in shapes_of(spec, sources, tally):
        counted = tally.files.get(found.tally.path) is found.tally
        held.append((found.shape, found.tally.path if counted else "", found.tally.format, found.invalid))
        size += _size(found.shape)
        if size >= CHARACTERS:
            yield Chunk(index, tuple(held))
            held, size, index = [], 0, index + 1
    if held:
        yield Chunk(index, tuple(held))


def _size(shape: Shape) -> int:
    match shape:
        case Document():
            return len(shape.text)
        case Pair():
            return len(shape.prompt) + len(shape.completion)
        case TokenRow():
            return 4 * len(shape.ids)
        case _:
            return sum(len(str(m.get("content") or "")) for m in shape.messages)


def made(
    chunks: Iterable[Chunk], spec: DataSpec, tokenizer: Any, n_vocabulary: int, *, workers: int
) -> Iterator[tuple[int, Block, dict[str, Any]]]:
    """(index, examples, what was left out per file) of every chunk, in order. Raises what making one raises."""
    if workers == 1:
        maker = Maker(spec, tokenizer, n_vocabulary)
        for chunk in chunks:
            yield _made(chunk, maker)
        return
    with _pool(spec, tokenizer, n_vocabulary, workers) as pool:
        waiting: deque[Future[tuple[int, Block, dict[str, Any]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_made_by_worker, chunk))
                if len(waiting) > 2 * workers:  # no more in memory than keeps everybody busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that makes tokens was ended from outside (out of memory?); what is made so far is kept: run "
                "again, or with fewer of them (`data.workers`)"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _pool(spec: DataSpec, tokenizer: Any, n_vocabulary: int, workers: int) -> ProcessPoolExecutor:
    """Forked where that is safe enough (Linux; they touch no torch): nothing is imported or copied twice."""
    way = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(way),
        initializer=_begin,
        initargs=(spec, tokenizer, n_vocabulary),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, from Python 3.12 on
        pool.submit(int).result()
    return pool


_maker: Maker | None = None
"""Of this worker process."""


def _begin(spec: DataSpec, tokenizer: Any, n_vocabulary: int) -> None:
    global _maker
    _end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process each; threads of a tokenizer do not outlive a fork
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _maker = Maker(spec, tokenizer, n_vocabulary)


def _end_with_parent() -> None:
    """A killed parent leaves forked workers waiting for ever: each holds the pipe that it waits on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _made_by_worker(chunk: Chunk) -> tuple[int, Block, dict[str, Any]]:
    assert _maker is not None
    return _made(chunk, _maker)


def _made(chunk: Chunk, maker: Maker) -> tuple[int, Block, dict[str, Any]]:
    tallies: dict[str, FileTally] = {}
    found = []
    for shape, path, name, invalid in chunk.shapes:
        tally = tallies.setdefault(path, FileTally(path, format=name))
        found.append(Found(shape, tally, invalid))
    parts = (found[at : at + TOGETHER] for at in range(0, len(found), TOGETHER))
    block = Block.of(example for part in parts for example in maker.examples(part))
    notes = {
        path: {"dropped": t.dropped, "reasons": t.reasons, "methods": t.methods}
        for path, t in tallies.items()
        if t.dropped or t.methods
    }
    return chunk.index, block, notes
