"""What `auto` chooses, that it says so, and determinism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from frostline import levers, train
from frostline.engine import Chose
from frostline.errors import ModelError, RecipeError
from frostline.levers import cache_folder, determinism, kept_share, recompute_for
from frostline.prepared import plan_of, prepare
from frostline.resume import resume

CPU = torch.device("cpu")


def test_blocks_are_computed_again_only_when_the_run_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(tmp_path)
    plan = plan_of(prepare(recipe))
    assert plan is not None
    assert recompute_for(recipe, plan, CPU).value == "off"
    needed = max(s.cost.resident_bytes for s in plan.stages)
    monkeypatch.setattr(levers, "memory_of", lambda _: needed)
    chosen = recompute_for(recipe, plan, CPU)
    assert chosen.value == "blocks"
    assert "MiB" in chosen.why
    assert recompute_for(tiny.recipe(tmp_path, recompute="off"), plan, CPU).value == "off"


def test_compiled_blocks_in_fp32_on_a_cpu_compute_again_what_is_cheap(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, compile="blocks")
    plan = plan_of(prepare(recipe))
    assert recompute_for(recipe, plan, CPU).value == "0.8"
    assert recompute_for(recipe, None, torch.device("meta")).value == "off"  # as on a GPU, where it was not measured
    assert recompute_for(tiny.recipe(tmp_path, compile="blocks", precision="bf16-mixed"), plan, CPU).value == "off"
    assert recompute_for(tiny.recipe(tmp_path, compile="blocks", recompute=0.5), plan, CPU).value == "0.5"
    assert [kept_share(value) for value in ("off", "blocks", "0.5")] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(("share", "others"), [(0.5, {}), (1.5, {"compile": "blocks"}), (0.0, {"compile": "blocks"})])
def test_a_share_that_means_nothing_is_refused(tmp_path: Path, share: float, others: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="recompute"):
        tiny.recipe(tmp_path, recompute=share, **others)


def test_a_run_that_would_not_fit_computes_blocks_again_and_its_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    train(tiny.recipe(tmp_path), out=tmp_path / "plenty")
    monkeypatch.setattr(levers, "memory_of", lambda _: 1000)
    result = train(tiny.recipe(tmp_path), out=tmp_path / "little", observers=[said.append])
    assert [(e.setting, e.value) for e in said if isinstance(e, Chose)][:2] == [
        ("recompute", "blocks"),
        ("loss", "plain"),
    ]
    assert result.audit.passed
    assert all(c.flops_agree for c in result.checks)
    assert json.loads((tmp_path / "little" / "plan.json").read_text())["recompute"] is True
    assert (tmp_path / "little" / "metrics.jsonl").read_bytes() == (tmp_path / "plenty" / "metrics.jsonl").read_bytes()


def test_what_was_chosen_is_in_the_run_folder_and_what_was_asked_for_is_not_said(tmp_path: Path) -> None:
    fixed = {"recompute": "off", "loss": "plain", "freed_memory": "return", "cache": {"prefix": "off"}}
    for name, changes in (("auto", {}), ("fixed", fixed)):
        train(tiny.recipe(tmp_path, **changes), out=tmp_path / name)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "timing.jsonl").read_text().splitlines()]
        for name in ("auto", "fixed")
    }
    chosen = [r for r in rows["auto"] if r.get("event") == "setting"]
    assert [r["setting"] for r in chosen][:4] == ["recompute", "loss", "freed_memory", "cache.prefix"]
    assert all(r["why"] for r in chosen)
    assert not [r for r in rows["fixed"] if r.get("event") == "setting"]


def test_deterministic_holds_for_the_run_and_is_put_back(tmp_path: Path) -> None:
    seen: list[bool] = []
    recipe = tiny.recipe(tmp_path, deterministic=True)
    train(recipe, out=tmp_path / "run", observers=[lambda _: seen.append(torch.are_deterministic_algorithms_enabled())])
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["deterministic_algorithms"] is True


def test_a_deterministic_run_resumes_as_one(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, deterministic=True)
    whole = train(recipe, out=tmp_path / "whole")
    assert whole.audit.passed
    stopped = tmp_path / "stopped"

    class StopError(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "step", 0) == 4 and type(event).__name__ == "StepDone":
            raise StopError

    with pytest.raises(StopError):
        train(recipe, out=stopped, observers=[stop])
    resume(stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_an_operation_without_a_deterministic_way_is_an_error_for_people() -> None:
    with pytest.raises(ModelError, match="without such a way"), determinism(True):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set …")
    with pytest.raises(RuntimeError, match="shape"), determinism(True):
        raise RuntimeError("shape mismatch")


def test_the_cache_is_where_the_recipe_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder("/here") == Path("/here")
    monkeypatch.setenv("FROSTLINE_CACHE", "/there")
    assert cache_folder(None) == Path("/there/prefix")
    monkeypatch.delenv("FROSTLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/mine")
    assert cache_folder(None) == Path("/mine/frostline/prefix")
