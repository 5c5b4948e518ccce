"""What a recipe's data, or a file, comes to: formats, counts, lengths, masks, duplicates and leaks. `frostline data`.

It reads the data as training does, through `read_examples`, and keeps counts and a hash per example, never the data.
Read `survey` first; `Survey` is what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data import Example, FileTally, Tally, read_examples
from frostline.data.counting import PAIRS, Counts, Same, count, histogram, leaks_between, quantiles
from frostline.data.templates import read_template
from frostline.errors import DataError
from frostline.feed import get_tokenizer, layout_of, long_of, spread
from frostline.model import load_config, load_tokenizer
from frostline.recipe import DataSpec, Recipe, SourceSpec
from frostline.run_folder import checkpoint_of

SHOWN_TOKENS = 400
"""Of one example, so many tokens are shown."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one kind."""

    text: str
    learns: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One example as a person sees it."""

    source: str
    n_tokens: int
    n_learning: int
    pieces: tuple[Piece, ...]
    is_cut: bool
    """Whether only its beginning is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The data that a run trains on, or those held out."""

    name: str
    files: tuple[FileTally, ...]
    n_examples: int
    n_tokens: int
    n_learning: int
    n_bytes: int
    """UTF-8 bytes that learning tokens stand for."""
    longest: int
    n_longer: int
    """Examples longer than a row."""
    fate: str
    """What becomes of them: the layout, and the policy for long ones."""
    lengths: tuple[tuple[int, int, int], ...]
    """(from, to, examples): tokens per example, `to` not included."""
    quantiles: tuple[int, int, int]
    """Tokens per example: half have at most so many, 90 %, 99 %."""
    n_duplicates: int
    """Examples equal to one before them, mask included."""
    duplicates: tuple[Same, ...]
    shown: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was found."""

    tokenizer: str
    n_vocabulary: int | None
    """Of the model; None where no model was named."""
    drops: bool
    """Whether what cannot be used is left out; else it refuses the run."""
    row_length: int | None
    """Tokens per row of the recipe; None for a bare file."""
    is_whole: bool
    """Whether everything was looked at."""
    parts: tuple[Part, ...]
    split: str
    """How the held-out part was chosen."""
    n_leaks: int
    """Held-out examples that are also trained on."""
    leaks: tuple[Same, ...]
    n_prompt_leaks: int
    """Held-out examples whose prompt is also trained on, with whatever answer; those that are the same throughout not
    counted again."""
    prompt_leaks: tuple[Same, ...]
    notes: tuple[str, ...]
    """What to know."""

    @property
    def n_refused(self) -> int:
        """Examples that would refuse the run."""
        return 0 if self.drops else sum(f.dropped for part in self.parts for f in part.files)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"schema": 1, **asdict(self), "n_refused": self.n_refused}


