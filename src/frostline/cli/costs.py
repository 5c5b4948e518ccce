"""What a run will cost. Each command is one public call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from frostline.cli.app import (
    AsJson,
    Overrides,
    RecipeName,
    RemoteCode,
    app,
    errors_for_people,
    make_console,
    print_json,
)
from frostline.errors import PlanError


@app.command(rich_help_panel="Recipes")
@errors_for_people
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe: a file, or a name of `frostline recipes`; or a model: folder, hub name or config.json.",
            metavar="RECIPE|MODEL",
        ),
    ],
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
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say what a run will cost, without weights and without a GPU."""
    from frostline.planning import Asked, plan_model, plan_recipe
    from frostline.recipe import is_recipe
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
    if is_recipe(recipe):
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
        print_json({"schema": 1, **found.to_json()})
    else:
        print_plan(make_console(), found)


@app.command(rich_help_panel="Recipes")
@errors_for_people
def why(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which parts make the stages of a recipe expensive, and what leaving them out would save."""
    from dataclasses import asdict

    from frostline.terminal_plan import print_why
    from frostline.why import why_recipe

    found = why_recipe(recipe, overrides=overrides or (), trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"schema": 1, "stages": [asdict(w) for w in found]})
    else:
        print_why(make_console(), found)
