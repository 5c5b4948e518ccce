"""Runs: train, resume, audit, report, export. Each command is one public call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from frostline.cli.app import (
    INTERRUPTED,
    AsJson,
    Overrides,
    RecipeName,
    RemoteCode,
    app,
    errors_for_people,
    make_console,
    print_json,
)
from frostline.errors import ModelError

if TYPE_CHECKING:
    from frostline.run import RunResult

_EXIT = {"passed": 0, "interrupted": INTERRUPTED, "failed": 1}
"""Verdict of an audit → exit code."""


@app.command(rich_help_panel="Runs")
@errors_for_people
def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="The run folder to write; must not exist or be empty.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train as a recipe says, and audit the run."""
    from frostline.recipe import load_recipe
    from frostline.run import train as train_run
    from frostline.terminal_progress import ProgressLines

    console = make_console(stderr=as_json)
    loaded = load_recipe(recipe, overrides=overrides or [])
    with ProgressLines(console) as progress:
        result = train_run(
            loaded,
            out=out,
            observers=[progress],
            trust_remote_code=trust_remote_code,
            say=lambda line: console.print(line, soft_wrap=True, highlight=False),
        )
    _end_of_run(result, console, as_json=as_json)


@app.command(rich_help_panel="Runs")
@errors_for_people
def resume(
    run_folder: Annotated[Path, typer.Argument(help="A run folder that was interrupted or killed.", metavar="RUN")],
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Go on although software, machine or data differ.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Go on with a run, to the bytes it would have had without the stop."""
    from frostline.resume import resume as resume_run
    from frostline.terminal_progress import ProgressLines

    console = make_console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    with ProgressLines(console) as progress:
        result = resume_run(
            run_folder,
            allow_inexact=allow_inexact,
            observers=[progress],
            trust_remote_code=trust_remote_code,
            say=say,
        )
    _end_of_run(result, console, as_json=as_json)


@app.command(rich_help_panel="Runs")
@errors_for_people
def audit(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")], as_json: AsJson = False
) -> None:
    """Read a run folder and say whether what was asked is what happened."""
    from frostline.audit import audit as audit_run
    from frostline.audit import audit_to_json
    from frostline.terminal import print_audit

    result = audit_run(run_folder)
    if as_json:
        print_json(audit_to_json(result))
    else:
        print_audit(make_console(), result)
    raise typer.Exit(_EXIT[result.verdict])


@app.command(rich_help_panel="Runs")
@errors_for_people
def report(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option("--out", help="The page to write; RUN/report.html when left out.")] = None,
) -> None:
    """Write one self-contained page about a run; the exit code is that of its audit."""
    from frostline.audit import audit as audit_run
    from frostline.experiment.report import write_report

    audited = audit_run(run_folder)
    typer.echo(f"report: {write_report(run_folder, to=out, audited=audited)}")
    raise typer.Exit(_EXIT[audited.verdict])


@app.command(rich_help_panel="Runs")
@errors_for_people
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run folder.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="The folder to write, or with --delta the file.", metavar="OUT")],
    delta: Annotated[bool, typer.Option("--delta", help="Only what learned, as one small file.")] = False,
) -> None:
    """Write a finished run's model as a standard folder with a model card, or what learned as a file."""
    from frostline.deltas import export_delta
    from frostline.export import export_run

    typer.echo(f"written: {(export_delta if delta else export_run)(run_folder, out)}")


@app.command(rich_help_panel="Runs")
@errors_for_people
def apply(
    base: Annotated[str, typer.Argument(help="The model the deltas belong to.", metavar="BASE")],
    deltas: Annotated[list[Path], typer.Argument(help="Files of `export --delta`, then the folder to write.")],
    trust_remote_code: RemoteCode = False,
) -> None:
    """Put deltas into the base they belong to: frostline apply BASE DELTA… OUT."""
    from frostline.deltas import apply_deltas

    *files, out = deltas
    if not files:
        raise ModelError("give at least one delta, and then the folder to write: frostline apply BASE DELTA… OUT")
    typer.echo(f"written: {apply_deltas(base, files, out, trust_remote_code=trust_remote_code)}")


def _end_of_run(result: RunResult, console: Console, *, as_json: bool) -> NoReturn:
    """Say how a run ended, and exit accordingly."""
    from frostline.audit import audit_to_json
    from frostline.experts import experts_of_run
    from frostline.run_folder import RunFolder
    from frostline.terminal import print_audit
    from frostline.terminal_moe import print_histories
    from frostline.terminal_plan import print_checks

    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "state": result.state,
                "steps": result.steps,
                "audit": audit_to_json(result.audit),
            }
        )
    else:
        print_audit(console, result.audit)
        has_experts = any(".experts[" in c.name for c in result.anatomy.components)
        print_checks(console, result.checks, has_experts=has_experts)
        if RunFolder(result.folder).load.exists():
            print_histories(console, experts_of_run(result.folder))
        console.print(f"run folder: {result.folder}", soft_wrap=True, highlight=False)
    if result.state == "interrupted":
        typer.echo(
            f"interrupted after step {result.steps}, and saved; go on: frostline resume {result.folder}", err=True
        )
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if result.audit.passed else 1)