def survey(
    target: Recipe | DataSpec,
    *,
    tokenizer: str | None = None,
    examples: int = 3,
    limit: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """Look at the data of a recipe, or of a `DataSpec` with a tokenizer (folder, hub name or run folder).

    `examples`: so many are shown of each part; `limit`: only so many are looked at. Examples that cannot be used are
    counted, whatever the recipe makes of them. `say` is told how far reading is. Raises a `FrostlineError` for files
    that cannot be read.
    """
    keep: tuple[str | SourceSpec, ...] = ()
    if isinstance(target, Recipe):
        spec, keep = target.data, target.eval.keep or ()
        readable = target.model_copy(update={"data": spec.model_copy(update={"invalid": "drop"})})
        made = get_tokenizer(readable, trust_remote_code=trust_remote_code)
        n_vocabulary = int(load_config(target.model).get_text_config().vocab_size)
        name = str(made.name_or_path) or "trained on the data"
    elif tokenizer is None:
        raise DataError("which tokens a file becomes depends on the tokenizer: name one with --tokenizer")
    else:
        spec, name = target, tokenizer
        made = load_tokenizer(checkpoint_of(tokenizer), trust_remote_code=trust_remote_code)
        n_vocabulary = len(made)
    looking = _Looking(spec, made, n_vocabulary, examples, limit, say)
    return _survey(looking, name, keep, is_recipe=isinstance(target, Recipe))


@dataclass(frozen=True, slots=True)
class _Looking:
    """What is looked at, and how."""

    spec: DataSpec
    tokenizer: Any
    n_vocabulary: int
    examples: int
    limit: int | None
    say: Callable[[str], None]


def _survey(looking: _Looking, name: str, keep: tuple[str | SourceSpec, ...], *, is_recipe: bool) -> Survey:
    drops = looking.spec.invalid == "drop"
    spec = looking.spec.model_copy(update={"invalid": "drop"})  # all that is wrong, at once
    looking = replace(looking, spec=spec)
    sources = {"train" if is_recipe else "data": spec.train}
    if isinstance(spec.held_out, tuple):
        sources["held out"] = spec.held_out
    if keep:
        sources["keep"] = keep
    parts, counted, whole = [], [], True
    for part, paths in sources.items():
        made, counts, is_whole = _part(part, paths, looking)
        parts.append(made)
        counted.append(counts)
        whole = whole and is_whole
    has_held_out = is_recipe or isinstance(spec.held_out, tuple)
    trained, held_out = _sides(spec, counted, parts[0].fate) if has_held_out else ([], [])
    leaks = leaks_between(
        [(c.keys[i], c.sources[i]) for c, i in trained], [(c.keys[i], c.sources[i]) for c, i in held_out]
    )
    same = {p.source for p in leaks}
    prompts = leaks_between(
        [(c.prompts[i], c.sources[i]) for c, i in trained],
        [(c.prompts[i], c.sources[i]) for c, i in held_out if c.sources[i] not in same],
    )
    return Survey(
        tokenizer=name,
        n_vocabulary=looking.n_vocabulary if is_recipe else None,
        drops=drops,
        row_length=spec.length if is_recipe else None,
        is_whole=whole,
        parts=tuple(parts),
        split="" if not held_out else _split_words(spec, parts[0].fate, len(held_out)),
        n_leaks=len(leaks),
        leaks=tuple(leaks[:PAIRS]),
        n_prompt_leaks=len(prompts),
        prompt_leaks=tuple(prompts[:PAIRS]),
        notes=tuple(_notes(spec, looking.tokenizer, looking.n_vocabulary, parts)),
    )


def _part(name: str, paths: Iterable[str | Path | SourceSpec], looking: _Looking) -> tuple[Part, Counts, bool]:
    spec, tally, counts = looking.spec, Tally(), Counts()
    found = read_examples(spec, paths, looking.tokenizer, n_vocabulary=looking.n_vocabulary, tally=tally)
    shown: list[Shown] = []
    for example in islice(found, looking.limit):
        count(example, counts)
        if len(shown) < looking.examples:
            shown.append(show(example, looking.tokenizer))
        if len(counts.lengths) % 1000 == 0:
            looking.say(f"{name}: {len(counts.lengths):,} examples")
    is_whole = looking.limit is None or next(found, None) is None
    lengths = np.array(counts.lengths, dtype=np.int64)
    part = Part(
        name=name,
        fate=_fate(spec, tally, everything_learns=counts.n_learning == int(lengths.sum()) - len(lengths)),
        files=tuple(tally.files.values()),
        n_examples=len(lengths),
        n_tokens=int(lengths.sum()),
        n_learning=counts.n_learning,
        n_bytes=counts.n_bytes,
        longest=int(lengths.max(initial=0)),
        n_longer=int((lengths > spec.length).sum()),
        lengths=tuple(histogram(lengths)),
        quantiles=quantiles(lengths),
        n_duplicates=counts.n_duplicates,
        duplicates=tuple(counts.duplicates),
        shown=tuple(shown),
    )
    return part, counts, is_whole


def _fate(spec: DataSpec, tally: Tally, *, everything_learns: bool) -> str:
    layout = layout_of(spec, {f.format for f in tally.files.values()}, everything_learns=everything_learns)
    if layout == "stream":
        return "stream: one after another, cut into rows"
    return f"{layout}; longer than a row: {long_of(spec, everything_learns=everything_learns)}"


Places = list[tuple[Counts, int]]
"""Examples by what counted them and their index."""


def _sides(spec: DataSpec, counted: list[Counts], fate: str) -> tuple[Places, Places]:
    """What is trained on and what is held out, as training divides them."""
    train = counted[0]
    everything = [(train, i) for i in range(len(train.keys))]
    if not isinstance(spec.held_out, float):
        return everything, [(counted[1], i) for i in range(len(counted[1].keys))]
    if not fate.startswith("stream"):
        chosen = set(spread(len(everything), spec.held_out).tolist())
        return [p for p in everything if p[1] not in chosen], [p for p in everything if p[1] in chosen]
    ends = np.cumsum(train.lengths)
    n_rows = max(0, (int(ends[-1]) - 1) // spec.length) if len(ends) else 0
    cut = (n_rows - max(1, round(n_rows * spec.held_out))) * spec.length + 1
    return (
        [p for p in everything if ends[p[1]] - train.lengths[p[1]] < cut],
        [
            p for p in everything if ends[p[1]] > cut
        ],  # a text that the cut runs through is on both sides, but not a leak
    )


def _split_words(spec: DataSpec, fate: str, n: int) -> str:
    if not isinstance(spec.held_out, float):
        return "files of their own"
    how = "the end of the stream" if fate.startswith("stream") else "spread evenly over the examples"
    return f"{spec.held_out:.4g} of the data, {how}: {n:,} of them"


def show(example: Example, tokenizer: Any) -> Shown:
    """An example's text in pieces that learn and pieces that do not."""
    n = min(len(example.ids), SHOWN_TOKENS)
    cuts = [0, *(i for i in range(1, n) if example.learns[i] != example.learns[i - 1]), n]
    texts = [tokenizer.decode(example.ids[:c].tolist(), clean_up_tokenization_spaces=False) for c in cuts]
    pieces = [
        Piece(texts[i + 1][len(texts[i]) :], bool(example.learns[cuts[i]]))
        for i in range(len(cuts) - 1)
        if cuts[i] < cuts[i + 1]
    ]
    return Shown(
        source=example.source,
        n_tokens=len(example.ids),
        n_learning=int(example.learns.sum()),
        pieces=tuple(pieces),
        is_cut=n < len(example.ids),
    )


def _notes(spec: DataSpec, tokenizer: Any, n_vocabulary: int, parts: Iterable[Part]) -> Iterator[str]:
    """What is no error and yet worth knowing."""
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no end token: texts run into each other without a mark"
    if len(tokenizer) > n_vocabulary:
        yield (
            f"the tokenizer has {len(tokenizer)} tokens and the model {n_vocabulary}: a text that uses another "
            "is refused"
        )
    files = [f for part in parts for f in part.files]
    template = spec_template(spec, tokenizer)
    if any(f.methods for f in files) and "strftime_now" in template:
        yield "the chat template writes today's date; here that is always 26 Jul 2024, so that a run can be repeated"
    for f in files:
        if f.left_out:
            yield f"{f.path}: messages whose text the chat template leaves out, or changes: {f.left_out:,}"
        if f.control_in_text:
            yield f"{f.path}: messages with a control token in their own text: {f.control_in_text:,}"
        if not f.rows:
            yield f"{f.path}: holds nothing"


def spec_template(spec: DataSpec, tokenizer: Any) -> str:
    """The text of the chat template in use; empty without one."""
    if spec.chat_template is not None:
        return read_template(spec.chat_template)
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
