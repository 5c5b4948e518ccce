"""The audit: reads a run folder, imports no engine, and says whether what was asked is what happened.

Per stage and piece: a frozen piece must have the same bytes before and after; a learning piece must have moved, or
there must be an honest reason why not. Then the checks on the whole run. Read `audit` first.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from frostline.anatomy import Anatomy, Slice, intersect, reaches_outside, refine, subtract_all
from frostline.audit.movement import Movement, measure, total
from frostline.audit.states import States
from frostline.environment import hash_file
from frostline.errors import FrostlineError, RunFolderError
from frostline.recipe import load_recipe, stage_name
from frostline.run_folder import Boundary, RunFolder, StageRecord, damaged_records
from frostline.selection import select

NO_SIGNAL = 1e-6
"""A piece whose gradient's root mean square stays below this share of the stage's largest carries no signal: that
is rounding (fp32 has 6e-8) of a gradient that is zero by structure, as for the key bias of softmax attention."""

Declared = Literal["learns", "frozen", "learns in part"]
Basis = Literal["recomputed", "recorded"]

Verdict = Literal[
    "unchanged",
    "moved",
    "FROZEN BUT MOVED",
    "LEARNING BUT UNMOVED",
    "lost to rounding",
    "no signal",
    "zero gradient",
    "no gradient",
    "derived",
    "not reached",
]
"""`unchanged`, `moved`: as declared. `lost to rounding`: no step could be large enough to
reach the next number that the piece's dtype has. `no signal`: its gradient is zero but for rounding.
`zero gradient`: exactly zero at every sampled step, as for an expert that no token is routed to. `no gradient`: the
loss does not depend on it. `derived`: a buffer that the forward pass itself rewrites. `not reached`: the run stopped
before."""

FAILED: frozenset[str] = frozenset({"FROZEN BUT MOVED", "LEARNING BUT UNMOVED"})
_WORST_FIRST: tuple[Verdict, ...] = (
    "FROZEN BUT MOVED",
    "LEARNING BUT UNMOVED",
    "moved",
    "lost to rounding",
    "no signal",
    "zero gradient",
    "no gradient",
    "unchanged",
    "derived",
    "not reached",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One component in one stage."""

    component: str
    stage: str
    declared: Declared
    bytes_changed: int | None
    """Bytes that differ; None when they moved and no file of the run holds both values."""
    relative_change: float | None
    """‖Δ‖/‖w‖ over the component's parameters; None as above."""
    gradient_norm: float | None
    """Largest recorded L2 norm of the gradient over what learns; None when none arrived or nothing learns."""
    verdict: Verdict
    basis: Basis
    """`recomputed` from weight files, or `recorded`: a hash that the run wrote."""
    details: tuple[str, ...] = ()
    """Pieces whose verdict differs from the component's, with that verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One checked claim about the whole run."""

    claim: str
    expected: str
    measured: str
    passed: bool
    basis: Basis


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Every row and every check of one run."""

    run: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    evidence: tuple[Evidence, ...]

    @property
    def passed(self) -> bool:
        """Whether what was asked is what happened."""
        return all(e.passed for e in self.evidence)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not as declared."""
        return tuple(r for r in self.rows if r.verdict in FAILED)


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
    pieces = _pieces(anatomy, stages)
    states = States(folder, anatomy, pieces, n_stages=len(stages))
    gradients = _gradient_norms(folder, len(stages))
    rows: list[Row] = []
    for stage in stages:
        findings = _findings(anatomy, stage, pieces, boundaries, states, gradients[stage.index])
        rows += _rows(anatomy, stage, findings)
    evidence = _evidence(folder, anatomy, stages, boundaries, pieces, states, rows)
    return Audit(
        run=str(folder.path),
        stages=tuple(s.name for s in stages),
        rows=tuple(rows),
        evidence=tuple(evidence),
    )


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


def _findings(
    anatomy: Anatomy,
    stage: StageRecord,
    pieces: dict[str, Slice],
    boundaries: list[Boundary],
    states: States,
    gradients: dict[str, float | None],
) -> list[_Finding]:
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
        elif norm == 0:
            verdict = "zero gradient"
        elif norm is not None and _rms(norm, piece) <= floor:
            verdict = "no signal"
        elif before != after:
            verdict = "moved"
        elif norm is None and name in gradients:
            verdict = "no gradient"
        else:
            lost = _too_small_to_show(states.value(name, before), stage)
            verdict = "lost to rounding" if lost else "LEARNING BUT UNMOVED"
        findings.append(_Finding(name, piece, learns, parameter, verdict, movement, norm))
    return findings


