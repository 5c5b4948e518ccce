"""Data: what a recipe's files, or any file, come to before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frostline.cli.app import AsJson, RemoteCode, app, data_settings, errors_for_people, make_console, print_json
from frostline.errors import DataError, RecipeError


@app.command("data", rich_help_panel="Recipes")
@errors_for_people
def data(
    target: Annotated[
        str,
        typer.Argument(
            help="A recipe: a file, or a name that `frostline recipes` lists; or data: file, folder, hub name.",
            metavar="RECIPE|FILE",
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Whose tokens, for a file: model folder, hub name or run.", metavar="MODEL")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: data.loss_on=last. For a file, too.", metavar="KEY=VALUE"),
    ] = None,
    examples: Annotated[int, typer.Option(help="Show so many of each part, with what learns in colour.", min=0)] = 3,
    limit: Annotated[int | None, typer.Option(help="Look at no more than so many.", metavar="N", min=1)] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.", metavar="FILE")] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what data come to: formats, counts, lengths, what learns, duplicates and leaks."""
    from frostline.survey import survey
    from frostline.terminal_data import plural, print_survey

    chosen = _target(target, overrides or [])
    if tokenizer is not None and not isinstance(chosen, _data_spec()):
        raise RecipeError("--tokenizer is for files: a recipe names its own (`--set tokenizer=MODEL`)")
    with make_console(stderr=True).status("reading") as status:
        found = survey(
            chosen,
            tokenizer=tokenizer,
            examples=examples,
            limit=limit,
            trust_remote_code=trust_remote_code,
            say=status.update,
        )
    if html is not None:
        from frostline.experiment.data_page import write_data_page

        write_data_page(found, html)
    if as_json:
        print_json(found.to_json())
    else:
        print_survey(make_console(), found)
        if html is not None:
            make_console().print(f"written: {html}", highlight=False, soft_wrap=True)
    if found.n_refused:
        them = "them" if found.n_refused > 1 else "it"
        raise DataError(
            f"{plural(found.n_refused, 'example')} cannot be used; mend {them}, or leave {them} out: data.invalid=drop"
        )
    empty = [part for part in found.parts if not part.n_learning]
    if empty:
        files = ", ".join(dict.fromkeys(f.path for part in empty for f in part.files))
        raise DataError(f"nothing to learn from in {files}")


def _data_spec() -> Any:
    from frostline.recipe import DataSpec

    return DataSpec


def _target(target: str, overrides: list[str]) -> Any:
    """A recipe for a YAML file or a shipped name, and the data section of one that only has this file for the rest."""
    from frostline.recipe import is_recipe, load_recipe

    if is_recipe(target):
        return load_recipe(target, overrides=overrides)
    return data_settings(target, overrides)
