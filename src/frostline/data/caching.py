"""Examples as a store: few of them in memory, many in files that are made once. Read `load_store`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frostline.data.example import read_examples
from frostline.data.sources import Tally
from frostline.data.store import Store
from frostline.data.token_files import Say, local_files, tokenised
from frostline.recipe import DataSpec, SourceSpec, source_of

IN_MEMORY_BYTES = 64_000_000
"""Inputs that are no larger stay in memory, unless the recipe names a cache."""


def load_store(
    spec: DataSpec,
    paths: Iterable[str | SourceSpec],
    tokenizer: Any,
    *,
    n_vocabulary: int,
    tally: Tally,
    say: Say = lambda _: None,
) -> Store:
    """The examples of `paths`; `tally` is filled, `say` told how far making tokens is. Raises `DataError`."""
    sources = [source_of(s) for s in paths]
    cache = cache_folder(spec, sources)
    if cache is None:
        return Store.of(read_examples(spec, sources, tokenizer, n_vocabulary=n_vocabulary, tally=tally))
    return tokenised(
        spec,
        sources,
        tokenizer,
        n_vocabulary=n_vocabulary,
        cache=cache,
        workers=spec.workers or n_cores(),
        tally=tally,
        say=say,
    )


def cache_folder(spec: DataSpec, sources: list[SourceSpec]) -> Path | None:
    """Where tokens are kept; None where they stay in memory."""
    if spec.cache is not None:
        return Path(spec.cache)
    if not all(Path(s.path).exists() for s in sources):  # a dataset of a hub
        return None
    if sum(f.stat().st_size for s in sources for f in local_files(s)) <= IN_MEMORY_BYTES:
        return None
    if os.environ.get("FROSTLINE_CACHE"):
        return Path(os.environ["FROSTLINE_CACHE"]) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frostline" / "tokens"


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
