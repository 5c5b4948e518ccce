"""Runs of many stages hash and keep at a switch only what changes, and the audit still finds what moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open

from frostline import audit, train
from frostline.audit.rewind import rewind
from frostline.engine import StageStarted
from frostline.errors import RecipeError, RunFolderError
from frostline.model import load_model
from frostline.plan import Batching, make_plan
from frostline.prepared import prepare
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder

LEARNS = ["layers[0]", "layers[1]", "layers[0]", "embed"]


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    stages = [{"name": f"s{i}", "learn": x, "steps": 2, "lr": 1e-3} for i, x in enumerate(LEARNS)]
    evidence = {"at_switch": "changing", "gradients_every": 1}
    return tiny.recipe(folder, **{"stages": stages, "evidence": evidence, "eval": {"batches": 1}, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("changing")
    assert train(recipe_of(place), out=place / "run").audit.passed
    return place


def test_a_switch_hashes_what_has_learned_or_is_about_to_and_the_ends_hash_everything(folder: Path) -> None:
    run = RunFolder.open(folder / "run")
    hashed = [set(b.hashes) for b in run.read_boundaries()]
    learning = [{str(p) for p in s.learning} for s in run.read_schedule()]
    assert hashed[0] == hashed[4] >= set().union(*learning)
    assert [hashed[k] for k in (1, 2, 3)] == [learning[k - 1] | learning[k] for k in (1, 2, 3)]


def test_values_are_kept_where_a_part_learns_for_the_first_time(folder: Path) -> None:
    run = RunFolder.open(folder / "run")
    kept = []
    for stage in run.read_schedule():
        with safe_open(run.entry(stage.index), framework="pt") as file:
            kept.append(set(file.keys()))
    learning = [{str(p) for p in s.learning} for s in run.read_schedule()]
    assert kept == [learning[0], learning[1], set(), learning[3]]


def test_every_stage_has_the_verdicts_of_a_run_that_hashes_everything(folder: Path, tmp_path: Path) -> None:
    full = train(recipe_of(tmp_path, evidence={"gradients_every": 1}), out=tmp_path / "run").audit
    lean = audit(folder / "run")
    assert [(r.component, r.stage, r.declared, r.verdict) for r in lean.rows] == [
        (r.component, r.stage, r.declared, r.verdict) for r in full.rows
    ]
    assert [e.claim for e in lean.evidence] == [e.claim for e in full.evidence]


@pytest.mark.parametrize(("when", "found_in"), [("s0", "s3"), ("s3", "s3")])
def test_a_frozen_part_that_moves_between_hashes_is_found_all_the_same(
    tmp_path: Path, when: str, found_in: str
) -> None:
    model: list[torch.nn.Module] = []

    def meddle(event: object) -> None:
        if isinstance(event, StageStarted) and event.stage.name == when:
            with torch.no_grad():
                dict(model[0].named_parameters())["model.layers.2.mlp.up_proj.weight"][0, 0] += 1

    from frostline import ready as ready_module

    real = ready_module.load_weights

    def load(*args: Any, **options: Any) -> torch.nn.Module:
        model.append(real(*args, **options))
        return model[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_module, "load_weights", load)
        result = train(recipe_of(tmp_path), out=tmp_path / "run", observers=[meddle])
    moved = [(r.component, r.stage) for r in result.audit.rows if r.verdict == "FROZEN BUT MOVED"]
    assert moved == [("layers[2].ffn.up", found_in)]
    assert not result.audit.passed


def test_a_part_that_moves_while_frozen_is_found_when_it_learns_again(tmp_path: Path) -> None:
    """Layer 0 learns in s0 and s2; what moved it in s1 shows at the switch into s2."""
    from frostline import ready as ready_module

    model: list[torch.nn.Module] = []
    real = ready_module.load_weights

    def load(*args: Any, **options: Any) -> torch.nn.Module:
        model.append(real(*args, **options))
        return model[0]

    def meddle(event: object) -> None:
        if isinstance(event, StageStarted) and event.stage.name == "s1":
            with torch.no_grad():
                dict(model[0].named_parameters())["model.layers.0.mlp.up_proj.weight"][0, 0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_module, "load_weights", load)
        result = train(recipe_of(tmp_path), out=tmp_path / "run", observers=[meddle])
    assert [(r.component, r.stage) for r in result.audit.rows if r.verdict == "FROZEN BUT MOVED"] == [
        ("layers[0].ffn.up", "s1")
    ]


def test_a_hash_that_is_missing_where_it_is_due_fails_the_audit(tmp_path: Path) -> None:
    train(recipe_of(tmp_path), out=tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    data = run.read_json("evidence/boundary-2.json")
    gone = next(n for n in data["hashes"] if n.startswith("model.layers.0."))
    del data["hashes"][gone]
    run.write_json("evidence/boundary-2.json", {k: v for k, v in data.items() if k != "schema"})
    assert not audit(tmp_path / "run").passed


def test_a_run_that_stops_at_a_stages_end_is_whole_so_far(tmp_path: Path) -> None:
    stopped: list[bool] = []

    def note(event: object) -> None:
        if type(event).__name__ == "StageEnded" and event.stage.name == "s1":  # type: ignore[attr-defined]
            stopped.append(True)
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    result = train(recipe_of(tmp_path), out=tmp_path / "run", observers=[note])
    assert result.state == "interrupted"
    assert result.audit.verdict == "interrupted"
    from frostline.resume import resume

    assert resume(tmp_path / "run").audit.passed
    again = train(recipe_of(tmp_path), out=tmp_path / "again")
    first, second = (RunFolder.open(tmp_path / n).read_boundaries() for n in ("run", "again"))
    assert first == second
    assert again.audit.passed


def test_the_start_can_be_brought_back_and_a_stage_in_between_cannot(folder: Path) -> None:
    run = RunFolder.open(folder / "run")
    model = load_model(str(run.model))
    rewind(model, run, 0)
    with pytest.raises(RunFolderError, match="keeps no values of the stages in between"):
        rewind(model, run, 2)


def test_the_plan_counts_what_is_hashed_and_kept(folder: Path) -> None:
    for at_switch in ("everything", "changing"):
        recipe = recipe_of(folder, evidence={"at_switch": at_switch, "gradients_every": 1})
        schedule = prepare(recipe).schedule
        plan = make_plan(recipe.model, schedule, Batching(rows=4, length=32))
        total, (layer, _, _, embed) = plan.stages[0].cost.weight_bytes, [s.selection.n_bytes for s in schedule.stages]
        if at_switch == "everything":
            assert plan.hashed_bytes == 5 * total
            assert [s.evidence_bytes for s in plan.stages] == [layer, layer, layer, embed]
        else:
            assert [s.hashed_bytes for s in plan.stages] == [2 * layer, 2 * layer, layer + embed, total]
            assert [s.evidence_bytes for s in plan.stages] == [layer, layer, 0, embed]


def test_a_rollback_needs_what_a_stage_started_with(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="to which a rollback may have to go back"):
        recipe_of(tmp_path, nonfinite={"policy": "rollback"}, checkpoint={"every": 1})
