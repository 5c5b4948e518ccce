"""Runs with bf16 weights that are killed and resumed: masters, and chance, go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from trials import Driver
from test_kills import check, recipe


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_killed_and_resumed_runs_with_bf16_weights_end_with_the_same_bytes(
    driver: Driver, tmp_path: Path, rounding: str
) -> None:
    """Four stages: slices, offloaded and kept state, parts that learn on through a switch, a kill inside the second."""
    check(driver, recipe(tmp_path, precision="bf16", rounding=rounding), [[{"after_step": k}] for k in (5, 7)])
