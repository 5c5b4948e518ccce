"""The checks on a whole run: each is one claim with what was expected and what was found. Read `evidence_of` first."""

from __future__ import annotations

import math

from frostline.anatomy import Anatomy, Slice, intersect, reaches_outside, subtract_all
from frostline.audit.states import States
from frostline.audit.steps import inexact_resumes, steps_evidence
from frostline.audit.verdicts import RAN_TO_ITS_END, Basis, Evidence, Row
from frostline.choices import contradictions, read_choice
from frostline.environment import hash_file
from frostline.errors import FrostlineError, RunFolderError
from frostline.recipe import StageSpec, load_recipe, stage_name
from frostline.run_folder import Boundary, RunFolder, StageRecord
from frostline.schedule import StepSize, make_routes, plateaued
from frostline.selection import buffers_by_rule, select


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


def evidence_of(
    folder: RunFolder,
    anatomy: Anatomy,
    stages: list[StageRecord],
    boundaries: list[Boundary],
    pieces: dict[str, Slice],
    states: States,
    rows: list[Row],
) -> list[Evidence]:
    """Every check on a run, in the order in which they are shown."""

    def rows_that(claim: str, bad: str) -> Evidence:
        return _check(claim, [f"{r.component} (stage {r.stage})" for r in rows if r.verdict == bad], "recorded")

    return [
        rows_that("frozen parts that moved", "FROZEN BUT MOVED"),
        rows_that("learning parts that did not move, without a reason", "LEARNING BUT UNMOVED"),
        _ran_to_its_end(folder, stages, boundaries),
        _check(
            "kept entry values that contradict the recorded hashes",
            _mismatches(boundaries, states, stages, all_kept=folder.keeps_all_at_switches()),
            "recomputed",
        ),
        _saved_model(folder, boundaries, pieces, states),
        _model_files(folder),
        _foreign_tensors(states),
        _recipe(folder, anatomy, stages),
        *_choice(folder, anatomy),
        _finite(folder),
        _strays(folder, anatomy, stages),
        *steps_evidence(folder),
        *inexact_resumes(folder),
        *_lost_updates(folder, stages),
        *([_past_stops(folder, anatomy, stages, pieces)] if any(cut_off(s, anatomy) for s in stages) else []),
    ]


def _check(claim: str, found: list[str], basis: Basis) -> Evidence:
    """A claim that nothing of a kind is found."""
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    measured = ", ".join(found[:8]) + more or "none"
    return Evidence(claim=claim, expected="none", measured=measured, passed=not found, basis=basis)


def _ran_to_its_end(folder: RunFolder, stages: list[StageRecord], boundaries: list[Boundary]) -> Evidence:
    """Every stage was trained to its end, and its evidence written."""
    status = folder.read_status()
    again = f"; `frostline resume {folder.path}` goes on" if folder.has_recipe() else ""
    how = {
        "running": f", then it was killed, or it is under way{again}",
        "failed": f", then: {status.get('message')}{again}",
    }
    return Evidence(
        claim=RAN_TO_ITS_END,
        expected=f"{stages[-1].end} steps",
        measured=f"{status['step']} steps{how.get(status['state'], '')}",
        passed=status["step"] == stages[-1].end and len(boundaries) == len(stages) + 1,
        basis="recorded",
    )


def _saved_model(folder: RunFolder, boundaries: list[Boundary], pieces: dict[str, Slice], states: States) -> Evidence:
    """The saved model is what the run ended with."""
    ends = boundaries[-1].hashes if boundaries else {}
    has_model = folder.model.exists() or folder.has_recipe()  # a loop of the user's need not save one
    saved = [n for n, p in pieces.items() if p.tensor in states.stored and has_model]
    return _check(
        "pieces of the saved model that contradict the hash recorded at the end",
        [n for n in saved if states.model_hashes.get(n) != ends.get(n)],
        "recomputed",
    )