def _too_small_to_show(value: torch.Tensor | None, stage: StageRecord) -> bool:
    """Whether no step of the stage can have reached the next number of any element's dtype.

    Adam's step is at most lr · max(1, (1-β₁)/√(1-β₂)), and weight decay adds lr · decay · |w|. SGD has no such bound.
    """
    optimizer = stage.settings.get("optimizer", {})
    if value is None or optimizer.get("name") not in ("adam", "adamw"):
        return False
    lr, decay = float(stage.settings["lr"]), float(optimizer.get("weight_decay", 0.0))
    beta1, beta2 = optimizer.get("betas") or (0.9, 0.999)
    size = value.float().abs()
    half_gap = (torch.nextafter(size, torch.full_like(size, math.inf)) - size) / 4  # below a power of two it halves
    return bool((lr * max(1.0, (1 - beta1) / math.sqrt(1 - beta2)) + lr * decay * size < half_gap).all())


def check_records(anatomy: Anatomy, stages: list[StageRecord], boundaries: list[Boundary]) -> None:
    """Raise `RunFolderError` unless schedule and boundaries belong together and to the anatomy."""
    problems = []
    end = 0
    for i, stage in enumerate(stages):
        if stage.index != i or stage.start != end or not isinstance(stage.end, int) or stage.end <= stage.start:
            problems.append(f"stage {i} does not follow the one before it")
        end = stage.end if isinstance(stage.end, int) else end
        for piece in stage.learning:
            info = anatomy.tensor.get(piece.tensor)
            if info is None or reaches_outside(piece, info.shape):
                problems.append(
                    f"stage {stage.name} trains {piece.tensor}, or elements of it, that the model does not have"
                )
    names = [s.name for s in stages]
    if not stages or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        problems.append("stages must have names of their own")
    if any(b.index != i for i, b in enumerate(boundaries)) or len(boundaries) > len(stages) + 1:
        problems.append("boundaries are out of order")
    if problems:
        raise RunFolderError("the schedule is damaged: " + "; ".join(problems[:3]))


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
    parts: dict[str, list[tuple[Slice, str]]] = {}
    for component in anatomy.components:
        for s in component.slices:
            parts.setdefault(s.tensor, []).append((s, component.name))
    by_component: dict[str, list[_Finding]] = {}
    for f in findings:
        owner = next(name for s, name in parts[f.piece.tensor] if intersect(f.piece, s) is not None)
        by_component.setdefault(owner, []).append(f)
    return [_row(c.name, stage, by_component[c.name]) for c in anatomy.components if c.name in by_component]


def _row(component: str, stage: StageRecord, findings: list[_Finding]) -> Row:
    parameters = [f for f in findings if f.parameter]
    n_learning = sum(f.learns for f in parameters)
    declared: Declared = "frozen" if not n_learning else "learns" if n_learning == len(parameters) else "learns in part"
    verdict = min((f.verdict for f in findings), key=_WORST_FIRST.index)
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


