"""What a person sees of data in the terminal: formats, counts, lengths, and examples with what learns in colour.

Renders; never computes. Where there is no colour, what learns stands between ⟦ and ⟧.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from frostline.data import FileTally
from frostline.data.counting import Same
from frostline.survey import Part, Shown, Survey
from frostline.units import format_bytes, format_share

LEARNS, FROZEN = "#0b3d1e on #bfe8c9", "grey62"
BAR = "█"
WIDTH = 40
METHODS = {
    "marks": "by the template's marks",
    "prefix": "by rendering up to them",
    "content": "by exchanging what they say",
    "all": "as a whole",
}
"""How turns of the assistant were found in the text."""


def print_survey(console: Console, survey: Survey) -> None:
    """All of it."""
    console.print(f"tokenizer: {survey.tokenizer}", highlight=False, soft_wrap=True)
    for part in survey.parts:
        console.print()
        console.print(_files(part))
        for line in _counts(part, survey):
            console.print(line, highlight=False, soft_wrap=True)
        _lengths(console, part)
        for line in same_lines(part.n_duplicates, part.duplicates, "example", "that stood before", "="):
            console.print(line, highlight=False, soft_wrap=True)
        for shown in part.shown:
            console.print()
            console.print(_title(shown), highlight=False, soft_wrap=True)
            console.print(_masked(shown, colour=console.color_system is not None), soft_wrap=True, highlight=False)
    console.print()
    for line in leak_lines(survey):
        console.print(line, highlight=False, soft_wrap=True)
    for note in survey.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _files(part: Part) -> Table:
    table = Table(title=part.name, title_justify="left", title_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("format", overflow="fold")
    for name in ("rows", "examples", "blank", "not usable"):
        table.add_column(name, justify="right")
    for f in part.files:
        table.add_row(f.path, format_of(f), f"{f.rows:,}", f"{f.examples:,}", f"{f.blank:,}", f"{f.dropped:,}")
    return table


def format_of(file: FileTally) -> str:
    """The format found, and how sure that is."""
    if not file.format:
        return "none found"
    also = f" (also fits: {', '.join(file.also)})" if file.also else ""
    return file.format + (" (as given)" if file.given else also)


def _counts(part: Part, survey: Survey) -> Iterator[str]:
    half, most, nearly = part.quantiles
    yield (
        f"{plural(part.n_examples, 'example')}, {part.n_tokens:,} tokens, of which {part.n_learning:,} learn "
        f"({format_share(part.n_learning, part.n_tokens)}) and stand for {format_bytes(part.n_bytes)} of text"
        if part.n_tokens
        else "nothing to learn from"
    )
    if part.n_tokens:
        yield f"tokens per example: half ≤ {half:,}, 90 % ≤ {most:,}, 99 % ≤ {nearly:,}, longest {part.longest:,}"
    if survey.row_length is not None and part.n_tokens:
        yield f"layout: {part.fate} ({plural(part.n_longer, 'example')} longer than {survey.row_length:,} tokens)"
    for f in part.files:
        yield from conversation_lines(f)
        yield from (f"{'dropped' if survey.drops else 'refused'}: {reason}" for reason in f.reasons)
        if f.dropped > len(f.reasons):
            yield f"… and {f.dropped - len(f.reasons):,} more"


def conversation_lines(file: FileTally) -> Iterator[str]:
    """What the conversations of a file are made of, and how their masks were found."""
    if file.roles:
        roles = ", ".join(f"{n:,} {role}" for role, n in file.roles.items())
        yield f"messages: {roles}" + (f"; {file.with_tools:,} conversations with tools" if file.with_tools else "")
    if file.methods:
        yield "turns found: " + ", ".join(f"{n:,} {METHODS.get(m, m)}" for m, n in file.methods.items())


def _lengths(console: Console, part: Part) -> None:
    most = max((n for _, _, n in part.lengths), default=0)
    for start, end, n in part.lengths:
        bar = BAR * max(round(n / most * WIDTH), 1 if n else 0)
        console.print(f"{f'{start:,}–{end - 1:,}':>15} {bar} {n:,}", highlight=False)


def same_lines(n: int, pairs: Sequence[Same], thing: str, rest: str, sign: str) -> Iterator[str]:
    """A count with the first places; nothing when there are none."""
    if n:
        yield f"{plural(n, thing)} {rest}"
        yield from (f"  {p.source} {sign} {p.other}" for p in pairs)
        if n > len(pairs):
            yield f"  … and {n - len(pairs):,} more"


def leak_lines(survey: Survey) -> Iterator[str]:
    """What is held out and trained on all the same."""
    if survey.split:
        yield f"held out: {survey.split}"
    if survey.split and not survey.n_leaks and not survey.n_prompt_leaks:
        yield "leaks: none; no held-out example, and no prompt of one, is trained on"
    yield from same_lines(survey.n_leaks, survey.leaks, "held-out example", "trained on too", "=")
    yield from same_lines(
        survey.n_prompt_leaks, survey.prompt_leaks, "held-out prompt", "trained on with another answer", "≈"
    )
    if not survey.is_whole:
        yield "looked at only so many examples as --limit says: there may be more of everything"


def _title(shown: Shown) -> Text:
    cut = ", the beginning" if shown.is_cut else ""
    return Text(f"{shown.source}: {shown.n_tokens:,} tokens, {shown.n_learning:,} learn{cut}", style="bold")


def _masked(shown: Shown, *, colour: bool) -> Text:
    out = Text()
    for i, piece in enumerate(shown.pieces):
        visible = piece.text.replace("\n", "↵\n")
        if i == len(shown.pieces) - 1:
            visible = visible.removesuffix("\n")
        if colour:
            out.append(visible, style=LEARNS if piece.learns else FROZEN)
        else:
            out.append(f"⟦{visible}⟧" if piece.learns else visible)
    if shown.is_cut:
        out.append(" …")
    return out


def plural(n: int, thing: str) -> str:
    """`1 example`, `2 examples`."""
    return f"{n:,} {thing}" + ("s" if n != 1 else "")
