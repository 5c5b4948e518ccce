"""Files → `Example`s: one document or conversation each, as tokens, with what counts in the loss.

Whatever lies before training begins here and nothing else does: how examples become rows and batches is not this
file's business. Read `read_examples` first; it is lazy and needs no more memory than the examples it looks at together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data.text import Document, iter_documents
from frostline.data.tokens import check_vocabulary, encode_texts
from frostline.recipe import DataSpec

TOGETHER = 64
"""Documents given to the tokenizer at once: enough for its threads."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation, tokenised."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    """(tokens,) int32, special tokens included."""
    learns: np.ndarray[Any, np.dtype[np.bool_]]
    """(tokens,) bool: whether this token counts in the loss as a target; the first never does."""
    n_bytes: int
    """UTF-8 bytes of the text that its learning tokens stand for."""
    source: str
    """File and line, for errors and reports."""


def read_examples(
    spec: DataSpec, paths: Iterable[str | Path], tokenizer: Any, *, n_vocabulary: int
) -> Iterator[Example]:
    """The examples of `paths`, in the order given, read as `spec` says. Raises `DataError` where one cannot be read.

    `n_vocabulary`: entries of the model's vocabulary; a token outside it is an error.
    """
    del spec  # formats follow
    documents = iter_documents(paths)
    while some := list(islice(documents, TOGETHER)):
        yield from documents_to_examples(some, tokenizer, n_vocabulary=n_vocabulary)


def documents_to_examples(documents: list[Document], tokenizer: Any, *, n_vocabulary: int) -> Iterator[Example]:
    """Plain texts: everything learns but the first token."""
    encoded = encode_texts([d.text for d in documents], tokenizer)
    for document, tokens in zip(documents, encoded, strict=True):
        ids = np.asarray(tokens.ids, dtype=np.int32)
        check_vocabulary(ids, n_vocabulary)
        learns = np.ones(len(ids), dtype=np.bool_)
        learns[:1] = False
        unlearnt = document.text[: tokens.first_end]
        n_bytes = len(document.text.encode()) - len(unlearnt.encode())
        yield Example(ids=ids, learns=learns, n_bytes=n_bytes, source=document.source)
