"""Steps that did not count: skipped ones, and those that a rollback took back. Read `steps_evidence`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from frostline.audit.verdicts import Evidence, Verdict
from frostline.errors import FrostlineError
from frostline.recipe import Recipe, load_recipe
from frostline.run_folder import RunFolder, StageRecord


def without_update(folder: RunFolder, stages: list[StageRecord]) -> dict[int, Verdict]:
    """Stages (0-based) that made no update, with the reason; of a loop of the user's, as far as its log tells."""
    if not folder.has_recipe():
        skips = Counter(r.get("stage") for r in folder.read_lines(folder.metrics) if r.get("skipped"))
        return {s.index: "every step skipped" for s in stages if skips[s.name] == s.end - s.start}
    rows = _steps(folder)
    updated = {r["stage"] for r in rows if not r.get("skipped")}
    skipped = {r["stage"] for r in rows}
    return {
        s.index: "every step skipped" if s.name in skipped else "no step done" for s in stages if s.name not in updated
    }


def steps_evidence(folder: RunFolder) -> list[Evidence]:
    """Whether every step follows the one before it; and checks on skipped steps and rollbacks, where there are some."""
    if not folder.has_recipe():
        return []
    wrong = list(_inconsistent(folder.read_all_lines(folder.metrics)))
    follows = Evidence(
        claim="steps that the log lacks, or has twice",
        expected="none",
        measured="; ".join(wrong[:3]) or "none",
        passed=not wrong,
        basis="recorded",
    )
    return [follows, *_skips_and_rollbacks(folder)]


def _skips_and_rollbacks(folder: RunFolder) -> list[Evidence]:
    if not any("rolled_back_to" in r or r.get("skipped") for r in folder.read_all_lines(folder.metrics)):
        return []
    try:
        recipe = load_recipe(folder.recipe)
    except FrostlineError:  # the check on the recipe fails for that
        return []
    return [e for e in (_skips(folder, recipe), _rollbacks(folder, recipe)) if e is not None]


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    return [r for r in folder.read_lines(folder.metrics) if "loss" in r]


def _skips(folder: RunFolder, recipe: Recipe) -> Evidence | None:
    rows = _steps(folder)
    runs = [len(list(group)) for skipped, group in groupby(rows, key=lambda r: bool(r.get("skipped"))) if skipped]
    finite = [r["step"] for r in rows if r.get("skipped") and math.isfinite(r["loss"]) and _is_finite(r)]
    if not runs:
        return None
    limit = recipe.nonfinite.limit if recipe.nonfinite.policy == "skip" else 0
    wrong = "".join(f"; step {s} was skipped although it is finite" for s in finite[:3])
    return Evidence(
        claim="steps skipped because they were not finite",
        expected=f"at most {limit} in a row",
        measured=f"{sum(runs)} of {len(rows)}, {max(runs)} in a row{wrong}",
        passed=max(runs) <= limit and not finite,
        basis="recorded",
    )


def _is_finite(row: dict[str, Any]) -> bool:
    return math.isfinite(row["gradient_norm"])


def _rollbacks(folder: RunFolder, recipe: Recipe) -> Evidence | None:
    rows = folder.read_all_lines(folder.metrics)
    markers = [r for r in rows if "rolled_back_to" in r]
    if not markers:
        return None
    limits = [recipe.nonfinite.limit] if recipe.nonfinite.policy == "rollback" else []
    limits += [recipe.spike.limit] if recipe.spike and recipe.spike.policy == "rollback" else []
    each = [
        f"step {r['step']} → {r['rolled_back_to']}, without batches {r['left_out'][0]} to {r['left_out'][1] - 1}"
        for r in markers
    ]
    return Evidence(
        claim="times the run went back, each with the batches it left out",
        expected=f"at most {max(limits, default=0)}",
        measured="; ".join([f"{len(markers)}: {each[0]}", *each[1:]]),
        passed=len(markers) <= max(limits, default=0),
        basis="recorded",
    )


def _inconsistent(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What of the log's steps does not follow: every one is the next, or the next after where a rollback went."""
    done, lost = 0, 0
    for row in rows:
        if "rolled_back_to" in row:
            back, (first, after) = row["rolled_back_to"], row["left_out"]
            if row["step"] != done + 1 or not 0 <= back <= done:
                yield f"a rollback at step {row['step']} to {back} does not follow step {done}"
            if (first, after) != (back + lost, done + 1 + lost):
                yield f"the rollback at step {row['step']} left out other batches than those of its steps"
            done, lost = back, lost + after - first
        elif "loss" in row:
            if row["step"] != done + 1:
                yield f"step {row['step']} follows step {done}"
            done = row["step"]


def inexact_resumes(folder: RunFolder) -> list[Evidence]:
    """What differed when the run was resumed all the same; it is not the run that it would have been without a stop."""
    if not (folder.path / "environment.json").exists():
        return []
    asked = " (--allow-inexact)" if folder.has_recipe() else ""
    resumes = folder.read_json("environment.json").get("resumed_inexactly", [])
    each = [f"after step {r['step']}: {', '.join(r['differences'])}" for r in resumes]
    if not each:
        return []
    return [
        Evidence(
            claim=f"resumed although something differed{asked}",
            expected="as it was said then",
            measured="; ".join(each),
            passed=True,
            basis="recorded",
        )
    ]