def _model_files(folder: RunFolder) -> Evidence:
    """Every file of the saved model is the one that was saved."""
    recorded = folder.read_model_files()
    there = {p.name: hash_file(p) for p in sorted(folder.model.glob("*")) if p.is_file()} if recorded else {}
    wrong = sorted(n for n in {*recorded, *there} if recorded.get(n) != there.get(n))
    if not recorded:
        wrong = ["no file of it was recorded"] if folder.model.exists() or folder.has_recipe() else []
    return _check("files of the saved model that are missing, new or changed", wrong, "recomputed")


def _foreign_tensors(states: States) -> Evidence:
    """The saved model holds nothing that the anatomy does not know, and its ties are whole."""
    return _check("tensors of the saved model that the anatomy does not account for", states.foreign, "recomputed")


def _recipe(folder: RunFolder, anatomy: Anatomy, stages: list[StageRecord]) -> Evidence:
    """The recipe, read again, asks for exactly what the schedule says learns."""
    claim = "stages that the recipe asks for otherwise than they were scheduled"
    if not folder.has_recipe():
        return _check(claim, [], "recomputed")
    try:
        recipe = load_recipe(folder.recipe)
    except FrostlineError as error:
        return _check(claim, [str(error).splitlines()[0]], "recomputed")
    wrong = []
    size = folder.read_step_size()
    step_size = StepSize(**size) if size else None
    if len(recipe.stages) != len(stages):
        wrong.append(f"{len(recipe.stages)} stages instead of {len(stages)}")
    choice = read_choice(folder)
    for i, (spec, stage) in enumerate(zip(recipe.stages, stages, strict=False)):
        learn = choice.of(spec.learn) if choice else spec.learn
        try:
            selection = select(anatomy, learn, ties="together" if recipe.ties == "together" else "error")
        except FrostlineError as error:
            wrong.append(f"{stage.name}: {error.args[0].splitlines()[0]}")
            continue
        by_rule = buffers_by_rule(selection) if spec.moe and spec.moe.bias is not None else ()
        wanted = (*selection.slices, *by_rule)
        same = not subtract_all(wanted, stage.learning) and not subtract_all(stage.learning, wanted)
        planned = step_size.n_steps(spec) if step_size else spec.steps
        if not same or stage.end != _due_end(folder, stage, spec, planned or 0) or stage.name != stage_name(recipe, i):
            wrong.append(f"{stage.name}: learn {spec.learn}, {planned} steps")
    return _check(claim, wrong, "recomputed")


def _choice(folder: RunFolder, anatomy: Anatomy) -> list[Evidence]:
    """What selections were resolved to, where that was measured or read from a file, follows from what was kept."""
    choice = read_choice(folder)
    if choice is None:
        return []
    try:
        wrong = contradictions(choice, anatomy)
    except FrostlineError as error:
        wrong = [str(error).splitlines()[0]]
    return [_check("selections that do not follow from their measurement or file", wrong, "recomputed")]


def _due_end(folder: RunFolder, stage: StageRecord, spec: StageSpec, planned: int) -> float:
    """The step a stage must have ended at: its time, or where the recorded held-out losses first stood still."""
    if spec.plateau is None:
        return stage.start + planned
    measured = {r["step"]: r["held_out_loss"] for r in folder.read_lines(folder.metrics) if "held_out_loss" in r}
    done = folder.read_status()["step"]  # an interrupted run has measured no further
    losses: list[float] = []
    for step in range(stage.start + spec.plateau.every, stage.start + planned, spec.plateau.every):
        if step > min(stage.end, done):
            break
        if not math.isfinite(measured.get(step, math.nan)):
            return math.nan  # equal to no step: the loss that decides was not recorded
        losses.append(measured[step])
        if plateaued(losses, spec.plateau):
            return step
    return stage.start + planned


def _strays(folder: RunFolder, anatomy: Anatomy, stages: list[StageRecord]) -> Evidence:
    """No gradient went where nothing learns, and every learning tensor could have one."""
    parts: dict[str, list[str]] = {}
    for c in anatomy.components:
        for tensor in dict.fromkeys(s.tensor for s in c.slices):
            parts.setdefault(tensor, []).append(c.name)
    strays = ((name, stages[g.stage].name) for g in folder.read_gradients() for name in g.stray)
    found = dict.fromkeys(f"{name} ({', '.join(parts.get(name, []))}; stage {stage})" for name, stage in strays)
    return _check(
        "gradients that went where nothing owns them, or could not go where they should", [*found], "recorded"
    )


