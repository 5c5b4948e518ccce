"""The benchmark measures what it says: the same computation for every system, FLOPs as the plan counts them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import position_flops

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "systems")]

import bare  # noqa: E402
import frostline_  # noqa: E402
import promises  # noqa: E402
import run  # noqa: E402
from cells import CORE, Cell, all_cells, workload  # noqa: E402
from gemm import Sizes, attention_flops, products, step_flops  # noqa: E402
from job import Job  # noqa: E402
from show import lines_of, plot, table  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,
}


def row(
    system: str, seconds: list[float], *, void: bool = False, cell: str = "ffn llama-8k 512 fp32"
) -> dict[str, Any]:
    return {
        "cell": cell,
        "system": system,
        "void": void,
        "seconds": seconds,
        "tokens": [100] * len(seconds),
        "peak_bytes": 1e6,
        "losses": [2.0] * len(seconds),
        "job": {"epochs": 2},
        "flops": 200,
        "products_rate": 1e3,
    }


def test_cells_are_read_as_they_are_written_and_named_once() -> None:
    cells = list(all_cells())
    assert [Cell.parse(str(c)) for c in cells] == cells
    assert len({str(c) for c in cells}) == len(cells)
    assert cells[:12] == CORE
    assert len(CORE) == 12
    for wrong in ("ffn", "ffn llama", "ffn llama-8k 512 fp32 more"):
        with pytest.raises(ValueError, match="is no cell"):
            Cell.parse(wrong)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("lengths", ["24", "instructions"])
@pytest.mark.parametrize("learn", ["ffn", "attn", "last-1", "head"])
def test_frostline_computes_the_losses_of_the_bare_loop(tmp_path: Path, learn: str, lengths: str) -> None:
    cell = Cell(learn=learn, model="llama-8k", lengths=lengths)
    model, tokens = workload(cell, tmp_path, rows=6, sizes=SMALL)
    job = Job(model=model, tokens=tokens, learn=learn, batch=2, epochs=2, threads=torch.get_num_threads(), lr=1e-3)
    ours, theirs = frostline_.run(job), bare.run(job)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert len(set(theirs.losses)) == len(theirs.losses)  # it learns
    assert (ours.n_learning, ours.tokens, len(ours.seconds)) == (theirs.n_learning, theirs.tokens, 6)


@pytest.mark.parametrize("learn", ["all", "ffn", "attn", "last-2", "last-1", "head"])
def test_flops_of_a_cell_are_those_of_the_plan(tmp_path: Path, learn: str) -> None:
    from frostline.anatomy import read_anatomy
    from frostline.model import load_model
    from frostline.plan import Batching, make_plan
    from frostline.recipe import StageSpec
    from frostline.schedule import Schedule
    from frostline.selection import select

    model, _ = workload(Cell(learn=learn, model="llama-8k", lengths="24"), tmp_path, rows=2, sizes=SMALL)
    anatomy = read_anatomy(load_model(model))
    spec = StageSpec(learn=frostline_.expression(learn), steps=1, lr=1e-3)
    schedule = Schedule.of([("only", spec, select(anatomy, spec.learn))])
    cost = make_plan(model, schedule, Batching(rows=2, length=24)).stages[0].cost
    planned = cost.total_flops - position_flops(cost.flops)
    sizes, n = Sizes.of(SMALL), 2 * 24
    linear = sum(2 * m * k * n for m, k, n in products(sizes, learn, n))
    attention = attention_flops(sizes, learn, n, 24)
    assert step_flops(sizes, learn, n, 24) == linear + attention
    passed = {"all": 3, "ffn": 3, "attn": 3, "last-2": 2, "last-1": 1, "head": 0}[learn]
    passed -= learn == "ffn"  # nothing below the first attention learns
    # the plan counts whole squares, of which the causal half is computed, and 2.5 times forward for backward
    whole = 2 * 2 * n * 24 * sizes.hidden
    assert planned == linear + round((3 + 2.5 * passed) * whole)
    assert attention == whole // 2 * (3 + 2 * passed)


def test_void_and_failed_runs_do_not_count() -> None:
    rows = [
        row("bare loop", [1, 1, 1, 1.0]),
        row("Frostline", [9, 9, 9, 9.0], void=True),
        row("Frostline", [1, 1, 0.5, 0.5]),
        {"cell": "ffn llama-8k 512 fp32", "system": "TRL", "void": False, "error": "no"},
    ]
    ours = {line.system: line for line in lines_of(rows)}
    assert ours.keys() == {"bare loop", "Frostline"}
    line = ours["Frostline"]
    assert (line.first, line.later, line.laters, line.voids) == (100, 200, [200], 1)
    assert line.share == pytest.approx(200 / 0.5 / 1e3)
    assert "| 2.00 |" in table(ours.values())


def test_a_ratio_is_to_the_run_that_was_made_nearest() -> None:
    slow, fast = [1, 1, 1, 1.0], [1, 1, 0.5, 0.5]
    rows = [row("bare loop", slow), row("TRL", slow), row("bare loop", fast), row("Frostline", fast)]
    found = {line.system: line for line in lines_of(rows)}
    assert promises.later("Frostline", "bare loop")(found) == [1.0]


def test_promises_have_names_of_their_own_and_cells_that_are_measured() -> None:
    keys = [(p.cell, p.name) for p in promises.PROMISES]
    assert len(set(keys)) == len(keys)
    assert {cell for cell, _ in keys} <= {str(c) for c in all_cells()}


def test_a_promise_fails_by_its_floor_and_by_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "TARGETS", tmp_path / "targets.json")
    cell = "last-2 llama-8k 512 fp32"

    def verdict(seconds: float) -> str:
        lines = lines_of(
            [row("bare loop", [1, 1, 1, 1.0], cell=cell), row("Frostline", [1, 1, seconds, seconds], cell=cell)]
        )
        promises.write_targets(lines)
        (said,) = (r for r in promises.report(lines).splitlines() if r.startswith(f"| {cell} | tokens/s from epoch 2"))
        return said.split("|")[-2].strip()

    assert verdict(0.5) == "met"
    assert verdict(0.52) == "met"  # within 5 % of the target
    assert verdict(0.6) == "missed"  # above the floor of 1.45, but not within 5 % of 2
    assert (
        json.loads((tmp_path / "targets.json").read_text())[f"{cell}: tokens/s from epoch 2 on, × a bare loop"]["value"]
        == 2
    )
    (tmp_path / "targets.json").unlink()
    assert verdict(0.8) == "missed"  # below the floor


def test_targets_of_a_fresh_clone_are_those_that_were_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "WORK", tmp_path / "nothing here")
    monkeypatch.setattr(sys, "argv", ["run.py", "targets"])
    before = promises.TARGETS.read_bytes()
    run.main()
    assert capsys.readouterr().out.count("| met |") > 20
    assert promises.TARGETS.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["run.py", "table"])
    with pytest.raises(SystemExit, match=r"two-cores\.jsonl"):
        run.main()


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    lines = lines_of([row("bare loop", [1, 1, 1, 1.0]), row("Frostline", [1, 1, 0.5, 0.5])])
    plot([*lines, dataclasses.replace(lines[0], cell="head llama-8k 512 fp32")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
