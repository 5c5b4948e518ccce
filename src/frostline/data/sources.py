"""The sources of a recipe → shapes: files found, formats detected, bad rows counted or refused, mixtures weighted.

Every file is one format, given or found by its first row. `Tally` remembers what was found and left out, for whoever
wants to say it. Read `shapes_of` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from frostline.data.files import (
    Row,
    RowError,
    files_of,
    is_saved_dataset,
    rows_of,
    saved_dataset_rows,
)
from frostline.data.formats import Pair, Shape, detect, shape, unpacked, with_columns
from frostline.data.messages import Conversation
from frostline.data.stored import hub_files, hub_rows
from frostline.data.text import Document
from frostline.errors import DataError
from frostline.randomness import derive_seed
from frostline.recipe import DataSpec, SourceSpec, data_sources, source_of
from frostline.recipe.data_spec import is_hub_name


def files_to_hash(spec: DataSpec, *more: str | SourceSpec) -> tuple[str, ...]:
    """Every file or folder that decides what the data (and `more`) are, chat template included; of hub datasets the
    downloads."""
    paths: list[str] = []
    for source in (*data_sources(spec), *map(source_of, more)):
        if not Path(source.path).exists() and is_hub_name(source.path):
            paths += hub_files(source.path, split=source.split, subset=source.subset, revision=source.revision)
        else:
            paths.append(source.path)
    return tuple(dict.fromkeys([*paths, *([spec.chat_template] if spec.chat_template else [])]))


SHOWN = 20
"""Of what was dropped, so many are remembered one by one."""


@dataclass(slots=True)
class FileTally:
    """What was found in one file or stored dataset."""

    path: str
    format: str = ""
    also: tuple[str, ...] = ()
    """Formats that its first row would fit too."""
    given: bool = False
    """Whether the recipe said the format."""
    rows: int = 0
    examples: int = 0
    blank: int = 0
    """Texts of nothing but white space, left out."""
    dropped: int = 0
    """Examples that could not be used, left out because `data.invalid` is `drop`."""
    methods: dict[str, int] = field(default_factory=dict)
    """How the assistant's turns were found in the text → how many: `marks`, `prefix`, `content`, `all`."""
    roles: dict[str, int] = field(default_factory=dict)
    """Of conversations: role → messages."""
    with_tools: int = 0
    """Conversations that come with functions to call."""
    left_out: int = 0
    """Messages whose text the chat template does not write as it is: left out, or cut."""
    control_in_text: int = 0
    """Messages whose own text holds a control token, which the model will take for one."""
    reasons: list[str] = field(default_factory=list)
    """Why, for the first of them."""


@dataclass(slots=True)
class Tally:
    """What reading found, file by file; copies of a weighted mixture are not counted again."""

    files: dict[str, FileTally] = field(default_factory=dict)

    def of(self, path: str) -> FileTally:
        """The tally of one file."""
        return self.files.setdefault(path, FileTally(path))


def found_lines(files: Iterable[FileTally]) -> list[str]:
    """What files were, one line per format, and what of them was left out."""
    by_format: dict[str, list[FileTally]] = {}
    for f in files:
        by_format.setdefault(f.format or "nothing", []).append(f)
    out = []
    for name, group in by_format.items():
        where = group[0].path if len(group) == 1 else f"{len(group):,} files, from {group[0].path}"
        out.append(f"data: {name}, {sum(f.examples for f in group):,} examples ({where})")
        also = {a for f in group for a in f.also}
        if also:
            out[-1] += f"; also fits: {', '.join(sorted(also))} (`data.format` decides)"
        for what, n in (("blank", sum(f.blank for f in group)), ("dropped", sum(f.dropped for f in group))):
            out[-1] += f"; {n:,} {what}" if n else ""
        out += [f"dropped: {reason}" for f in group for reason in f.reasons[:3]][:3]
    return out


