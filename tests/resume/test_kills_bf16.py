"""Runs with bf16 weights that are killed and resumed: masters, and chance, go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

from test_kills import check, recipe, run_trials


def test_killed_and_resumed_runs_with_bf16_weights_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Four stages: slices, offloaded and kept state, parts that learn on through a switch, a kill inside the second."""
    trials = []
    for rounding in ("masters", "stochastic"):
        data = recipe(tmp_path, precision="bf16", rounding=rounding)
        trials += [{"name": f"{rounding}-{k}", "recipe": data, "kills": [{"after_step": k}]} for k in (5, 7)]
    check(run_trials(tmp_path, trials), trials)
