"""Which text a recipe trains on, and how it becomes rows of tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic.types import Strict

from frostline.recipe.base import Record

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (".txt", ".md", *DATA_SUFFIXES)
"""What is read from a folder; a file named by hand may have another suffix and is then read as text."""
COMPRESSED = (".gz", ".zst")
FormatName = Literal["auto", "text", "prompt", "messages", "sharegpt", "alpaca", "tokens"]


class SourceSpec(Record):
    """One of several sources, where a path alone does not say enough."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder, a folder that `datasets` saved, or a dataset's hub name (`owner/name`)."""
    weight: Annotated[float, Field(gt=0, le=1000, strict=False)] = 1.0
    """How often its examples come per epoch: 2 is twice, 0.5 half of them, always the same half."""
    format: FormatName | None = None
    """The format of this source; `data.format` when left out."""
    split: str | None = None
    """Which split of a saved or hub dataset; `train` when left out."""
    subset: str | None = None
    """Which configuration of a hub dataset."""
    revision: str | None = None
    """Which revision of a hub dataset (a commit)."""


def _path_or_source(value: object) -> str:
    return "a source" if isinstance(value, (dict, SourceSpec)) else "a path"


Source = Annotated[
    Annotated[str, Tag("a path")] | Annotated[SourceSpec, Tag("a source")], Discriminator(_path_or_source)
]
Sources = Annotated[tuple[Source, ...], Strict(False), Field(min_length=1)]
SOURCE_TAGS = ("a path", "a source")
"""What pydantic puts into the place of an error inside a source."""


def _share_or_files(value: object) -> str:
    return "files" if isinstance(value, (list, tuple)) else "share"


def one_or_many(value: object) -> object:
    """A single source as a list of one."""
    return (value,) if isinstance(value, (str, dict, SourceSpec)) else value


class DataSpec(Record):
    """Files in, rows of `length` tokens out."""

    train: Sources
    """A `.txt`, `.md`, `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file (also `.gz`, `.zst`), a folder of them, a
    saved dataset, a hub name, a source with settings of its own (`{path: a.jsonl, weight: 2}`), or a list of these."""
    held_out: Annotated[
        Annotated[Annotated[float, Field(gt=0, lt=1)], Tag("share")] | Annotated[Sources, Tag("files")],
        Discriminator(_share_or_files),
    ] = 0.05
    """The share of the training data kept for the held-out loss (the end of a stream; in other layouts documents spread
    evenly), or files of their own."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens per row."""
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Rows per optimizer step."""
    layout: Literal["stream", "packed", "padded", "flat"] | None = None
    """How documents become rows. `stream`: all in one stream, cut into rows. `packed`: rows that hold several whole
    ones, which do not see each other. `padded`: a row for each. `flat`: the `batch` documents of a step in one row,
    nothing padded. When left out: `stream` for texts of which everything learns, `packed` otherwise."""
    long: Literal["split", "truncate", "drop"] | None = None
    """What becomes of a document that is longer than a row, counted: pieces, its beginning, nothing. Not for `stream`.
    When left out: `split` where everything learns, `truncate` otherwise."""
    apart: Literal["auto", "calls", "mask"] = "auto"
    """How documents of one row are kept apart: attention called for each, or a mask over rows; `auto`: calls where a
    tiny model of this kind shows that they do, else the mask."""
    cache: str | None = None
    """The folder that keeps tokens, made once and mapped. When left out, inputs above 64 MB go to
    `$FROSTLINE_CACHE/tokens` or `~/.cache/frostline/tokens`, smaller ones stay in memory."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that make tokens for the cache; one per core when left out."""
    format: FormatName = "auto"
    """`text`, `prompt` (and completion), `messages`, `sharegpt`, `alpaca`, `tokens` (made elsewhere); `auto`: found for
    each file by its first row."""
    columns: dict[str, str] = Field(default={})
    """Columns under other names than the format's: `{prompt: question, completion: answer}`."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Of conversations: what the assistant says, its last turn, or everything. Of prompt and completion: the
    completion, unless `all`. Texts learn everything."""
    chat_template: str | None = None
    """A Jinja file in place of the tokenizer's own chat template; the saved tokenizer gets it."""
    template_args: dict[str, bool | int | float | str] = Field(default={})
    """Variables for the chat template: `{enable_thinking: false}`."""
    invalid: Literal["error", "drop"] = "error"
    """An example that cannot be read or learns nothing refuses the run (`error`) or is left out, counted (`drop`)."""
    undecodable: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: an error with the place, or U+FFFD in their stead."""

    _train_list = field_validator("train", mode="before")(one_or_many)
    _held_out_list = field_validator("held_out", mode="before")(one_or_many)

    @model_validator(mode="after")
    def _no_copies_of_what_is_held_out(self) -> DataSpec:
        if isinstance(self.held_out, float) and any(isinstance(s, SourceSpec) and s.weight != 1 for s in self.train):
            raise ValueError(
                "held_out: a share cannot be taken from a weighted mixture, where copies of what is held out would be "
                "trained on; name files of their own"
            )
        return self


def source_of(source: str | SourceSpec) -> SourceSpec:
    """A source with all its settings."""
    return source if isinstance(source, SourceSpec) else SourceSpec(path=source)


def data_sources(spec: DataSpec) -> tuple[SourceSpec, ...]:
    """Everything that the data come from, held out or not."""
    return tuple(map(source_of, (*spec.train, *(spec.held_out if isinstance(spec.held_out, tuple) else ()))))


def source_names(sources: tuple[str | SourceSpec, ...]) -> str:
    """The sources for a message."""
    return ", ".join(source_of(s).path for s in sources)


def is_hub_name(name: str) -> bool:
    """Whether a path that does not exist may name a dataset on a hub: `owner/name`, and no file's suffix."""
    plain = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return bool(plain) and Path(name).suffix.lower() not in (*SUFFIXES, *COMPRESSED)
