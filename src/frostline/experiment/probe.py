"""A batch of real text to measure a model with."""

from __future__ import annotations

from typing import Any

from torch import nn

from frostline.data import Batch, Document, Rows, encode
from frostline.errors import DataError
from frostline.experiment.corpus import some_text

N_ROWS = 4
LENGTH = 128


def probe_batch(model: nn.Module, tokenizer: Any) -> Batch:
    """4 rows of at most 128 tokens of the language documentation. Raises `DataError` when that text is too short."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    tokens = encode([Document(some_text(), "pydoc_data.topics")], tokenizer, n_vocabulary=config.vocab_size)
    rows = Rows(tokens, length)
    if len(rows) < N_ROWS:
        raise DataError(f"the probe text gives {len(tokens)} tokens with this tokenizer, {N_ROWS * length} are needed")
    return rows.batch(range(N_ROWS))
