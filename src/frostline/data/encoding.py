"""Plain texts → tokens, as fast as the tokenizer goes.

A tokenizer's own call gives more than tokens: where each of them stands, as text, with masks. That costs as much again
as a third to a half of the tokens, so the library below it is asked for tokens alone where the call does nothing else
to them. Read `encode_texts` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Ids = np.ndarray[Any, np.dtype[np.int32]]

SETTINGS = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
"""Of the tokenizer's call: text that happens to read like a special token stays text."""
INNER = "_encode_plus"
"""The method that a tokenizer's call passes its texts to, in transformers 5.14 to 5.23: private, and where a tokenizer
with ways of its own has them. Nothing public tells."""
BEGINNING = 32
"""Characters that the place of a text's first token is looked for in."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text between the tokenizer's begin and end tokens, where it has them."""

    ids: Ids
    first_end: int
    """Characters of the text that the first token stands for: 0 where it is a begin token."""


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Each text as tokens. Text that happens to read like a special token stays text."""
    if not texts:
        return []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = _encoded(texts, tokenizer)
    ends = [0] * len(texts) if begin else _first_ends(texts, encoded, tokenizer)
    return [Tokens(np.array([*begin, *ids, *end], np.int32), first) for ids, first in zip(encoded, ends, strict=True)]


def _encoded(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if not only_calls_the_library(tokenizer):
        return list(tokenizer(list(texts), verbose=False, **SETTINGS)["input_ids"])
    tokenizer([""], verbose=False, **SETTINGS)  # sets what the library keeps: no padding, no cutting, special as text
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def only_calls_the_library(tokenizer: Any) -> bool:
    """Whether calling the tokenizer is what `transformers` itself does: the library's `encode_batch`, nothing more.

    Where that is not known, as with a `transformers` whose call goes another way, the answer is no, which costs time
    and no more.
    """
    kind, call = type(tokenizer), PreTrainedTokenizerBase.__call__
    inner = getattr(PreTrainedTokenizerFast, INNER, None)
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.__call__ is call
        and inner is not None
        and INNER in getattr(getattr(call, "__code__", None), "co_names", ())
        and getattr(kind, INNER, None) is inner
        and kind.backend_tokenizer is PreTrainedTokenizerFast.backend_tokenizer
    )


def _first_ends(texts: Sequence[str], encoded: Sequence[list[int]], tokenizer: Any) -> list[int]:
    """Where the first token of each text ends, from the beginning of the text: it is the same token at the same place
    when the token behind it is the same too, and a third stands between them and where the beginning was cut off. Else
    from the whole."""
    places = tokenizer([t[:BEGINNING] for t in texts], verbose=False, **SETTINGS)
    out = []
    for i, (text, ids, found) in enumerate(zip(texts, encoded, places["input_ids"], strict=True)):
        same = len(found) > 2 and found[:2] == ids[:2] and found[0] != tokenizer.unk_token_id
        if len(text) <= BEGINNING or same:
            out.append(_first_end(places, i, text))
        else:
            out.append(_first_end(tokenizer([text], verbose=False, **SETTINGS), 0, text))
    return out


def _first_end(encoded: Any, index: int, text: str) -> int:
    """Where the first token of a text ends; a tokenizer that knows no places is taken to begin with one character."""
    if not encoded["input_ids"][index]:
        return 0
    chars = encoded.token_to_chars(index, 0) if isinstance(encoded, BatchEncoding) and encoded.is_fast else None
    return int(chars.end) if chars is not None else min(1, len(text))
