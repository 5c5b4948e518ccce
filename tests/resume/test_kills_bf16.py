"""Runs with bf16 weights, and compiled ones, that are killed and resumed go on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_kills import check, recipe
from trials import Driver


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_killed_and_resumed_a_run_with_bf16_weights_ends_with_the_same_bytes(
    driver: Driver, tmp_path: Path, rounding: str
) -> None:
    """Four stages: slices, offloaded and kept state, parts that learn on through a switch."""
    data = recipe(tmp_path, precision="bf16", rounding=rounding)
    check(driver, data, [[{"after_step": k}] for k in (2, 5, 7)])


@pytest.mark.slow
def test_compiled_to_code_a_run_trains_as_uncompiled_and_resumes_to_the_same_bytes(
    driver: Driver, tmp_path: Path
) -> None:
    """Blocks compiled by inductor, to C++ on the CPU: every loss within 1e-3 of the uncompiled run's."""
    found = []
    for compiled in ("off", "blocks"):
        whole = check(driver, recipe(tmp_path, compile=compiled), [[{"after_step": k}] for k in (3, 6)])
        lines = (whole / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line).get("loss", 0.0) for line in lines])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[1] != found[0]  # it was compiled
