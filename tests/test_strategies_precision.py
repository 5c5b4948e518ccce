"""Five shipped strategies in fp32 and bf16, eager and compiled: the benchmark of docs/precision.md on a small model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny

from frostline import train
from frostline.engine import compiled
from frostline.recipe import recipe_from_dict

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "precision.py"


def precision_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("precision", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


PRECISION = precision_benchmark()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and a text."""
    folder = tmp_path_factory.mktemp("base")
    train(
        recipe_from_dict(tiny.recipe_dict(folder, stages=[{"learn": "all", "steps": 1, "lr": 1e-3}])),
        out=folder / "run",
    )
    tiny.write_text(folder / "long.txt", n_words=12_000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PRECISION.STEPS)
def test_five_strategies_pass_their_audits_in_every_precision_eager_and_compiled(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    """And every compiled fp32 loss is within 1e-3 of the eager one: the benchmark's exit code says so."""
    arguments = [str(base / "run" / "model"), str(base / "long.txt"), str(tmp_path / "runs"), "--only", strategy]
    monkeypatch.setattr(sys, "argv", ["precision.py", *arguments])
    with patch.object(compiled, "BACKEND", "aot_eager"):
        assert PRECISION.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(PRECISION.SETTINGS)
