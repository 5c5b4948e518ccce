"""Schedules and shipped recipes. Each command is one public call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from frostline.errors import RecipeError, did_you_mean


@app.command(rich_help_panel="Recipes")
@errors_for_people
def schedule(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the stages as YAML, ready for a recipe.")] = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Print the stages of a recipe: a named schedule written out, drawn layers and measured choices included."""
    from frostline.recipe import dump_yaml
    from frostline.scheduling import schedule_recipe, schedule_to_json, written_stages
    from frostline.terminal_schedule import print_schedule

    prepared = schedule_recipe(recipe, overrides=overrides or (), trust_remote_code=trust_remote_code)
    if as_yaml:
        typer.echo(dump_yaml({"stages": written_stages(prepared)}), nl=False)
    elif as_json:
        print_json({"schema": 1, **schedule_to_json(prepared)})
    else:
        print_schedule(make_console(), prepared)


@app.command(rich_help_panel="Recipes")
@errors_for_people
def lr(
    recipe: RecipeName,
    stage: Annotated[str, typer.Option(help="Which stage: its name, or its number from 0.")] = "0",
    parts: Annotated[
        list[str] | None, typer.Option("--parts", help="Test this of what the stage trains; repeat for more.")
    ] = None,
    low: Annotated[float, typer.Option("--from", help="The lowest rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="The highest rate.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Rates between them, one step each.", min=3, max=10_000)] = 40,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves: a .png or .svg file.", metavar="FILE")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Test which learning rates each part of a stage tolerates, and suggest one. Trains nothing for good."""
    from frostline.experiment.lr_plot import check_plot, draw_range_test
    from frostline.lr_range import range_test
    from frostline.recipe import load_recipe
    from frostline.terminal_schedule import print_range_test

    if plot is not None:
        check_plot(plot)
    console = make_console(stderr=as_json)
    found = range_test(
        load_recipe(recipe, overrides=overrides or ()),
        stage=stage,
        parts=parts or (),
        low=low,
        high=high,
        n_steps=steps,
        trust_remote_code=trust_remote_code,
        say=lambda part: console.print(f"testing {part} …", style="dim", highlight=False),
    )
    if plot is not None:
        draw_range_test(found, plot)
    if as_json:
        print_json({"schema": 1, **found.to_json()})
    else:
        print_range_test(console, found)
        if plot is not None:
            console.print(f"plot: {plot}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel="Recipes")
@errors_for_people
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.", metavar="NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes of the package, or print one: frostline recipes lisa > lisa.yaml."""
    from frostline.recipe.shipped import shipped_recipes, summary
    from frostline.terminal_schedule import print_recipes

    found = shipped_recipes()
    if name is None:
        if as_json:
            print_json({"schema": 1, "recipes": [{"name": n, "does": summary(t)} for n, t in found.items()]})
        else:
            print_recipes(make_console(), found)
        return
    if name not in found:
        raise RecipeError(f"no recipe is named '{name}'; there are {', '.join(found)}.{did_you_mean(name, found)}")
    typer.echo(found[name], nl=False)
