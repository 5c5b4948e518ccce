"""Rows that are measured: their frozen blocks are computed once, and losses have the bytes of those computed whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_prefix_cache as runs
import tiny
import torch

from frostline.data import Batch
from frostline.engine.prefix import Split
from frostline.engine.prefix_ahead import AheadStore
from frostline.engine.prefix_reader import Kept, hashes_of_whole
from frostline.engine.prefix_store import RowStore

without_plans, calls = runs.without_plans, runs.calls
OFTEN: dict[str, Any] = {"eval": {"every": 2, "batches": 2}}
"""Rows: 2 × 4 held out, the second batch being whole."""


def held_out_store(folder: Path) -> Path:
    (found,) = (folder / "cache").glob("*-held-out")
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_held_out_losses_are_those_of_a_run_that_computes_them(tmp_path: Path, architecture: str) -> None:
    computing, _ = runs.trained(tmp_path, "computing", architecture, cache="off", **OFTEN)
    keeping, _ = runs.trained(tmp_path, "keeping", architecture, **OFTEN)
    reading, said = runs.trained(tmp_path, "reading", architecture, **OFTEN)
    assert computing["metrics.jsonl"].count(b"held_out_loss") == 9
    assert keeping == computing
    assert reading == computing
    assert "and 8 of 8 held-out ones" in said[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed"},
        {"model": tiny.config("llama", attention_dropout=0.3)},
        {"loss": "fused", "stage": {"learn": "head"}},
        {"eval": {"every": 2, "batches": 3, "keep": "keep.txt", "by_source": True}},
    ],
    ids=["bf16", "dropout above", "fused", "other sets, a last batch that is smaller"],
)
def test_so_they_are_under_every_setting(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "keep.txt").write_text("What is to be kept is a text of its own, as long as a few rows. " * 20)
    changes = OFTEN | changes
    if "keep" in changes["eval"]:
        changes["eval"] = {**changes["eval"], "keep": str(tmp_path / "keep.txt")}
    computing, _ = runs.trained(tmp_path, "computing", cache="off", **changes)
    keeping, said = runs.trained(tmp_path, "keeping", **changes)
    reading, _ = runs.trained(tmp_path, "reading", **changes)
    assert len(said) == 1
    assert keeping == computing
    assert reading == computing


def test_after_the_first_measurement_no_frozen_block_is_computed_for_one(tmp_path: Path, calls: list[int]) -> None:
    """Two batches, nine measurements: each frozen block twice, beside the steps of one epoch."""
    _, _ = runs.trained(tmp_path, "first", **OFTEN)
    n = len(calls)
    runs.trained(tmp_path, "second", **OFTEN)  # rows of the first run: one batch of each kind is checked
    frozen = [layer for layer in calls[n:] if layer == 0]
    looks, trial, checks = 2, 3, 2  # a row at the start and derived buffers; the trial; what another run kept
    assert len(frozen) == looks + trial + checks
    assert calls[n:].count(2) > 9 * 2


def test_two_stages_share_what_was_measured_and_a_stage_that_learns_below_does_not(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "learn": runs.LAST, "steps": 3, "lr": 1e-2},
        {"name": "b", "learn": f"{runs.LAST}.ffn", "steps": 3, "lr": 1e-2},
        {"name": "all", "learn": "all", "steps": 2, "lr": 1e-2},
        {"name": "c", "learn": runs.LAST, "steps": 3, "lr": 1e-2},
    ]
    computing, _ = runs.trained(tmp_path, "computing", cache="off", stages=stages, **OFTEN)
    keeping, _ = runs.trained(tmp_path, "keeping", stages=stages, **OFTEN)
    assert keeping == computing
    assert len(list((tmp_path / "cache").glob("*-held-out"))) == 2


def test_activations_that_another_code_kept_are_found_out(tmp_path: Path) -> None:
    computing, _ = runs.trained(tmp_path, "computing", cache="off", **OFTEN)
    runs.trained(tmp_path, "keeping", **OFTEN)
    folder = held_out_store(tmp_path)
    key = json.loads((folder / "key.json").read_text())
    shape = {name: key.pop(name) for name in ("rows", "shape", "dtype")}
    store = RowStore(folder, key, n_rows=shape["rows"], like=torch.zeros(shape["shape"]))
    old, tokens = store.read(range(8)), [int(e["tokens"]) for e in store._entries]
    store.clear()
    store.write(range(8), tokens, old * 1.5)
    store.close()
    reading, said = runs.trained(tmp_path, "reading", **OFTEN)
    assert reading == computing
    assert "not what is computed here now" in said[1]


def test_a_damaged_row_is_computed_again(tmp_path: Path) -> None:
    computing, _ = runs.trained(tmp_path, "computing", cache="off", **OFTEN)
    runs.trained(tmp_path, "keeping", **OFTEN)
    rows = held_out_store(tmp_path) / "rows.bin"
    data = bytearray(rows.read_bytes())
    data[-5] ^= 1
    rows.write_bytes(data)
    reading, said = runs.trained(tmp_path, "reading", **OFTEN)
    assert reading == computing
    assert said[1:] == ["on: rows that were damaged are computed again"]


def test_held_out_rows_that_have_no_room_are_computed_and_said(tmp_path: Path) -> None:
    computing, _ = runs.trained(tmp_path, "computing", cache="off", **OFTEN)
    keeping, said = runs.trained(tmp_path, "keeping", **OFTEN, cache_limit="100kB")
    assert keeping == computing
    assert "held-out ones are not kept" in said[0]


def test_what_evaluation_needs_beyond_it_ends_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "_suffices", lambda *_: False)
    computing, _ = runs.trained(tmp_path, "computing", cache="off", **OFTEN)
    keeping, said = runs.trained(tmp_path, "keeping", **OFTEN)
    assert keeping == computing
    assert said[1] == "off: in evaluation, what lies above the frozen blocks reads more of them than their output"


def test_a_loss_in_evaluation_that_is_another_one_is_seen(tmp_path: Path) -> None:
    """A block above that looks at what a block below left behind, in evaluation only."""
    left: dict[str, torch.Tensor] = {}
    blocks = torch.nn.ModuleList([runs.Leaky("left", left, i) for i in range(3)])

    def loss(_model: Any, batch: Batch) -> torch.Tensor:
        hidden = torch.nn.functional.one_hot(batch.input_ids, 4).float()
        for block in blocks:
            hidden = block(hidden)
        return hidden.square().sum()

    ids = torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(0))
    batch, split = Batch(input_ids=ids, labels=ids, indices=(0, 1)), Split(blocks=tuple(blocks), at=2)
    store = AheadStore(RowStore(tmp_path / "store", {}, n_rows=2, like=torch.zeros(6, 4)), torch.device("cpu"))
    said: list[str] = []
    kept = Kept(split, store, lambda *_: None, said.append, is_tried=False)
    with torch.no_grad():
        assert torch.equal(kept.loss(blocks, batch, [0, 1], [1, 2], loss), loss(blocks, batch))
    assert "reads more" in said[0]
    assert not store.has([0, 1], [1, 2])
    store.close()


def test_a_row_beside_another_row_is_another_row() -> None:
    ids = torch.arange(12).reshape(3, 4)

    def hashes(rows: list[int]) -> list[int]:
        return hashes_of_whole(Batch(input_ids=ids[rows], labels=ids[rows]))

    assert hashes([0, 1]) == hashes([0, 1])
    assert not set(hashes([0, 1])) & set(hashes([0, 2]))
    assert not set(hashes([0, 1])) & set(hashes([0]))
    assert len(set(hashes([1, 1]))) == 2
