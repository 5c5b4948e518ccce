"""One self-contained page about one run. Renders what audit, claims and samples say; computes nothing of its own.

No network, no scripts; everything that comes from data is escaped by the template. Read `write_report` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.anatomy import Anatomy, parse_path
from frostline.audit import FAILED, Audit, Row, audit
from frostline.errors import FrostlineError
from frostline.experiment.evaluation_section import evaluation_section
from frostline.experiment.experts_section import experts_section
from frostline.experiment.flow_section import flow_section
from frostline.folding import fold
from frostline.run_folder import RunFolder, damaged_records
from frostline.storage import write_text
from frostline.units import format_bytes, format_changes, format_count, format_flops

Page = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One line of the verdict strip: a part, and per stage what was asked and what happened."""

    part: str
    cells: tuple[tuple[str, str], ...]
    """(class, text) per stage; the class is `ok-frozen`, `ok-moved`, `note` or `bad`."""


def write_report(run: str | Path, *, to: Path | None = None, audited: Audit | None = None) -> Path:
    """Write the report of a run folder to `to`, or into the folder as `report.html`; returns the file.

    `audited`: the run's audit, where it is at hand. Raises `RunFolderError` when `run` is no run folder, and
    `FrostlineError` when the report extra is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

        from frostline.experiment import experts_figures, figures
    except ImportError as error:
        raise FrostlineError(f"the report needs {error.name}: pip install 'frostline[report]'") from None
    folder = RunFolder.open(run)
    environment = Environment(
        loader=PackageLoader("frostline.experiment"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    with damaged_records(folder.path, TemplateError):
        text = environment.get_template("report.html.j2").render(
            page_of(folder, audited or audit(folder.path), figures), experts=experts_section(folder, experts_figures)
        )
    target = to or folder.report
    write_text(target, text)
    return target


def page_of(folder: RunFolder, result: Audit, figures: Any) -> Page:
    """Everything the template shows."""
    anatomy, stages = folder.read_anatomy(), folder.read_schedule()
    metrics = folder.read_lines(folder.metrics)
    losses = [(r["step"], r["loss"]) for r in metrics if r.get("loss") is not None]
    held_out = [(r["step"], r["held_out_loss"]) for r in metrics if r.get("held_out_loss") is not None]
    at = dict(held_out)
    return {
        "name": "/".join(folder.path.resolve().parts[-2:]),
        "audit": result,
        "anatomy": anatomy,
        "parameters": format_count(anatomy.n_parameters),
        "stages": [
            {
                "name": s.name,
                "learn": s.learn,
                "steps": s.end - s.start,
                "learning": format_count(s.n_learning),
                "share": f"{100 * s.n_learning / anatomy.n_parameters:.1f} %",
                "before": at.get(s.start),
                "after": at.get(s.end),
            }
            for s in stages
        ],
        "strips": _strips(result),
        "loss_figure": figures.loss_curves(
            [(s.name, s.start, s.end) for s in stages],
            losses,
            held_out,
            description="Training and held-out loss over steps, one band per stage",
        ),
        "evaluation": evaluation_section(folder, [(s.name, s.start, s.end) for s in stages], figures),
        "moved": _heat_maps(anatomy, result, figures, "relative_change"),
        "gradients": _heat_maps(anatomy, result, figures, "gradient_norm"),
        "flow": flow_section(folder, stages, anatomy.n_layers),
        "costs": _costs(_optional(folder, "plan.json")),
        "claims": _optional(folder, "claims.json"),
        "samples": _by_prompt(_optional(folder, "samples.json")),
        "environment": folder.read_json("environment.json"),
        "recipe": folder.recipe.read_text(encoding="utf-8") if folder.recipe.exists() else "",
        "numbers": [r for r in result.rows if r.verdict != "unchanged"],
    }


def _costs(plan: Page | None) -> list[Page]:
    """The plan's stages, each beside the step of it that was metered."""
    if plan is None:
        return []
    measured = {c["stage"]: c for c in plan["checks"]}
    out = []
    for stage in plan["stages"]:
        step, check = stage["step"], measured.get(stage["name"])
        equal = check is not None and check["flops_agree"]
        out.append(
            {
                "name": stage["name"],
                "frontier": step["frontier"],
                "flops": format_flops(step["total_flops"]),
                "measured_flops": "–"
                if check is None
                else "the same"
                if equal
                else format_flops(check["measured_flops"]),
                "peak": format_bytes(step["peak_bytes"]),
                "measured_peak": f"{check['peak_ratio']:.3f} × planned" if check and check["peak_ratio"] else "–",
                "state": format_bytes(step["gradient_bytes"] + step["state_bytes"] + step["copy_bytes"]),
                "prefix": format_bytes(stage["prefix_bytes"]) if stage["prefix_bytes"] else "–",
            }
        )
    return out


