"""Which text a recipe trains on, and how it becomes rows of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic.types import Strict

from frostline.recipe.base import Record

Paths = Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]


def _share_or_files(value: object) -> str:
    return "files" if isinstance(value, (list, tuple)) else "share"


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class DataSpec(Record):
    """Text files in, rows of `length` tokens out."""

    train: Paths
    """A `.txt`, `.md` or `.jsonl` file (rows with `text`), a folder of them, or a list of these."""
    held_out: Annotated[
        Annotated[Annotated[float, Field(gt=0, lt=1)], Tag("share")] | Annotated[Paths, Tag("files")],
        Discriminator(_share_or_files),
    ] = 0.05
    """The share of the training tokens kept for the held-out loss (its end), or files of their own."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens per row."""
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Rows per optimizer step."""

    _train_list = field_validator("train", mode="before")(_one_or_many)
    _held_out_list = field_validator("held_out", mode="before")(_one_or_many)
