"""The audit: reads a run folder, imports no engine, and says whether what was asked is what happened.

Per stage and piece: a frozen piece must have the same bytes before and after; a learning piece must have moved, or
there must be an honest reason why not. Then the checks on the whole run. Read `audit` first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frostline.anatomy import Anatomy, Neighbours, Slice, intersect, refine
from frostline.audit.checks import check_records, evidence_of
from frostline.audit.movement import Movement, measure, total
from frostline.audit.states import States
from frostline.audit.steps import without_update
from frostline.audit.verdicts import NO_SIGNAL, WORST_FIRST, Audit, Declared, Row, Verdict
from frostline.run_folder import Boundary, RunFolder, StageRecord, damaged_records


@dataclass(frozen=True, slots=True)
class _Finding:
    """One piece in one stage."""

    name: str
    piece: Slice
    learns: bool
    parameter: bool
    verdict: Verdict
    movement: Movement | None
    gradient_norm: float | None


def audit(run: str | Path) -> Audit:
    """Audit a run folder from its files alone. Raises `RunFolderError` when it is no run folder or unreadable."""
    folder = RunFolder.open(run)
    with damaged_records(folder.path):
        return _audit(folder)


def _audit(folder: RunFolder) -> Audit:
    anatomy, stages = folder.read_anatomy(), folder.read_schedule()
    boundaries = folder.read_boundaries()
    check_records(anatomy, stages, boundaries)
    if not folder.keeps_all_at_switches():
        boundaries = carried(boundaries, stages)
    pieces = _pieces(anatomy, stages)
    states = States(folder, anatomy, pieces, n_stages=len(stages))
    gradients, updates = _gradient_norms(folder, len(stages)), _updates(folder, len(stages))
    idle = without_update(folder, stages)
    rows: list[Row] = []
    for stage in stages:
        findings = _findings(
            anatomy,
            stage,
            pieces,
            boundaries,
            states,
            gradients[stage.index],
            updates[stage.index],
            idle=idle.get(stage.index),
        )
        rows += _rows(anatomy, stage, findings)
    evidence = evidence_of(folder, anatomy, stages, boundaries, pieces, states, rows)
    return Audit(
        run=str(folder.path),
        stages=tuple(s.name for s in stages),
        rows=tuple(rows),
        evidence=tuple(evidence),
        interrupted=folder.read_status()["state"] == "interrupted",
    )


def carried(boundaries: list[Boundary], stages: list[StageRecord]) -> list[Boundary]:
    """Boundaries with the hashes that were not taken at a switch, because a piece learned neither before nor after it.

    They are those from before: a frozen piece that moved shows at the next switch that hashes it, or at the end.
    """
    out = boundaries[:1]
    for b in boundaries[1:]:
        due = {str(p) for s in stages[b.index - 1 : b.index + 1] for p in s.learning}
        ended = b.index == len(stages)
        kept = {} if ended else {n: h for n, h in out[-1].hashes.items() if n not in due}
        out.append(replace(b, hashes={**kept, **b.hashes}))
    return out


def _pieces(anatomy: Anatomy, stages: list[StageRecord]) -> dict[str, Slice]:
    """Every piece by its text: the components' slices, cut where a stage's learning slices cut them."""
    pieces = [s for c in anatomy.components for s in c.slices if s.tensor not in anatomy.ties]
    for stage in stages:
        pieces = [*refine(pieces, stage.learning)]
    return {str(p): p for p in pieces}


def _gradient_norms(folder: RunFolder, n_stages: int) -> list[dict[str, float | None]]:
    """Per stage: piece → its largest sampled gradient norm; None where no gradient arrived at any sample."""
    largest: list[dict[str, float | None]] = [{} for _ in range(n_stages)]
    for sample in folder.read_gradients():
        seen = largest[sample.stage]
        for name, norm in sample.norms.items():
            old = seen.get(name)
            seen[name] = norm if old is None else old if norm is None else max(old, norm)
    return largest


def _updates(folder: RunFolder, n_stages: int) -> list[dict[str, tuple[int, int]]]:
    """Per stage: piece in fewer bits than fp32 → (updated, lost) elements, over the measured steps."""
    out: list[dict[str, tuple[int, int]]] = [{} for _ in range(n_stages)]
    for sample in folder.read_updates():
        seen = out[sample.stage]
        for name, (wanted, lost) in sample.updates.items():
            before = seen.get(name, (0, 0))
            seen[name] = (before[0] + wanted, before[1] + lost)
    return out


def _findings(
    anatomy: Anatomy,
    stage: StageRecord,
    pieces: dict[str, Slice],
    boundaries: list[Boundary],
    states: States,
    gradients: dict[str, float | None],
    updates: dict[str, tuple[int, int]],
    *,
    idle: Verdict | None,
) -> list[_Finding]:
    """Every piece in one stage. `idle`: why the stage made no update, if it made none."""
    learning = {str(s) for s in stage.learning}
    reached = stage.index + 1 < len(boundaries)
    floor = NO_SIGNAL * max((_rms(n, pieces[name]) for name, n in gradients.items() if n), default=0.0)
    findings = []
    for name, piece in pieces.items():
        learns, parameter = name in learning, anatomy.learnable(piece)
        norm = gradients.get(name)
        if not reached:
            findings.append(_Finding(name, piece, learns, parameter, "not reached", None, norm))
            continue
        before, after = (boundaries[stage.index + k].hashes.get(name, "missing") for k in (0, 1))
        movement = _movement(name, before, after, states)
        if piece.tensor in boundaries[0].derived and not parameter:
            verdict: Verdict = "derived"
        elif not learns:
            verdict = "unchanged" if before == after != "missing" else "FROZEN BUT MOVED"
        elif idle and before == after:
            verdict = idle
        elif not parameter:
            verdict = "moved by rule" if before != after else "unchanged"
        elif norm == 0:
            verdict = "zero gradient"
        elif norm is not None and _rms(norm, piece) <= floor:
            verdict = "no signal"
        elif before != after:
            verdict = "moved"
        elif norm is None and name in gradients:
            verdict = "no gradient"
        else:
            wanted, unseen = updates.get(name, (0, 0))
            lost = wanted == unseen > 0 or _too_small_to_show(states.value(name, before), stage)
            verdict = "lost to rounding" if lost else "LEARNING BUT UNMOVED"
        findings.append(_Finding(name, piece, learns, parameter, verdict, movement, norm))
    return findings


def _too_small_to_show(value: torch.Tensor | None, stage: StageRecord) -> bool:
    """Whether no step of the stage can have reached the next number of any element's dtype.

    A step of Adam is at most lr · max(1, (1-β₁)/√(1-β₂)), of Lion lr, of SGD lr · clip / (1 - momentum), because
    clipping bounds every element of the gradient; weight decay adds lr · decay · |w|. Of settings by part, the largest
    counts for every part.
    """
    largest = _largest_step(stage.settings) if stage.settings else None
    if value is None or largest is None:
        return False
    lr, decay = (max(_values(v)) for v in (stage.settings["lr"], stage.settings["optimizer"]["weight_decay"]))
    size = value.abs() if value.dtype in (torch.float32, torch.float64) else value.float().abs()
    half_gap = (torch.nextafter(size, torch.full_like(size, math.inf)) - size) / 4  # below a power of two it halves
    return bool((lr * largest + lr * decay * size < half_gap).all())


def _largest_step(settings: Mapping[str, Any]) -> float | None:
    """How far one step can move an element, without weight decay, in units of the learning rate; None for no bound."""
    optimizer, clip = settings["optimizer"], settings["clip"]
    match optimizer["name"]:
        case "adam" | "adamw":
            pairs = _values(optimizer["betas"] or (0.9, 0.999))
            return float(max(1.0, *((1 - b1) / math.sqrt(1 - b2) for b1, b2 in pairs)))
        case "lion":
            return 1.0
        case "sgd" if clip is not None:
            return float(clip / (1 - (optimizer["momentum"] or 0.0)))
    return None


def _values(setting: Any) -> list[Any]:
    """The values of a setting that may differ by part."""
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def _rms(norm: float, piece: Slice) -> float:
    return norm / math.sqrt(max(piece.n_elements, 1))


def _movement(name: str, before: str, after: str, states: States) -> Movement | None:
    """Recomputed from files where both values are in them; None where not."""
    old, new = states.value(name, before), states.value(name, after)
    if before == after:
        n = states.pieces[name].n_elements
        norm = float(old.double().square().sum()) if old is not None else 0.0
        return Movement(n_elements=n, bytes_changed=0, squared_change=0.0, squared_norm=norm)
    return measure(old, new) if old is not None and new is not None else None


def _rows(anatomy: Anatomy, stage: StageRecord, findings: list[_Finding]) -> list[Row]:
    near = Neighbours(anatomy.owner)
    by_component: dict[str, list[_Finding]] = {}
    for f in findings:
        home = next(s for s in near.of(f.piece) if intersect(f.piece, s) is not None)
        by_component.setdefault(anatomy.owner[home].name, []).append(f)
    return [_row(c.name, stage, by_component[c.name]) for c in anatomy.components if c.name in by_component]


def _row(component: str, stage: StageRecord, findings: list[_Finding]) -> Row:
    parameters = [f for f in findings if f.parameter]
    n_learning = sum(f.learns for f in parameters)
    declared: Declared = "frozen" if not n_learning else "learns" if n_learning == len(parameters) else "learns in part"
    verdict = min((f.verdict for f in findings), key=WORST_FIRST.index)
    known = all(f.movement is not None for f in findings)
    movement = total(f.movement for f in findings if f.movement is not None)
    norms = [f.gradient_norm for f in findings if f.gradient_norm is not None]
    return Row(
        component=component,
        stage=stage.name,
        declared=declared,
        bytes_changed=movement.bytes_changed if known else None,
        relative_change=movement.relative_change if known else None,
        gradient_norm=math.sqrt(sum(n * n for n in norms)) if norms else None,
        verdict=verdict,
        basis="recomputed" if known and movement.bytes_changed else "recorded",
        details=tuple(
            f"{f.name}: {f.verdict}"
            for f in findings
            if f.verdict != verdict and not (f.verdict == "unchanged" and not f.learns)
        ),
    )


def audit_to_json(result: Audit) -> dict[str, Any]:
    """The audit as plain data; an infinite relative change is written as null."""
    rows = [asdict(r) for r in result.rows]
    for row in rows:
        for key in ("relative_change", "gradient_norm"):
            if row[key] is not None and not math.isfinite(row[key]):
                row[key] = None
    return {
        "run": result.run,
        "passed": result.passed,
        "verdict": result.verdict,
        "stages": list(result.stages),
        "rows": rows,
        "evidence": [asdict(e) for e in result.evidence],
    }
