"""Mixtures of experts. Each command is one public call."""

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
from frostline.errors import ModelError


@app.command(rich_help_panel="Models")
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
        print_json(upcycled_to_json(made))
    else:
        print_upcycled(make_console(), made)


@app.command("experts", rich_help_panel="Models")
@errors_for_people
def experts_used(
    model: Model,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="Files or folders, as `data.train` takes them; may be repeated. Left out: a run's load in training.",
        ),
    ] = None,
    overrides: Reading = None,
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
    """Say which experts a text uses, how alike they are, and choose some by that; or what a run's training used."""
    from frostline.experts import experts_of_run, experts_on
    from frostline.moe import cover as cover_share
    from frostline.moe import histories_to_json, usage_to_json, write_esft
    from frostline.moe import top as top_n
    from frostline.selection import expression_of
    from frostline.terminal_moe import print_histories, print_usage

    if top is not None and cover is not None:
        raise ModelError("--top and --cover are two ways to choose: give one of them")
    if esft is not None and top is None and cover is None:
        raise ModelError("--esft writes what was chosen: give --top or --cover too")
    settings = reading_settings(data, overrides)
    if not data:
        if top is not None or cover is not None:
            raise ModelError("--top and --cover choose by what a text uses: give --data")
        found = experts_of_run(model)
        if as_json:
            print_json({"schema": 1, "sites": histories_to_json(found)})
        else:
            print_histories(make_console(), found)
        return
    usage = experts_on(
        model, data, length=length, n_tokens=tokens, settings=settings, trust_remote_code=trust_remote_code
    )
    chosen = None
    if top is not None or cover is not None:
        chosen = top_n(usage, top, by) if top is not None else cover_share(usage, cover or 0.0, by)
        if esft is not None:
            write_esft(chosen, esft)
    if as_json:
        learn = {"learn": expression_of(chosen)} if chosen else {}
        print_json({"schema": 1, **usage_to_json(usage), **learn})
        return
    print_usage(make_console(), usage)
    if chosen is not None:
        make_console().print(f"learn: {expression_of(chosen)}", soft_wrap=True, highlight=False)
