"""The report's section on where gradients go: what `flow.jsonl` holds, made ready for its figures. Computes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from frostline.recipe import StageSpec
from frostline.run_folder import RunFolder, StageRecord
from frostline.schedule import make_routes

MAX_LAYERS = 12
"""Blocks that one figure can show; of deeper stacks the first and the last are shown."""


def flow_section(folder: RunFolder, stages: Sequence[StageRecord], n_layers: int) -> list[dict[str, Any]]:
    """Per stage: the first and last measurement as figures, the bias over time; empty where nothing was measured."""
    if not folder.flow.exists():
        return []
    from frostline.experiment import flow_figures

    rows = folder.read_lines(folder.flow)
    out = []
    for stage in stages:
        mine = [r for r in rows if r["stage"] == stage.index]
        if not mine:
            continue
        cuts = cuts_of(stage, n_layers)
        shown = [mine[0], mine[-1]] if len(mine) > 1 else mine
        out.append(
            {
                "stage": stage.name,
                "routes": routes_of(stage, n_layers),
                "stacks": [
                    {
                        "step": r["step"],
                        "figure": flow_figures.flow_figure(
                            _shortened(r), _moved(cuts, n_layers), description=_says(stage, r)
                        ),
                    }
                    for r in shown
                ],
                "block": _one_block(mine[-1], cuts, flow_figures, stage),
                "bias": _bias(mine, stage, flow_figures),
                "hidden": max(n_layers - MAX_LAYERS, 0),
            }
        )
    return out


def routes_of(stage: StageRecord, n_layers: int) -> list[str]:
    """The stage's routes in words."""
    spec = StageSpec.model_validate(stage.settings)
    said = [str(r) for r in make_routes(spec.routes, n_layers)]
    return [*said, "a loss for every block"] if spec.local_loss != "none" else said


def cuts_of(stage: StageRecord, n_layers: int) -> set[tuple[int, str]]:
    """(layer, point) of every stop and removal; the embedding's layer is -1."""
    spec = StageSpec.model_validate(stage.settings)
    return {(layer, r.point) for r in make_routes(spec.routes, n_layers) for layer in r.layers or (-1,)}


def _says(stage: StageRecord, row: dict[str, Any]) -> str:
    return f"Gradient norms through the stack in stage {stage.name} at step {row['step']}"


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    blocks = row["blocks"]
    half = MAX_LAYERS // 2
    return {**row, "blocks": blocks if len(blocks) <= MAX_LAYERS else [*blocks[:half], *blocks[-half:]]}


def _moved(cuts: set[tuple[int, str]], n_layers: int) -> set[tuple[int, str]]:
    """Cuts by their place among the blocks that are shown."""
    if n_layers <= MAX_LAYERS:
        return cuts
    half, gone = MAX_LAYERS // 2, n_layers - MAX_LAYERS
    return {(at if at < half else at - gone, p) for at, p in cuts if at < half or at >= n_layers - half}


def _one_block(row: dict[str, Any], cuts: set[tuple[int, str]], figures: Any, stage: StageRecord) -> dict[str, Any]:
    """The first block with a cut, or the middle one, by itself."""
    layer = min((at for at, _ in cuts if at >= 0), default=len(row["blocks"]) // 2)
    block = row["blocks"][layer]
    alone = {"embed": block["into"], "blocks": [block]}
    inside = {(0, p) for at, p in cuts if at == layer}
    description = f"Gradient norms in layer {layer} in stage {stage.name} at step {row['step']}"
    return {"layer": layer, "step": row["step"], "figure": figures.block_figure(alone, inside, description=description)}


def _bias(rows: Sequence[dict[str, Any]], stage: StageRecord, figures: Any) -> str | None:
    """The cosines by kind of part; None where every gradient is the true one."""
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in rows:
        kinds: dict[str, list[float]] = {}
        for name, found in row["bias"].items():
            if found is not None:
                kinds.setdefault(_kind(name), []).append(found[0])
        for kind, values in kinds.items():
            series.setdefault(kind, []).append((row["step"], sum(values) / len(values), min(values), max(values)))
    if all(p[2] > 1 - 1e-6 for points in series.values() for p in points):
        return None
    return str(figures.bias_figure(series, description=f"Bias of the gradients over steps in stage {stage.name}"))


def _kind(name: str) -> str:
    """`layers[3].attn.q` → `attn`; parts outside of the layers as they are."""
    parts = re.sub(r"\[\d+\]", "", name).split(".")
    return parts[1] if parts[0] == "layers" else parts[0]
