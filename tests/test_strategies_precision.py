"""Five shipped strategies in fp32 and bf16, eager and compiled: the benchmark of docs/precision.md on a small model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny

from frostline import train
from frostline.engine import compiled
from frostline.recipe import recipe_from_dict

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "precision.py"


@pytest.mark.slow
def test_five_strategies_pass_their_audits_in_every_precision_eager_and_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every compiled fp32 loss is within 1e-3 of the eager one: the benchmark's exit code says so."""
    spec = importlib.util.spec_from_file_location("precision", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    values = tiny.recipe_dict(tmp_path, stages=[{"learn": "all", "steps": 1, "lr": 1e-3}])
    train(recipe_from_dict(values), out=tmp_path / "base")
    text = tiny.write_text(tmp_path / "long.txt", n_words=12_000)
    arguments = [str(tmp_path / "base" / "model"), str(text), str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["precision.py", *arguments])
    with patch.object(compiled, "BACKEND", "aot_eager"):
        assert benchmark.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(benchmark.STEPS) * len(benchmark.SETTINGS)
