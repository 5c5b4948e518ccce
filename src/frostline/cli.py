"""The command line: short commands, each one public call. Exit codes stand in `errors.py`."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console

from frostline.errors import FrostlineError, ModelError, PlanError

if TYPE_CHECKING:
    from frostline.anatomy import Anatomy
    from frostline.run import RunResult

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Train decoder-only language models while deciding exactly what learns and when, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A model folder, hub name, config.json or run folder.", metavar="MODEL")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless typed.")
]
INTERRUPTED_TWICE = 130
INTERRUPTED = 75


def main() -> None:
    """The `frostline` command."""
    # waiting threads sleep: 1 % slower on an idle machine, a third faster on a shared one (must be set before torch)
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓ must not end a passing run
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_TWICE)


def errors_for_people(command: Callable[P, R]) -> Callable[P, R]:
    """Print a `FrostlineError` without a traceback and exit with its code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FrostlineError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED_TWICE) from None

    return wrapped


@app.command()
@errors_for_people
def parts(
    model: Model,
    proven: Annotated[
        bool, typer.Option("--prove", help="Measure on a tiny model with the same flags whether the names are right.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """List the named parts of a model."""
    from dataclasses import asdict

    from frostline.anatomy import anatomy_to_json, prove
    from frostline.model import load_config
    from frostline.run_folder import checkpoint_of
    from frostline.terminal import parts_table, proof_table

    anatomy = _anatomy(model, trust_remote_code)
    proof = prove(load_config(checkpoint_of(model), trust_remote_code=trust_remote_code)) if proven else None
    if as_json:
        _print_json({"schema": 1, **anatomy_to_json(anatomy), **({"proof": asdict(proof)} if proof else {})})
        return
    console = _console()
    console.print(parts_table(anatomy))
    if proof is not None:
        console.print(proof_table(proof))


@app.command()
@errors_for_people
def select(
    model: Model,
    expression: Annotated[str, typer.Argument(help="Such as 'ffn & layers[2:]'.")],
    together: Annotated[bool, typer.Option("--together", help="Let tied parts follow each other.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the exact slices of every tensor.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="EXPRESSION", help="A second expression: show where the two differ.")
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what an expression selects, term by term."""
    from dataclasses import asdict

    from frostline.selection import compare, selection_to_json
    from frostline.selection import select as select_in
    from frostline.terminal import comparison_table, selection_table, slices_table

    anatomy = _anatomy(model, trust_remote_code)
    ties: Literal["together", "error"] = "together" if together else "error"
    first = select_in(anatomy, expression, ties=ties)
    second = select_in(anatomy, against, ties=ties) if against is not None else None
    if as_json:
        data = {"schema": 1, **selection_to_json(first)}
        if second is not None:
            data |= {"against": selection_to_json(second), "differences": [asdict(d) for d in compare(first, second)]}
        _print_json(data)
        return
    console = _console()
    console.print(comparison_table(first, second) if second is not None else selection_table(first))
    for selection in (first, second) if tensors else ():
        if selection is not None:
            console.print(slices_table(selection))


@app.command()
@errors_for_people
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a model: folder, hub name or config.json.")],
    learn: Annotated[str, typer.Option(help="For a model: what learns, one selection.", metavar="EXPRESSION")] = "all",
    rows: Annotated[int, typer.Option(help="For a model: rows per step.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="For a model: tokens per row.", min=2)] = 2048,
    memory: Annotated[str | None, typer.Option(help="Say what fits: 80GB, 24GiB.", metavar="SIZE")] = None,
    compared: Annotated[
        bool, typer.Option("--compare", help="The cost of other selections and settings, side by side.")
    ] = False,
    throughput: Annotated[
        str | None, typer.Option(help="Reckon the time with this rate: 150TFLOPS.", metavar="RATE")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the time: real steps on random weights, here.")
    ] = False,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Whose kernels the bytes are of; this machine's if left out.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key of the recipe: stages[0].lr=1e-4.", metavar="KEY=VALUE"),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say what a run will cost, without weights and without a GPU."""
    from frostline.planning import Asked, plan_model, plan_recipe
    from frostline.terminal_plan import print_plan
    from frostline.units import parse_bytes, parse_flops

    try:
        asked = Asked(
            memory=parse_bytes(memory) if memory else None,
            compared=compared,
            flops_per_s=parse_flops(throughput) if throughput else None,
            calibrate=calibrate,
        )
    except ValueError as error:
        raise PlanError(str(error)) from None
    if recipe.endswith((".yaml", ".yml")):
        found = plan_recipe(
            Path(recipe),
            overrides=overrides or (),
            device=device,
            asked=asked,
            trust_remote_code=trust_remote_code,
        )
    else:
        found = plan_model(
            recipe, learn=learn, rows=rows, length=length, device=device, asked=asked,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if as_json:
        _print_json({"schema": 1, **found.to_json()})
    else:
        print_plan(_console(), found)


@app.command()
@errors_for_people
def why(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: stages[0].lr=1e-4.", metavar="KEY=VALUE"),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which parts make the stages of a recipe expensive, and what leaving them out would save."""
    from dataclasses import asdict

    from frostline.terminal_plan import print_why
    from frostline.why import why_recipe

    found = why_recipe(recipe, overrides=overrides or (), trust_remote_code=trust_remote_code)
    if as_json:
        _print_json({"schema": 1, "stages": [asdict(w) for w in found]})
    else:
        print_why(_console(), found)


@app.command()
@errors_for_people
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option("--out", help="The run folder to write; must not exist or be empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: stages[0].lr=1e-4.", metavar="KEY=VALUE"),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train as a recipe says, and audit the run."""
    from frostline.recipe import load_recipe
    from frostline.run import train as train_run
    from frostline.terminal import ProgressLines

    console = _console(stderr=as_json)
    loaded = load_recipe(recipe, overrides=overrides or [])
    with ProgressLines(console) as progress:
        result = train_run(loaded, out=out, observers=[progress], trust_remote_code=trust_remote_code)
    _end_of_run(result, console, as_json=as_json)


@app.command()
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
    from frostline.terminal import ProgressLines

    console = _console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    with ProgressLines(console) as progress:
        result = resume_run(
            run_folder,
            allow_inexact=allow_inexact,
            observers=[progress],
            trust_remote_code=trust_remote_code,
            say=say,
        )
    _end_of_run(result, console, as_json=as_json)


@app.command()
@errors_for_people
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run folder.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="The folder to write, or with --delta the file.", metavar="OUT")],
    delta: Annotated[bool, typer.Option("--delta", help="Only what learned, as one small file.")] = False,
) -> None:
    """Write a finished run's model as a standard folder with a model card, or what learned as a file."""
    from frostline.export import export_delta, export_run

    typer.echo(f"written: {(export_delta if delta else export_run)(run_folder, out)}")


@app.command()
@errors_for_people
def apply(
    base: Annotated[str, typer.Argument(help="The model the deltas belong to.", metavar="BASE")],
    deltas: Annotated[list[Path], typer.Argument(help="Files of `export --delta`, then the folder to write.")],
    trust_remote_code: RemoteCode = False,
) -> None:
    """Put deltas into the base they belong to: frostline apply BASE DELTA… OUT."""
    from frostline.export import apply_deltas

    *files, out = deltas
    if not files:
        raise ModelError("give at least one delta, and then the folder to write: frostline apply BASE DELTA… OUT")
    typer.echo(f"written: {apply_deltas(base, files, out, trust_remote_code=trust_remote_code)}")


def _end_of_run(result: RunResult, console: Console, *, as_json: bool) -> NoReturn:
    """Say how a run ended, and exit accordingly."""
    from frostline.audit import audit_to_json
    from frostline.terminal import print_audit
    from frostline.terminal_plan import print_checks

    if as_json:
        _print_json(
            {
                "folder": str(result.folder),
                "state": result.state,
                "steps": result.steps,
                "audit": audit_to_json(result.audit),
            }
        )
    else:
        print_audit(console, result.audit)
        print_checks(console, result.checks)
        console.print(f"run folder: {result.folder}", soft_wrap=True, highlight=False)
    if result.state == "interrupted":
        typer.echo(
            f"interrupted after step {result.steps}, and saved; go on: frostline resume {result.folder}", err=True
        )
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if result.audit.passed else 1)


@app.command()
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
        _print_json(audit_to_json(result))
    else:
        print_audit(_console(), result)
    raise typer.Exit({"passed": 0, "interrupted": INTERRUPTED, "failed": 1}[result.verdict])


@app.command()
@errors_for_people
def diff(
    before: Annotated[Path, typer.Argument(help="A model folder, run folder or .safetensors file.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints by component."""
    from frostline.audit import diff_checkpoints, diff_to_json
    from frostline.terminal import diff_table

    result = diff_checkpoints(before, after)
    if as_json:
        _print_json(diff_to_json(result))
    else:
        _console().print(diff_table(result))


@app.command()
@errors_for_people
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0, max=100)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.", min=0, max=2**63 - 1)] = 0,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Continue a text with a model."""
    from frostline.generate import generate_text

    text = generate_text(
        model,
        prompt,
        n_tokens=tokens,
        temperature=temperature,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        _print_json({"model": model, "prompt": prompt, "text": text})
    else:
        typer.echo(text)


@app.command()
@errors_for_people
def upcycle(
    dense: Annotated[str, typer.Argument(help="A dense model: folder, hub name or run folder.", metavar="DENSE")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist or be empty.", metavar="OUT")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token visits.")] = 2,
    init: Annotated[
        Literal["copy", "noise", "drop"],
        typer.Option(help="Experts as copies; with noise; or with a share of their neurons drawn anew."),
    ] = "copy",
    noise: Annotated[float, typer.Option(help="Of --init noise, in standard deviations of each tensor.")] = 0.01,
    drop: Annotated[float, typer.Option(help="Of --init drop: the share of neurons.")] = 0.5,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the routers; never 0.")] = 0.02,
    top1: Annotated[
        Literal["preserve", "switch"],
        typer.Option(help="With --top-k 1: keep the function, or let the router learn from the loss."),
    ] = "preserve",
    layers: Annotated[str | None, typer.Option(help="Layers that get experts: 1,3,5.", metavar="LIST")] = None,
    target: Annotated[str | None, typer.Option(help="The architecture to make, where there are several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the routers and of what is drawn anew.", min=0, max=2**63 - 1)] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a mixture of experts that computes what a dense model computes, and measure that it does."""
    from frostline.moe import upcycle as make
    from frostline.moe import upcycled_to_json
    from frostline.run_folder import checkpoint_of
    from frostline.terminal_moe import print_upcycled

    if layers is not None and not all(part.strip().isdigit() for part in layers.split(",")):
        raise ModelError(f"--layers {layers}: write numbers with commas between them, as in 1,3,5")
    chosen = [int(part) for part in layers.split(",")] if layers is not None else None
    made = make(
        checkpoint_of(dense), out, experts=experts, top_k=top_k, init=init, noise=noise, drop=drop,
        router_std=router_std, top1=top1, layers=chosen, target=target, seed=seed,
    )  # fmt: skip
    if as_json:
        _print_json(upcycled_to_json(made))
    else:
        print_upcycled(_console(), made)


@app.command("experts")
@errors_for_people
def experts_used(
    model: Model,
    data: Annotated[list[Path], typer.Option("--data", help="Text: .txt, .md, .jsonl or a folder; may be repeated.")],
    length: Annotated[int, typer.Option(help="Tokens per row.", min=1)] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens to count at most.", min=1)] = 131_072,
    top: Annotated[int | None, typer.Option(help="Choose so many experts of each layer.", metavar="N")] = None,
    cover: Annotated[
        float | None, typer.Option(help="Choose the fewest experts that have this share of the score.", metavar="SHARE")
    ] = None,
    by: Annotated[Literal["tokens", "gate"], typer.Option(help="The score to choose by.")] = "tokens",
    esft: Annotated[
        Path | None, typer.Option(help="Write what was chosen as an expert configuration of ESFT.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which experts a text uses, how alike they are, and choose some by that."""
    from frostline.experts import experts_on
    from frostline.moe import cover as cover_share
    from frostline.moe import expression_of, usage_to_json, write_esft
    from frostline.moe import top as top_n
    from frostline.terminal_moe import print_usage

    if top is not None and cover is not None:
        raise ModelError("--top and --cover are two ways to choose: give one of them")
    if esft is not None and top is None and cover is None:
        raise ModelError("--esft writes what was chosen: give --top or --cover too")
    usage = experts_on(model, data, length=length, n_tokens=tokens, trust_remote_code=trust_remote_code)
    chosen = None
    if top is not None or cover is not None:
        chosen = top_n(usage, top, by) if top is not None else cover_share(usage, cover or 0.0, by)
        if esft is not None:
            write_esft(chosen, esft)
    if as_json:
        learn = {"learn": expression_of(chosen)} if chosen else {}
        _print_json({"schema": 1, **usage_to_json(usage), **learn})
        return
    print_usage(_console(), usage)
    if chosen is not None:
        _console().print(f"learn: {expression_of(chosen)}", soft_wrap=True, highlight=False)


@app.command()
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
        _print_json(claims_to_json(measured))
    elif markdown:
        typer.echo(claims_markdown(measured))
    else:
        print_claims(_console(), measured)
    raise typer.Exit(0 if measured.hold else 1)


@app.command()
@errors_for_people
def report(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option("--out", help="The page to write; RUN/report.html when left out.")] = None,
) -> None:
    """Write one self-contained page about a run; exit code 1 when its audit fails."""
    from frostline.audit import audit as audit_run
    from frostline.experiment.report import write_report

    audited = audit_run(run_folder)
    typer.echo(f"report: {write_report(run_folder, to=out, audited=audited)}")
    raise typer.Exit(0 if audited.passed else 1)


@app.command()
@errors_for_people
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist or be empty.")] = Path(
        "runs/demo"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the demo's recipe.", metavar="KEY=VALUE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small Llama (everything, then only the FFN), settle the claims on it, write the page."""
    from frostline.audit import audit_to_json
    from frostline.experiment.claims import claims_to_json
    from frostline.experiment.demo import run_demo
    from frostline.experiment.report import write_report
    from frostline.terminal import ProgressLines, print_demo
    from frostline.terminal_plan import print_checks

    console = _console(stderr=as_json)
    with ProgressLines(console) as progress:
        done = run_demo(out, overrides=overrides or [], observers=[progress])
    if done.result.state == "interrupted":
        typer.echo(f"interrupted after step {done.result.steps}; the run folder is intact", err=True)
        raise typer.Exit(INTERRUPTED)
    page = write_report(done.result.folder, audited=done.result.audit)
    if as_json:
        _print_json({"audit": audit_to_json(done.result.audit), "claims": claims_to_json(done.claims)})
    else:
        print_demo(console, done)
        print_checks(console, done.result.checks)
        console.print(f"report: {page}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if done.result.audit.passed and done.claims.hold else 1)


def _anatomy(model: str, trust_remote_code: bool) -> Anatomy:
    from frostline.anatomy import read_anatomy
    from frostline.model import load_skeleton
    from frostline.run_folder import checkpoint_of

    return read_anatomy(load_skeleton(checkpoint_of(model), trust_remote_code=trust_remote_code))


def _console(*, stderr: bool = False) -> Console:
    # a pipe has no width: then nothing is cut off
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
