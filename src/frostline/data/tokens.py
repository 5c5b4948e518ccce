"""Documents → one stream of tokens → rows of fixed length; and a tokenizer trained on documents.

Rows are cut from the stream without gaps. A row has `length` inputs and `length` targets, the targets one token
ahead, so that every token of the rows but the first is a target exactly once; tokens at the end that do not fill a row
are left over. Read `Rows` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from frostline.data.batch import Batch
from frostline.data.encoding import encode_texts
from frostline.data.text import Document
from frostline.errors import DataError

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Rows:
    """A stream of tokens cut into rows."""

    tokens: torch.Tensor
    """(tokens,), int32."""
    length: int
    """Tokens per row."""
    learns: torch.Tensor | None = None
    """(tokens,), uint8: 1 where a token counts as a target; None where all do."""

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, in that order."""
        indices = tuple(map(int, indices))
        starts = torch.tensor(indices, dtype=torch.long) * self.length
        at = starts[:, None] + torch.arange(self.length + 1)
        window = self.tokens[at].long()
        labels = window[:, 1:].clone(memory_format=torch.contiguous_format)  # of one row, `contiguous` is a view
        if self.learns is not None:
            labels[self.learns[at[:, 1:]] == 0] = -100
        return Batch(input_ids=window[:, :-1].contiguous(), labels=labels, indices=indices)

    def split_end(self, share: float) -> tuple[Rows, Rows]:
        """Rows without their end, and the end: `share` of the rows, at least one."""
        n_end = max(1, round(len(self) * share))
        cut = (len(self) - n_end) * self.length
        first, last = slice(None, cut + 1), slice(cut, None)
        learns = (None, None) if self.learns is None else (self.learns[first], self.learns[last])
        return Rows(self.tokens[first], self.length, learns[0]), Rows(self.tokens[last], self.length, learns[1])


def encode(documents: Iterable[Document], tokenizer: Any, *, n_vocabulary: int) -> torch.Tensor:
    """One stream of tokens, int32: each document between the tokenizer's begin and end tokens, where it has them.

    Raises `DataError` when a token lies outside the model's vocabulary of `n_vocabulary`.
    """
    texts = [d.text for d in documents]
    if not texts:
        return torch.empty(0, dtype=torch.int32)
    tokens = np.concatenate([t.ids for t in encode_texts(texts, tokenizer)])
    check_vocabulary(tokens, n_vocabulary)
    return torch.from_numpy(tokens)


def check_vocabulary(ids: np.ndarray[Any, np.dtype[np.int32]], n_vocabulary: int) -> None:
    """Raise `DataError` when a token lies outside the model's vocabulary."""
    if len(ids) and int(ids.max()) >= n_vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(ids.max())}, but the model's vocabulary has {n_vocabulary} entries: "
            "they do not belong together"
        )


def train_byte_bpe(
    documents: Iterable[Document], *, n_vocabulary: int, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `n_vocabulary` entries, trained on the documents."""
    special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
    if n_vocabulary < 256 + len(special):
        raise DataError(
            f"a byte-level tokenizer needs a vocabulary of at least {256 + len(special)}, not {n_vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