def _optional(folder: RunFolder, name: str) -> Page | None:
    return folder.read_json(name) if (folder.path / name).exists() else None


def _by_prompt(samples: Page | None) -> dict[str, list[Page]]:
    found: dict[str, list[Page]] = {}
    for sample in samples["samples"] if samples else []:
        found.setdefault(sample["prompt"], []).append(sample)
    return found


def _strips(result: Audit) -> list[Strip]:
    cells: dict[str, dict[str, Row]] = {}
    for row in result.rows:
        cells.setdefault(row.component, {})[row.stage] = row
    groups = fold((name, tuple((r.declared, r.verdict) for r in rows.values())) for name, rows in cells.items())
    return [
        Strip(
            part=group.title,
            cells=tuple(_strip_cell([cells[n][stage] for n in group.names]) for stage in result.stages),
        )
        for group in groups
    ]


def _strip_cell(rows: Sequence[Row]) -> tuple[str, str]:
    first = rows[0]
    if first.verdict in FAILED:
        return "bad", f"✗ {first.verdict.lower()}"
    if first.verdict == "unchanged":
        return "ok-frozen", "frozen → 0 bytes changed"
    if first.verdict == "moved":
        sizes = [r.relative_change for r in rows if r.relative_change is not None]
        return "ok-moved", f"{first.declared} → moved {format_changes(sizes)}"
    return "note", f"{first.declared} → {first.verdict}"


def _heat_maps(anatomy: Anatomy, result: Audit, figures: Any, value: str) -> list[Page]:
    """Per stage one map: layers by parts, and the parts outside the layers as rows of their own."""
    values = [v for r in result.rows if (v := getattr(r, value)) is not None and math.isfinite(v) and v > 0]
    if not values:
        return []
    limits = (min(values), max(values)) if min(values) < max(values) else (min(values) / 2, max(values))
    out = []
    for stage in result.stages:
        cells, rows, columns = _grid(anatomy, [r for r in result.rows if r.stage == stage], figures, value)
        label = "‖ΔW‖ / ‖W‖" if value == "relative_change" else "gradient norm"
        what = "How far each part moved" if value == "relative_change" else "Largest sampled gradient norm of each part"
        figure = figures.heat_map(
            rows,
            columns,
            cells,
            label=label,
            description=f"{what} in stage {stage}, by layer; hatched parts were frozen",
            limits=limits,
            logarithmic=value == "gradient_norm",
        )
        out.append({"stage": stage, "figure": figure})
    return out


def _grid(
    anatomy: Anatomy, rows: Sequence[Row], figures: Any, value: str
) -> tuple[dict[tuple[str, str], Any], list[str], list[str]]:
    """Cells by (row, column). Of several experts the largest value counts; a cell is frozen when all of it is."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if any(map(anatomy.learnable, anatomy.component[row.component].slices)):
            (first, index), *rest = parse_path(row.component)
            if first == "layers":
                column = ".".join(name for name, _ in rest)
                found.setdefault((f"layer {index}", column), []).append(row)
            else:
                found.setdefault((first, "whole"), []).append(row)
    cells = {}
    for key, members in found.items():
        numbers = [v for m in members if (v := getattr(m, value)) is not None]
        frozen = all(m.declared == "frozen" for m in members)
        cells[key] = figures.Cell(value=max(numbers, default=None), frozen=frozen)
    order = list(dict.fromkeys(r for r, _ in found))
    columns = list(dict.fromkeys(c for _, c in found if c != "whole"))
    return cells, order, [*columns, "whole"] if any(c == "whole" for _, c in found) else columns
