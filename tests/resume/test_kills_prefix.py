"""Runs that read a frozen prefix from disk: killed, with the cache harmed before they go on, and two at once."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from trials import Driver

STAGES = [
    {"name": "last", "learn": "layers[-1]", "steps": 9, "lr": 3e-3, "accumulate": 2},
    {"name": "head", "learn": "layers[-1] | head", "steps": 4, "lr": 3e-3, "accumulate": 2, "state": "keep"},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Few rows, which come again from the fourth step on; equal for all, so that one run without kills is enough."""
    folder = tmp_path_factory.mktemp("prefix")
    cache = {"prefix": "on", "dir": str(folder / "cache"), "limit": "1GB"}
    data = tiny.recipe_dict(folder, stages=STAGES, cache=cache, checkpoint={"every": 2, "minutes": None})
    data["data"] = {**data["data"], "held_out": 0.85}
    return data


def said(folder: Path) -> list[str]:
    """What a run told of its cache."""
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    return [f"{r['value']}: {r['why']}" for r in rows if r.get("setting") == "cache.prefix"]


SECOND_EPOCH = [[{"after_step": 5}], [{"after_step": 6}, {"after_step": 7}], [{"micro_batch": 15}, {"after_step": 11}]]


@pytest.mark.parametrize("between", ["", "delete", "flip", "cut"])
def test_killed_in_the_second_epoch_with_a_prefix_cache_it_ends_with_the_same_bytes(
    driver: Driver, recipe: dict[str, Any], between: str
) -> None:
    """`between`: what becomes of the cache before the run goes on."""
    for kills in SECOND_EPOCH if between in ("", "delete") else SECOND_EPOCH[1:2]:
        found = driver.trial(recipe, kills, [], between=between)
        assert found["statuses"] == [*[signal.SIGKILL for _ in kills], 0], found
        assert found["differing"] == [], found
    schedule = json.loads((driver.root / found["whole"] / "schedule.json").read_text())["step_size"]
    assert 3 <= schedule["n_rows"] / schedule["rows"] < 4, "so that step 5 and later read rows that were kept"
    told = said(driver.root / found["name"])
    line = [s for s in told if "is kept" in s][-1]  # of the last process
    n, all_rows = (int(x) for x in line.split(": ")[2].split(" rows")[0].split(" of "))
    assert all_rows == schedule["n_rows"]
    assert (n == 0) == (between in ("delete", "cut"))
    assert any("damaged" in s for s in told) == (between in ("flip", "cut"))


@pytest.mark.parametrize("kills", [[], [{"at": "rows synced", "count": 2}], [{"after_step": 6}]], ids=str)
def test_two_processes_train_at_once_on_one_prefix_cache(
    driver: Driver, recipe: dict[str, Any], kills: list[dict[str, Any]]
) -> None:
    """From an empty cache and from a full one; with kills, one of them is killed while it fills the cache or reads."""
    for cache in ("empty", "kept"):
        if kills and "at" in kills[0] and cache == "kept":
            continue  # nothing is written then
        found = driver.trial(recipe, kills, [], beside=True, cache=cache)
        one_wrote = [s for s in found["statuses"] if s]
        assert set(one_wrote) <= {signal.SIGKILL}, found
        assert found["differing"] == [], found
        for folder in (driver.root / found["name"], driver.root / f"{found['name']}-beside"):
            value = said(folder)[0]
            assert value.startswith(("on: ", "off: ")), value
            assert value.startswith("on: ") or "is being made by another process" in value