def _lost_updates(folder: RunFolder, stages: list[StageRecord]) -> list[Evidence]:
    """Said, not judged: a recipe that rounds bf16 weights to the nearest has asked for it."""
    counts: dict[str, tuple[int, int]] = {}
    for sample in folder.read_updates():
        if sample.rounding == "nearest":
            name = stages[sample.stage].name
            wanted, lost = (sum(n[k] for n in sample.updates.values()) for k in (0, 1))
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + wanted, before[1] + lost)
    if not counts:
        return []
    shares = (f"{100 * lost / max(wanted, 1):.0f} % (stage {name})" for name, (wanted, lost) in counts.items())
    return [
        Evidence(
            claim="updates lost to bf16 rounding, at the measured steps",
            expected="any share: weights are rounded to the nearest number",
            measured=", ".join(shares),
            passed=True,
            basis="recorded",
        )
    ]


def _past_stops(folder: RunFolder, anatomy: Anatomy, stages: list[StageRecord], pieces: dict[str, Slice]) -> Evidence:
    """No gradient reached what a stage's routes cut off: the branch behind a stopped output, the layers before a
    stopped input (not with local losses, which those layers have for themselves)."""
    found: dict[str, None] = {}
    cut = {s.index: [c for c in anatomy.components if c.name.startswith(cut_off(s, anatomy))] for s in stages}
    for sample in folder.read_gradients():
        for name in (n for n, norm in sample.norms.items() if norm and cut[sample.stage] and n in pieces):
            hit = (c for c in cut[sample.stage] if any(intersect(s, pieces[name]) is not None for s in c.slices))
            found |= dict.fromkeys(f"{c.name} (stage {stages[sample.stage].name})" for c in hit)
    return _check("gradients that passed a stop", [*found], "recorded")


def cut_off(stage: StageRecord, anatomy: Anatomy) -> tuple[str, ...]:
    """What the names of parts begin with that a stage's routes leave no gradient: `layers[3].attn.`, `layers[0].`."""
    if "routes" not in stage.settings:
        return ()
    spec = StageSpec.model_validate(stage.settings)
    out: list[str] = []
    for route in make_routes(spec.routes, anatomy.n_layers):
        if route.mode == "stop" and route.point == "block.in" and spec.local_loss == "none":
            out += [f"layers[{i}]." for i in range(max(route.layers))]
        elif route.mode == "stop" and route.point.endswith(".out"):
            out += [f"layers[{i}].{route.point.removesuffix('out')}" for i in route.layers]
    return tuple(dict.fromkeys(out))


def _finite(folder: RunFolder) -> Evidence:
    """No recorded gradient is NaN or infinite."""
    samples = folder.read_gradients()
    bad = [
        f"{n} (step {g.step})" for g in samples for n, v in g.norms.items() if v is not None and not math.isfinite(v)
    ]
    if not samples and folder.has_recipe() and _took_a_step(folder):
        bad = [f"none is recorded: {folder.gradients.name} is gone or empty, and every stage's first step writes there"]
    return _check("recorded gradients that are not finite", bad, "recorded")


def _took_a_step(folder: RunFolder) -> bool:
    return any("loss" in row and not row.get("skipped") for row in folder.read_lines(folder.metrics))


def _mismatches(boundaries: list[Boundary], states: States, stages: list[StageRecord], *, all_kept: bool) -> list[str]:
    """Pieces whose kept entry value is missing or does not hash to what the boundary before the stage recorded.

    `all_kept`: not only where a piece learns for the first time.
    """
    out, known = [], set[str]()
    for stage in stages[: max(len(boundaries) - 1, 0)]:
        hashes = states.entry_hashes[stage.index]
        recorded = boundaries[stage.index].hashes
        due = [s for s in map(str, stage.learning) if all_kept or s not in known or s in hashes]
        out += [f"{s} (stage {stage.name})" for s in due if hashes.get(s) != recorded.get(s)]
        known |= set(map(str, stage.learning))
    return out
