"""What every command shares: the app, options, errors, output. Exit codes stand in `errors.py`."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from frostline.errors import DataError, FrostlineError

if TYPE_CHECKING:
    from frostline.recipe import DataSpec

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Train decoder-only language models while deciding exactly what learns and when, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A model folder, hub name, config.json or run folder.", metavar="MODEL")]
RecipeName = Annotated[
    Path, typer.Argument(help="A recipe: a file, or a name that `frostline recipes` lists.", metavar="RECIPE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless typed.")
]
Reading = Annotated[
    list[str] | None,
    typer.Option("--set", help="With --data, how it is read: data.chat_template=FILE.", metavar="KEY=VALUE"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: stages[0].lr=1e-4.", metavar="KEY=VALUE")
]
INTERRUPTED_TWICE = 130
INTERRUPTED = 75


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"frostline {version('frostline')}")
        raise typer.Exit


@app.callback()
def _every_command(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train decoder-only language models while deciding exactly what learns and when, and prove it."""


def main() -> None:
    """The `frostline` command."""
    # threads that wait sleep after a moment: as fast on an idle machine, a third faster on a shared one, where waiting
    # awake keeps others from computing (must be set before torch)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓ must not end a passing run
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_TWICE)


def errors_for_people(command: Callable[P, R]) -> Callable[P, R]:
    """Print a `FrostlineError`, or that a path cannot be looked at, without a traceback, and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FrostlineError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EACCES) or error.filename is None:
                raise
            typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
            raise typer.Exit(FrostlineError.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED_TWICE) from None

    return wrapped


def data_settings(file: str, overrides: list[str]) -> DataSpec:
    """The section `data` of a recipe that only has this file, with `--set data.KEY=VALUE`."""
    from frostline.recipe.load import data_of_file

    wrong = [o for o in overrides if not o.startswith("data.")]
    if wrong:
        raise DataError(f"--set {wrong[0]}: of a file, only keys of `data` can be set")
    return data_of_file(file, overrides=overrides)


def reading_settings(files: list[Path] | None, overrides: list[str] | None) -> DataSpec | None:
    """How files that are measured are read; None without `--set`. Keys of a recipe that only say in what rows it trains
    are refused: here they would do nothing."""
    from frostline.data.token_files import NOT_FOR_TOKENS

    if not overrides:
        return None
    if not files:
        raise DataError(f"--set {overrides[0]} says how files are read: give --data too")
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key.removeprefix("data.") in NOT_FOR_TOKENS:
            raise DataError(f"--set {text}: {key} does not change which tokens a file has, and here only these count")
    return data_settings(str(files[0]), overrides)


class _Lines(Console):
    """A console that falls silent when nobody reads it any more (`frostline train … | head -1`): the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if self.stderr else sys.stdout).fileno())


def make_console(*, stderr: bool = False) -> Console:
    """Where to print for people."""
    # `experts[top 4 by tokens]` is no style and `:a:` no picture
    made = partial(_Lines, stderr=stderr, markup=False, emoji=False)
    console = made()
    return console if console.is_terminal else made(width=160)  # a pipe has no width: nothing is cut off


def print_json(data: Any) -> None:
    """Print for programs; NaN and infinity are a bug of ours."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
