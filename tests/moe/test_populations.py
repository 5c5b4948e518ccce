"""The benchmark of two populations, made small: what it prints is read from runs that pass their audit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_runs_and_moves_the_experts_that_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import moe_populations

    for name, value in {"BASE_STEPS": 24, "STEPS": 12, "ROWS": 32, "BYTES": 20_000, "MORE": 20_000}.items():
        monkeypatch.setattr(moe_populations, name, value)
    monkeypatch.setattr(sys, "argv", ["moe_populations", str(tmp_path), "--seeds", "0"])
    moe_populations.main()
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert {kind: s["parts_moved"] for kind, s in found["sets"].items()} == {"chosen": 6, "random": 6, "all": 24}
    assert {s["others_moved"] for s in found["sets"].values()} == {0}
    assert found["sets"]["all"]["n_learning"] == 4 * found["sets"]["chosen"]["n_learning"]
    assert capsys.readouterr().out.count("code gains") == 3