def _evidence(
    folder: RunFolder,
    anatomy: Anatomy,
    stages: list[StageRecord],
    boundaries: list[Boundary],
    pieces: dict[str, Slice],
    states: States,
    rows: list[Row],
) -> list[Evidence]:
    def rows_check(claim: str, bad: str) -> Evidence:
        found = [r for r in rows if r.verdict == bad]
        names = ", ".join(f"{r.component} (stage {r.stage})" for r in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return Evidence(
            claim=claim,
            expected="none",
            measured=f"{names}{more}" or "none",
            passed=not found,
            basis="recorded",
        )

    last, step = boundaries[-1] if boundaries else None, folder.read_status()["step"]
    entries = _mismatches(boundaries, states, stages)
    checks = [
        rows_check("frozen parts that moved", "FROZEN BUT MOVED"),
        rows_check("learning parts that did not move, without a reason", "LEARNING BUT UNMOVED"),
        Evidence(
            claim="every stage ran to its end",
            expected=f"{stages[-1].end} steps",
            measured=f"{step} steps",
            passed=step == stages[-1].end and len(boundaries) == len(stages) + 1,
            basis="recorded",
        ),
        Evidence(
            claim="kept entry values that contradict the recorded hashes",
            expected="none",
            measured=", ".join(entries[:8]) or "none",
            passed=not entries,
            basis="recomputed",
        ),
    ]
    wanted = {n: p for n, p in pieces.items() if p.tensor in states.stored}
    ends = last.hashes if last else {}
    wrong = [n for n in wanted if states.model_hashes.get(n) != ends.get(n)]
    checks.append(
        Evidence(
            claim="pieces of the saved model that contradict the hash recorded at the end",
            expected=f"none of {len(wanted)}",
            measured=", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "") or "none",
            passed=not wrong,
            basis="recomputed",
        )
    )
    checks += [_model_files(folder), _foreign_tensors(states), _recipe(folder, anatomy, stages), _finite(folder)]
    return checks


def _check(claim: str, found: list[str], basis: Basis) -> Evidence:
    """A claim that nothing of a kind is found."""
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    measured = ", ".join(found[:8]) + more or "none"
    return Evidence(claim=claim, expected="none", measured=measured, passed=not found, basis=basis)


def _model_files(folder: RunFolder) -> Evidence:
    """Every file of the saved model is the one that was saved."""
    recorded = folder.read_model_files()
    there = {p.name: hash_file(p) for p in sorted(folder.model.glob("*")) if p.is_file()} if recorded else {}
    wrong = sorted(n for n in {*recorded, *there} if recorded.get(n) != there.get(n))
    if not recorded:
        wrong = (
            ["no file of it was recorded"]
            if folder.model.exists() or (folder.path / "environment.json").exists()
            else []
        )
    return _check("files of the saved model that are missing, new or changed", wrong, "recomputed")


def _foreign_tensors(states: States) -> Evidence:
    """The saved model holds nothing that the anatomy does not know, and its ties are whole."""
    return _check("tensors of the saved model that the anatomy does not account for", states.foreign, "recomputed")


def _recipe(folder: RunFolder, anatomy: Anatomy, stages: list[StageRecord]) -> Evidence:
    """The recipe, read again, asks for exactly what the schedule says learns."""
    claim = "stages that the recipe asks for otherwise than they were scheduled"
    if not (folder.path / "environment.json").exists():  # a run of `train_loop` by itself has no recipe
        return _check(claim, [], "recomputed")
    try:
        recipe = load_recipe(folder.recipe)
    except FrostlineError as error:
        return _check(claim, [str(error).splitlines()[0]], "recomputed")
    wrong = []
    if len(recipe.stages) != len(stages):
        wrong.append(f"{len(recipe.stages)} stages instead of {len(stages)}")
    for i, (spec, stage) in enumerate(zip(recipe.stages, stages, strict=False)):
        try:
            selection = select(anatomy, spec.learn, ties="together" if recipe.ties == "together" else "error")
        except FrostlineError as error:
            wrong.append(f"{stage.name}: {error.args[0].splitlines()[0]}")
            continue
        same = not subtract_all(selection.slices, stage.learning) and not subtract_all(stage.learning, selection.slices)
        if not same or stage.end - stage.start != spec.steps or stage.name != stage_name(recipe, i):
            wrong.append(f"{stage.name}: learn {spec.learn}, {spec.steps} steps")
    return _check(claim, wrong, "recomputed")


def _finite(folder: RunFolder) -> Evidence:
    """No recorded gradient is NaN or infinite."""
    samples = folder.read_gradients()
    bad = [
        f"{n} (step {g.step})" for g in samples for n, v in g.norms.items() if v is not None and not math.isfinite(v)
    ]
    return _check("recorded gradients that are not finite", bad, "recorded")


def _mismatches(boundaries: list[Boundary], states: States, stages: list[StageRecord]) -> list[str]:
    """Pieces whose kept entry value is missing or does not hash to what the boundary before the stage recorded."""
    out = []
    for stage in stages[: max(len(boundaries) - 1, 0)]:
        hashes = states.entry_hashes[stage.index]
        recorded = boundaries[stage.index].hashes
        out += [f"{s} (stage {stage.name})" for s in map(str, stage.learning) if hashes.get(s) != recorded.get(s)]
    return out


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
        "stages": list(result.stages),
        "rows": rows,
        "evidence": [asdict(e) for e in result.evidence],
    }
