"""Comparing strategies over seeds: one public call, its page and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.app import (
    INTERRUPTED,
    AsJson,
    Overrides,
    RemoteCode,
    app,
    errors_for_people,
    make_console,
    print_json,
)
from frostline.errors import RecipeError


@app.command(rich_help_panel="Runs")
@errors_for_people
def compare(
    comparison: Annotated[
        Path, typer.Argument(help="A comparison file, or one of the package: scratch-ffn.", metavar="COMPARISON")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder of its runs; called again, it goes on there.")],
    seeds: Annotated[
        str | None, typer.Option(help="In place of the file's: how many from 0 on, or which: 0,3,7.", metavar="SEEDS")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="In place of the file's: what the others are held against.", metavar="STRATEGY")
    ] = None,
    overrides: Overrides = None,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Resume runs although software or machine differ.")
    ] = False,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train strategies with several seeds each, and say which differ: by interval, at equal steps and equal FLOPs."""
    from frostline.experiment.compare import compare as compare_runs
    from frostline.experiment.compare_words import comparison_markdown
    from frostline.experiment.comparison_page import write_comparison
    from frostline.terminal_compare import ComparisonLines, print_comparison

    console = make_console(stderr=as_json or markdown)
    with ComparisonLines(console) as lines:
        found = compare_runs(
            comparison,
            out=out,
            overrides=overrides or (),
            seeds=_seeds(seeds),
            baseline=baseline,
            observers=[lines],
            tell=lines.tell,
            allow_inexact=allow_inexact,
            trust_remote_code=trust_remote_code,
        )
    page = write_comparison(found, out)
    if as_json:
        print_json(found.to_json())
    elif markdown:
        typer.echo(comparison_markdown(found))
    else:
        print_comparison(console, found)
        console.print(f"written: {page or out / 'comparison.json'}", soft_wrap=True, highlight=False)
    if not found.finished:
        again = f"frostline compare {comparison} --out {out}"
        typer.echo(f"interrupted, and saved; go on with the same command: {again}", err=True)
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if found.sound else 1)


def _seeds(text: str | None) -> int | list[int] | None:
    """`3` → three from 0 on; `0,3,7` → these. Raises `RecipeError`."""
    if text is None:
        return None
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words or not all(w.isdecimal() for w in words):
        raise RecipeError(f"--seeds {text}: write how many (3), or which (0,3,7)")
    return int(words[0]) if "," not in text else [int(w) for w in words]