@dataclass(slots=True)
class Found:
    """A shape, where it came from, and what to do when it cannot be used after all."""

    shape: Shape
    tally: FileTally
    invalid: str

    def refuse(self, error: RowError) -> None:
        """Count it as dropped, or raise the error."""
        drop(self.tally, self.invalid, error)
        self.tally.examples -= 1


def drop(tally: FileTally, invalid: str, error: RowError) -> None:
    """Count what cannot be used, or raise the error, as the recipe says."""
    if invalid != "drop":
        raise error
    tally.dropped += 1
    if len(tally.reasons) < SHOWN:
        tally.reasons.append(str(error))


def shapes_of(spec: DataSpec, sources: Iterable[str | Path | SourceSpec], tally: Tally) -> Iterator[Found]:
    """Every shape of the sources, in their order; copies of a weighted mixture come in further passes over all.

    Raises `DataError` for what cannot be read.
    """
    all_sources = [source_of(s if isinstance(s, SourceSpec) else str(s)) for s in sources]
    for turn in range(math.ceil(max((s.weight for s in all_sources), default=0.0))):
        counted = tally if turn == 0 else Tally()
        for at, source in enumerate(all_sources):
            if source.weight > turn:
                yield from _of_turn(source, _of_source(spec, source, counted), turn, at)


def _of_turn(source: SourceSpec, found: Iterator[Found], turn: int, at: int) -> Iterator[Found]:
    """Those that come in a pass: all, or where the weight's last whole number is passed, the share that is left."""
    share = source.weight - turn
    if share >= 1:
        yield from found
        return
    for i, one in enumerate(found):
        if derive_seed(0, "mixture", at, i) < share * 2**63:
            yield one
        else:
            one.tally.examples -= 1 if turn == 0 else 0


def _of_source(spec: DataSpec, source: SourceSpec, tally: Tally) -> Iterator[Found]:
    path, wanted = Path(source.path), source.format or spec.format
    if is_saved_dataset(path):
        yield from _of_rows(saved_dataset_rows(path, split=source.split), spec, wanted, tally.of(source.path))
    elif not path.exists() and is_hub_name(source.path):
        rows = hub_rows(source.path, split=source.split, subset=source.subset, revision=source.revision)
        named = (Row(values, f"{source.path}[{i}]") for i, values in enumerate(rows))
        yield from _of_rows(named, spec, wanted, tally.of(source.path))
    else:
        for file in files_of(path):
            yield from _of_rows(rows_of(file, errors=spec.undecodable), spec, wanted, tally.of(str(file)))


def _of_rows(rows: Iterator[Row | RowError], spec: DataSpec, wanted: str, tally: FileTally) -> Iterator[Found]:
    """The shapes of one file."""
    tally.format, tally.given = ("", False) if wanted == "auto" else (wanted, True)
    for row in rows:
        tally.rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            if row.is_text and tally.given and wanted != "text":
                raise DataError(f"{row.source}: a text file cannot hold the format {wanted}")
            renamed = unpacked(with_columns(row, spec.columns))
            if not tally.format:
                tally.format, tally.also = detect(renamed)
            made = shape(renamed, tally.format)
        except RowError as error:
            drop(tally, spec.invalid, error)
            continue
        if isinstance(made, Document) and not made.text.strip():
            tally.blank += 1
            continue
        tally.examples += 1
        yield Found(made, tally, spec.invalid)


def texts_of(spec: DataSpec, sources: Iterable[str | Path | SourceSpec]) -> Iterator[Document]:
    """Everything written in the sources, for training a tokenizer. Raises `DataError` where they hold tokens."""
    for found in shapes_of(spec, sources, Tally()):
        made = found.shape
        if isinstance(made, Document):
            yield made
        elif isinstance(made, Conversation):
            for message in made.messages:
                if message.get("content"):
                    yield Document(message["content"], made.source)
        elif isinstance(made, Pair):
            yield Document(made.prompt + made.completion, made.source)
        else:
            raise DataError(f"{made.source}: no tokenizer can be trained on tokens; name the one that made them")
