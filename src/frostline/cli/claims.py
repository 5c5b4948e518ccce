"""What is said about freezing, measured; and the demo. Each command is one public call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.app import (
    INTERRUPTED,
    AsJson,
    Model,
    Overrides,
    RemoteCode,
    app,
    errors_for_people,
    make_console,
    print_json,
)


@app.command(rich_help_panel="What is said about freezing")
@errors_for_people
def claims(
    model: Model,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Settle by measurement what is said about freezing, on any model."""
    from frostline.experiment.claims import claims_markdown, claims_to_json
    from frostline.experiment.demo import claims_of
    from frostline.run_folder import checkpoint_of
    from frostline.terminal import print_claims

    measured = claims_of(checkpoint_of(model), name=model, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(claims_to_json(measured))
    elif markdown:
        typer.echo(claims_markdown(measured))
    else:
        print_claims(make_console(), measured)
    raise typer.Exit(0 if measured.hold else 1)


@app.command(rich_help_panel="What is said about freezing")
@errors_for_people
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="The folder to write; new, empty, or of a demo that was stopped.")
    ] = Path("runs/demo"),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a small Llama (everything, then only the FFN), settle the claims on it, write the page.

    Interrupted, it goes on when it is run again with the same folder.
    """
    from frostline.audit import audit_to_json
    from frostline.experiment.claims import claims_to_json
    from frostline.experiment.demo import run_demo
    from frostline.terminal import print_demo
    from frostline.terminal_plan import print_checks
    from frostline.terminal_progress import ProgressLines

    console = make_console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    with ProgressLines(console) as progress:
        done = run_demo(out, overrides=overrides or [], observers=[progress], say=say)
    found = done.findings
    if found is None:
        again = "frostline demo" if out == Path("runs/demo") else f"frostline demo --out {out}"
        typer.echo(f"interrupted after step {done.result.steps}, and saved; run it again to go on: {again}", err=True)
        raise typer.Exit(INTERRUPTED)
    if as_json:
        print_json({"audit": audit_to_json(done.result.audit), "claims": claims_to_json(found.claims)})
    else:
        print_demo(console, done.result, found)
        print_checks(console, done.result.checks)
        console.print(f"report: {found.page}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if done.result.audit.passed and found.claims.hold else 1)
