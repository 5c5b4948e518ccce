"""What a run feeds its model: tokenizer, rows to train on and rows held out, and the batch of every step.

Files become examples in `data/`; here a recipe's examples become its rows, and a step its batch.
Read `make_rows` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from frostline.data import Batch, Example, Rows, read_examples, rows_at, texts_of, train_byte_bpe
from frostline.data.templates import read_template
from frostline.errors import DataError
from frostline.model import load_config, load_tokenizer
from frostline.recipe import Recipe, TrainedTokenizer, source_names
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
    documents = list(texts_of(recipe.data, recipe.data.train))
    if not documents:
        raise DataError(f"no text to train on in {source_names(recipe.data.train)}")
    own = spec.vocab_size if isinstance(spec, TrainedTokenizer) else None
    return train_byte_bpe(documents, n_vocabulary=own or load_config(recipe.model).vocab_size)


def make_rows(recipe: Recipe, tokenizer: Any) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out. Raises `DataError` when there is too little text."""
    data, n_vocabulary = recipe.data, load_config(recipe.model).get_text_config().vocab_size
    rows = _rows(read_examples(data, data.train, tokenizer, n_vocabulary=n_vocabulary), data.length)
    needed = 2 if isinstance(data.held_out, float) else 1
    if len(rows) < needed:
        raise DataError(
            f"too little text: {source_names(data.train)} gives {len(rows.tokens)} tokens, and {needed} rows of "
            f"{data.length} need {needed * data.length + 1}"
        )
    if isinstance(data.held_out, float):
        return rows.split_end(data.held_out)
    held_out = _rows(read_examples(data, data.held_out, tokenizer, n_vocabulary=n_vocabulary), data.length)
    if not len(held_out):
        raise DataError(
            f"too little held-out text: {source_names(data.held_out)} gives {len(held_out.tokens)} tokens, and one row "
            f"of {data.length} needs {data.length + 1}"
        )
    return rows, held_out


def _rows(examples: Iterable[Example], length: int) -> Rows:
    """Examples one after another in one stream, cut into rows."""
    tokens = []
    for e in examples:
        if not e.learns[1:].all():
            raise DataError(f"{e.source}: rows of a stream learn every token; this example does not")
        tokens.append(torch.from_numpy(e.ids))
    return Rows(torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32), length)


def batches_of(recipe: Recipe, rows: Rows, device: torch.device) -> Callable[[int, Stage], list[Batch]]:
    """The pure function from a step to its micro-batches."""

    def batches(step: int, stage: Stage) -> list[Batch]:
        indices = rows_at(step, seed=recipe.seed, n_rows=len(rows), batch=recipe.data.batch)
        return rows.batch(indices).to(device).split(stage.spec.accumulate)

    return batches


def held_out_batches(recipe: Recipe, rows: Rows, device: torch.device) -> list[Batch]:
    """The first `eval.batches` held-out batches, the last one possibly smaller."""
    size = recipe.data.batch
    n = min(len(rows), size * recipe.eval.batches)
    return [rows.batch(range(at, min(at + size, n))).to(device) for at in range(0, n, size)]
