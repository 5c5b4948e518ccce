"""Models: their parts, selections, differences, text. Each command is one public call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from frostline.cli.app import (
    AsJson,
    Model,
    Reading,
    RemoteCode,
    app,
    errors_for_people,
    make_console,
    print_json,
    reading_settings,
)


@app.command(rich_help_panel="Models")
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
    from frostline.named_model import anatomy_of
    from frostline.run_folder import checkpoint_of
    from frostline.terminal import parts_table, proof_table

    anatomy = anatomy_of(model, trust_remote_code=trust_remote_code)
    proof = prove(load_config(checkpoint_of(model), trust_remote_code=trust_remote_code)) if proven else None
    if as_json:
        print_json({"schema": 1, **anatomy_to_json(anatomy), **({"proof": asdict(proof)} if proof else {})})
        return
    console = make_console()
    console.print(parts_table(anatomy))
    if proof is not None:
        console.print(proof_table(proof))


@app.command(rich_help_panel="Models")
@errors_for_people
def select(
    model: Model,
    expression: Annotated[str, typer.Argument(help="Such as 'ffn & layers[2:]' or 'experts[top 4 by tokens]'.")],
    together: Annotated[bool, typer.Option("--together", help="Let tied parts follow each other.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the exact slices of every tensor.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="EXPRESSION", help="A second expression: show where the two differ.")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--data", help="Files by whose use experts are ranked; may be repeated.")
    ] = None,
    overrides: Reading = None,
    length: Annotated[int, typer.Option(help="With --data: tokens per row.", min=1)] = 256,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what an expression selects, term by term."""
    from dataclasses import asdict

    from frostline.experts import plain_in
    from frostline.named_model import anatomy_of
    from frostline.selection import compare, selection_to_json
    from frostline.selection import select as select_in
    from frostline.terminal import comparison_table, selection_table, slices_table

    anatomy = anatomy_of(model, trust_remote_code=trust_remote_code)
    ties: Literal["together", "error"] = "together" if together else "error"
    settings = reading_settings(texts, overrides)
    known = plain_in(
        model, anatomy, expression, against, data=texts, length=length, settings=settings,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    first = select_in(anatomy, known[expression], ties=ties)
    second = select_in(anatomy, known[against], ties=ties) if against is not None else None
    if as_json:
        data = {"schema": 1, **selection_to_json(first)}
        if second is not None:
            data |= {"against": selection_to_json(second), "differences": [asdict(d) for d in compare(first, second)]}
        print_json(data)
        return
    console = make_console()
    console.print(comparison_table(first, second) if second is not None else selection_table(first))
    for selection in (first, second) if tensors else ():
        if selection is not None:
            console.print(slices_table(selection))


@app.command(rich_help_panel="Models")
@errors_for_people
def diff(
    before: Annotated[Path, typer.Argument(help="A model folder, run folder or .safetensors file.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints by part."""
    from frostline.audit import diff_checkpoints, diff_to_json
    from frostline.terminal import diff_table

    result = diff_checkpoints(before, after)
    if as_json:
        print_json(diff_to_json(result))
    else:
        make_console().print(diff_table(result))


@app.command(rich_help_panel="Models")
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
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        typer.echo(text)
