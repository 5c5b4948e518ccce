"""Text with spans to learn → tokens with a mask.

A text is tokenised as a whole, as it will be when the model is used, and a token learns where it overlaps a span by one
character or more: so that a token which takes a space from the prompt along still learns the word it carries.
Read `encode_spans` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Written:
    """A text with what is learnt of it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """In characters."""
    source: str
    is_chat: bool
    """Written by a chat template, control tokens and all; else plain text, which gets the begin and end tokens."""


@dataclass(frozen=True, slots=True)
class Masked:
    """Tokens with what is learnt of them; the first never is."""

    ids: Ids
    learns: Mask
    n_bytes: int
    """UTF-8 bytes of the text that learning tokens stand for; control tokens stand for none."""


def encode_spans(written: Sequence[Written], tokenizer: Any, *, is_chat: bool) -> list[Masked]:
    """Each text's tokens. In plain text, what reads like a special token stays text, and the end token learns."""
    if not written:
        return []
    texts = [w.text for w in written]
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not is_chat,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        verbose=False,
    )
    control = np.array(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}), dtype=np.int64)
    out = []
    for i, w in enumerate(written):
        ids = np.array(encoded["input_ids"][i], dtype=np.int64)
        places = _places(encoded["offset_mapping"][i]) if fast else _places_by_prefix(ids, w, tokenizer, is_chat)
        learns = _overlapping(places, w.spans)
        if not is_chat:
            ids, learns, places = _between_ends(ids, learns, places, tokenizer)
        learns[:1] = False
        own = learns & ~np.isin(ids, control) if is_chat else learns
        if fast:
            n_bytes = _n_bytes(w.text, places[own])
        else:
            n_bytes = len(tokenizer.decode(ids[own].tolist(), skip_special_tokens=not is_chat).encode())
        out.append(Masked(ids.astype(np.int32), learns, n_bytes))
    return out


def _places(offsets: Sequence[tuple[int, int]]) -> Places:
    """(tokens, 2): where each token begins and ends. What tokens leave out, such as white space that a tokenizer trims
    from its places, belongs to the token after it."""
    if not len(offsets):
        return np.empty((0, 2), dtype=np.int64)
    places = np.array(offsets, dtype=np.int64)
    ends = np.maximum.accumulate(places[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    starts = np.minimum(places[:, 0], before)
    return np.stack([starts, np.maximum(ends, starts)], axis=1)


def _places_by_prefix(ids: Places, written: Written, tokenizer: Any, is_chat: bool) -> Places:
    """Places of a tokenizer that does not tell them, exact only at the ends of spans: a beginning of the text gives the
    same tokens up to the one that the cut runs through."""
    places = np.zeros((len(ids), 2), dtype=np.int64)
    settings = {"add_special_tokens": False, "split_special_tokens": not is_chat}
    known = []
    for cut in sorted({c for span in written.spans for c in span} | {len(written.text)}):
        part = tokenizer(written.text[:cut], verbose=False, **settings)["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))
        known.append((cut, same, same < len(part)))
    for cut, n_before, runs_through in known:
        places[n_before + runs_through :, 0] = cut
    for cut, n_before, _ in reversed(known):
        places[:n_before, 1] = cut
    return places


def _overlapping(places: Places, spans: Sequence[tuple[int, int]]) -> Mask:
    learns = np.zeros(len(places), dtype=np.bool_)
    for start, end in spans:
        learns |= (places[:, 0] < end) & (places[:, 1] > start)
    return learns


def _between_ends(ids: Places, learns: Mask, places: Places, tokenizer: Any) -> tuple[Places, Mask, Places]:
    """With the tokenizer's begin and end tokens, where it has them; the end learns, and neither stands for text."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return (
        np.concatenate([np.array(begin, np.int64), ids, np.array(end, np.int64)]),
        np.concatenate([np.zeros(len(begin), np.bool_), learns, np.ones(len(end), np.bool_)]),
        np.pad(places, ((len(begin), len(end)), (0, 0))),
    )


def _n_bytes(text: str, places: Places) -> int:
    """UTF-8 bytes of the characters that lie in any of the places, each counted once."""
    if not len(places):
        return 0
    depth = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(depth, places[:, 0], 1)
    np.add.at(depth, places[:, 1], -1)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return int(sizes[np.cumsum(depth)[:-1] > 0].sum())
