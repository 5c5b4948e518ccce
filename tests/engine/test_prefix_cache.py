"""The prefix cache: the same bytes with it and without it, and every way in which it must not be believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import all_types
import pytest
import tiny
import torch
from torch import nn
from versions import POSITIONS_MULTIPLY

from frostline import ready as ready_module
from frostline import train
from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine import Chose, compiled, next_token_loss, prefix_store
from frostline.engine.prefix import ChanceError, NoPrefixError, Split, split_of
from frostline.engine.prefix_store import RowStore, make_room
from frostline.engine.prefix_trial import tried
from frostline.errors import StorageError
from frostline.plan import why_not_worth
from frostline.prepared import plan_of, prepare
from frostline.recipe import Recipe, StageSpec, recipe_from_dict
from frostline.schedule import Schedule
from frostline.selection import select

LAST = "layers[-1]"
MORE: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "tie_word_embeddings": False},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "tie_word_embeddings": False},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "tie_word_embeddings": False},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
"""Architectures whose blocks pack their stream into a tuple, and some with dropout."""


@pytest.fixture(autouse=True)
def without_plans(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "with_plans" not in request.keywords:  # they take most of a run's time, and `on` needs none
        monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)


def recipe(
    folder: Path, architecture: str = "llama", *, cache: str = "on", cache_limit: str = "1GB", **changes: Any
) -> Recipe:
    """Three epochs of few rows."""
    stage = {"name": "last", "learn": LAST, "epochs": 3, "lr": 1e-2, **changes.pop("stage", {})}
    data = tiny.recipe_dict(folder, "llama" if architecture in MORE else architecture, stages=[stage])
    if architecture in MORE:
        data["model"] = {"architecture": architecture, "vocab_size": tiny.VOCABULARY, **MORE[architecture]}
    data["data"] |= {"held_out": 0.8}
    data["cache"] = {"prefix": cache, "dir": str(folder / "cache"), "limit": cache_limit}
    return recipe_from_dict(data | changes)


def trained(folder: Path, name: str, *args: Any, **changes: Any) -> tuple[dict[str, bytes], list[str]]:
    """What a run ends with, and what it said of its cache."""
    said: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Chose) and event.setting == "cache.prefix":
            said.append(f"{event.value}: {event.why}")

    result = train(recipe(folder, *args, **changes), out=folder / name, observers=[listen])
    assert result.audit.passed
    files = ("metrics.jsonl", "evidence/gradients.jsonl", "model/model.safetensors")
    return {f: (folder / name / f).read_bytes() for f in files}, said


def store_of(folder: Path) -> Path:
    (found,) = stores_of(folder)
    return found


def stores_of(folder: Path) -> list[Path]:
    """Of rows that are trained on; those that are measured have their own."""
    found = [p.parent for p in (folder / "cache").glob("*/key.json")]
    assert sum(p.name.endswith("-held-out") for p in found) <= len(found) // 2
    return [p for p in found if not p.name.endswith("-held-out")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are computed, in order."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    found: list[int] = []
    honest = LlamaDecoderLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.self_attn.layer_idx)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return found


FAMILIES = ["llama", "gemma", "olmo2", "qwen3", "gpt_neox", "gpt2", "bloom", "falcon", "opt"]
"""GPT-2 and OPT have dropout by default: of the embedding, and in every block."""


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_run_that_keeps_and_one_that_reads_end_with_the_bytes_of_one_that_computes(
    tmp_path: Path, architecture: str
) -> None:
    computing, said = trained(tmp_path, "computing", architecture, cache="off")
    assert said == []
    keeping, said = trained(tmp_path, "keeping", architecture)
    assert " 0 of 19 rows are there" in said[0]
    reading, said = trained(tmp_path, "reading", architecture)
    assert " 19 of 19 rows are there" in said[0]
    assert keeping == computing
    assert reading == computing


SETTINGS: dict[str, dict[str, Any]] = {
    "two micro-batches": {"stage": {"accumulate": 2}},
    "a head alone": {"stage": {"learn": "head"}},
    "the final norm": {"stage": {"learn": "final_norm"}},
    "one attention head": {"stage": {"learn": "layers[-1].attn.heads[1] | head.rows[5:9]"}},
    "all but the first block": {"stage": {"learn": "layers[1:]", "optimizer": "sgd"}},
    "bf16": {"precision": "bf16-mixed"},
    "recomputed blocks": {"recompute": "blocks", "stage": {"learn": "layers[1:]"}},
    "a fused loss": {"loss": "fused"},
    "a route above": {"stage": {"learn": "layers[1:]", "routes": [{"stop": "attn.out", "layers": "2:"}]}},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_whatever_learns_above_it_the_bytes_are_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    computing, _ = trained(tmp_path, "computing", cache="off", **changes)
    keeping, said = trained(tmp_path, "keeping", **changes)
    reading, _ = trained(tmp_path, "reading", **changes)
    assert said[0].startswith("on: ")
    assert keeping == computing
    assert reading == computing


def test_with_dropout_above_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = tiny.config("llama", attention_dropout=0.3)
    computing, _ = trained(tmp_path, "computing", cache="off", model=model)
    keeping, said = trained(tmp_path, "keeping", model=model)
    assert said[0].startswith("on: ")
    assert keeping == computing


def test_with_compiled_blocks_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at a stage's start computes blocks uncompiled; nothing of that may be kept."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    computing, _ = trained(tmp_path, "computing", cache="off", compile="blocks")
    keeping, said = trained(tmp_path, "keeping", compile="blocks")
    assert said[0].startswith("on: ")
    assert keeping == computing


def test_from_the_second_epoch_on_no_frozen_block_is_computed(tmp_path: Path, calls: list[int]) -> None:
    trained(tmp_path, "run", eval={"batches": 1}, stage={"steps": 15, "epochs": None})
    steps = calls[: -3 * 1]  # the held-out loss at the end
    assert steps[-8:] == [2] * 8
    assert 0 in steps[:30]


def test_two_stages_over_one_prefix_share_what_is_kept(tmp_path: Path, calls: list[int]) -> None:
    stages = [
        {"name": "a", "learn": LAST, "epochs": 1, "lr": 1e-2},
        {"name": "b", "learn": f"{LAST}.ffn | head | {LAST}.attn", "epochs": 1, "lr": 1e-2},
    ]
    computing, _ = trained(tmp_path, "computing", cache="off", stages=stages)
    n = len(calls)
    keeping, said = trained(tmp_path, "keeping", stages=stages)
    assert keeping == computing
    assert len(said) == 1
    assert calls[n:].count(0) < calls[:n].count(0)


def test_a_stage_that_learns_below_makes_another_prefix(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "learn": LAST, "epochs": 2, "lr": 1e-2},
        {"name": "all", "learn": "all", "steps": 2, "lr": 1e-2},
        {"name": "b", "learn": LAST, "epochs": 2, "lr": 1e-2},
    ]
    computing, _ = trained(tmp_path, "computing", cache="off", stages=stages)
    keeping, said = trained(tmp_path, "keeping", stages=stages)
    assert keeping == computing
    assert [s.split(":")[0] for s in said] == ["on", "off", "on"]
    assert len(stores_of(tmp_path)) == 2


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "embed learns, which lies below every block": ("llama", {"stage": {"learn": "all"}}),
    "the first block learns": ("llama", {"stage": {"learn": "ffn"}}),
    "embed learns": ("gpt2", {"stage": {"learn": "head"}, "ties": "together"}),
    "a gradient route lies below": ("llama", {"stage": {"routes": [{"stop": "attn.out", "layers": "1:"}]}}),
    "local losses": ("llama", {"stage": {"local_loss": "shared", "routes": []}}),
    "what experts compute for a row": ("mixtral", {}),
    "depends on chance": ("llama", {"model": tiny.config("llama", attention_dropout=0.3),
                                    "stage": {"frozen_dropout": "on"}}),
    "with `frozen_dropout: off` in the stage": ("gpt2", {"stage": {"frozen_dropout": "on"}}),
    "with `dropout` and `attention_dropout` of the model's configuration at 0": ("xglm", {}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_where_it_would_not_be_exact_it_is_off_and_says_why(tmp_path: Path, why: str) -> None:
    architecture, changes = REFUSED[why]
    _, said = trained(tmp_path, "run", architecture, **changes)
    assert said[0].startswith("off: ")
    assert why in said[0]
    assert not (tmp_path / "cache").exists()


def test_a_damaged_row_is_computed_again_and_said(tmp_path: Path) -> None:
    computing, _ = trained(tmp_path, "computing", cache="off")
    trained(tmp_path, "keeping")
    rows = store_of(tmp_path) / "rows.bin"
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(data)
    reading, said = trained(tmp_path, "reading")
    assert reading == computing
    assert said[1:] == ["on: rows that were damaged are computed again"]
    again, said = trained(tmp_path, "again")
    assert again == computing
    assert len(said) == 1


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    computing, _ = trained(tmp_path, "computing", cache="off")
    trained(tmp_path, "keeping")
    with (store_of(tmp_path) / "rows.bin").open("r+b") as file:
        file.truncate(1000)
    reading, said = trained(tmp_path, "reading")
    assert reading == computing
    assert "0 of 19 rows are there (what was there was damaged)" in said[0]


def test_activations_of_another_code_are_found_out(tmp_path: Path) -> None:
    """A change of the model's code that no version number tells."""
    computing, _ = trained(tmp_path, "computing", cache="off")
    trained(tmp_path, "keeping")
    folder = store_of(tmp_path)
    key = json.loads((folder / "key.json").read_text())
    for name in ("rows", "shape", "dtype"):
        key.pop(name)
    store = RowStore(folder, key, n_rows=19, like=torch.zeros(32, 32))
    old = store.read(range(19))
    tokens = [int(e["tokens"]) for e in store._entries]
    store.clear()
    store.write(range(19), tokens, old + 1e-6)
    store.close()
    reading, said = trained(tmp_path, "reading")
    assert reading == computing
    assert "not what is computed here now" in said[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data": {"length": 16}},
        {"data": {"batch": 2}},
        {"stage": {"accumulate": 2}},
        {"stage": {"learn": "layers[1:]"}},
        {"precision": "bf16-mixed"},
        {"model": tiny.config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e3})},
    ],
    ids=str,
)
def test_what_the_activations_depend_on_makes_another_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    trained(tmp_path, "first")
    changes = dict(changes)
    if "data" in changes:
        changes["data"] = {**tiny.recipe_dict(tmp_path)["data"], "held_out": 0.8, **changes["data"]}
    _, said = trained(tmp_path, "second", **changes)
    assert " 0 of " in said[0]
    assert len(stores_of(tmp_path)) == 2


def test_other_text_is_never_taken_for_the_text_that_was_kept(tmp_path: Path) -> None:
    like = torch.zeros(2, 3)
    store = RowStore(tmp_path / "store", {}, n_rows=4, like=like)
    store.write([1], [7], torch.ones(1, 2, 3))
    assert store.has([1], [7])
    assert not store.has([1], [8])
    assert not store.has([0], [7])
    store.close()


def test_a_row_is_entered_after_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(tmp_path / "store", {}, n_rows=4, like=torch.zeros(2, 3))
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        prefix_store, "reached", lambda point: seen.append((point, int((store._entries["mark"] != 0).sum())))
    )
    store.write([0, 2], [5, 6], torch.rand(2, 2, 3))
    assert seen == []
    store.commit()
    assert seen == [("rows synced", 0), ("entries synced", 2)]
    store.close()


def test_rows_come_back_with_their_bits_in_every_type(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.randn(3, 4, 5).to(dtype)
        values[0, 0, 0] = float("nan")
        store = RowStore(tmp_path / str(dtype), {}, n_rows=3, like=values[0])
        store.write([2, 0, 1], [1, 2, 3], values)
        back = store.read([2, 0, 1])
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
        store.close()


def test_a_cache_larger_than_its_limit_is_not_made(tmp_path: Path) -> None:
    cache = {"prefix": "on", "dir": str(tmp_path / "cache"), "limit": "10kB"}
    said: list[object] = []
    data = recipe(tmp_path).as_dict() | {"cache": cache}
    train(recipe_from_dict(data), out=tmp_path / "run", observers=[said.append])
    chosen = [e for e in said if isinstance(e, Chose) and e.setting == "cache.prefix"]
    assert chosen[0].value == "off"
    assert "the limit is 10,000" in chosen[0].why


def test_the_cache_used_longest_ago_makes_room_and_one_in_use_stays(tmp_path: Path) -> None:
    stores = {name: RowStore(tmp_path / name, {}, n_rows=10, like=torch.zeros(25)) for name in ("old", "new", "used")}
    for age, name in enumerate(("used", "old", "new")):
        os.utime(tmp_path / name / "key.json", (age, age))
    stores["old"].close()
    stores["new"].close()
    deleted = make_room(tmp_path, 1000, 3500, keep=tmp_path / "mine")
    assert [d.name for d in deleted] == ["old"]
    assert (tmp_path / "used" / "key.json").exists()
    with pytest.raises(StorageError, match="other caches in use"):
        make_room(tmp_path, 3000, 3500, keep=tmp_path / "mine")
    stores["used"].close()


def test_one_process_writes_and_the_other_reads(tmp_path: Path) -> None:
    first = RowStore(tmp_path / "store", {}, n_rows=2, like=torch.zeros(3))
    first.write([0], [1], torch.ones(1, 3))
    first.commit()
    second = RowStore(tmp_path / "store", {}, n_rows=2, like=torch.zeros(3))
    assert not second.writes
    second.write([1], [1], torch.ones(1, 3))
    assert second.has([0], [1])
    assert not second.has([1], [1])
    second.close()
    first.close()


def test_a_full_disk_ends_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computing, _ = trained(tmp_path, "computing", cache="off")
    honest = RowStore._write_at
    count = [0]

    def full(file: int, data: Any, at: int) -> None:
        count[0] += 1
        if count[0] > 6:
            raise OSError(28, "No space left on device")
        honest(file, data, at)

    monkeypatch.setattr(RowStore, "_write_at", staticmethod(full))
    keeping, said = trained(tmp_path, "keeping")
    assert keeping == computing
    assert "No space left" in said[1]


class Leaky(nn.Module):
    """A block with a fault: it looks at the other rows, at chance, or at what another block left behind."""

    def __init__(self, fault: str, left: dict[str, torch.Tensor], place: int) -> None:
        super().__init__()
        self.linear, self.fault, self.left, self.place = nn.Linear(4, 4), fault, left, place

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.linear(hidden)
        if self.fault == "rows":
            out = out + hidden.mean(0)
        if self.fault == "chance":
            out = out * torch.rand(())
        if self.fault == "left" and self.place == 0:
            self.left["out"] = out.sum()
        if self.fault == "left" and self.place == 2:
            out = out * self.left.pop("out", torch.zeros(()))
        return out


@pytest.mark.parametrize(
    ("fault", "why"), [("none", None), ("rows", "other rows"), ("chance", "chance"), ("left", "reads more")]
)
def test_the_trial_finds_a_planted_dependence(fault: str, why: str | None) -> None:
    left: dict[str, torch.Tensor] = {}
    blocks = nn.ModuleList([Leaky(fault, left, i) for i in range(3)])

    def loss(_model: nn.Module, batch: Batch) -> torch.Tensor:
        hidden = nn.functional.one_hot(batch.input_ids, 4).float()
        for block in blocks:
            hidden = block(hidden)
        return hidden.square().sum()

    ids = torch.randint(4, (4, 6), generator=torch.Generator().manual_seed(0))
    split = Split(blocks=tuple(blocks), at=2)
    batch = Batch(input_ids=ids, labels=ids, indices=(0, 1, 2, 3))
    if why is None:
        tried(split, blocks, batch, loss)
    else:
        with pytest.raises(NoPrefixError, match=why):
            tried(split, blocks, batch, loss)


def test_a_model_that_ignores_what_is_given_is_refused() -> None:
    blocks = nn.ModuleList([Leaky("none", {}, i) for i in range(2)])

    def loss(_model: nn.Module, batch: Batch) -> torch.Tensor:
        for block in blocks:
            hidden = block(nn.functional.one_hot(batch.input_ids, 4).float())
        return hidden.square().sum()

    ids = torch.randint(4, (4, 6))
    with pytest.raises(NoPrefixError, match="does not depend"):
        tried(Split(blocks=tuple(blocks), at=1), blocks, Batch(input_ids=ids, labels=ids), loss)


def test_compiled_blocks_are_left_out_too() -> None:
    model = tiny.model("llama").eval()
    calls: list[int] = []
    for i, (_, block) in enumerate(find_blocks(model)):
        block._compiled_call_impl = lambda *a, i=i, b=block, **k: (calls.append(i), b._call_impl(*a, **k))[1]
    split = split_of(model, read_anatomy(model), stage_of(model, LAST))
    ids = torch.randint(tiny.VOCABULARY, (2, 8))
    batch = Batch(input_ids=ids, labels=ids)
    boundary = tried(split, model, batch, next_token_loss)
    calls.clear()
    with split.entered(boundary):
        next_token_loss(model, batch)
    assert calls == [2]


def stage_of(model: nn.Module, learn: str) -> Any:
    spec = StageSpec(learn=learn, steps=1, lr=1e-3)
    return Schedule.of([("only", spec, select(read_anatomy(model), learn, ties="together"))]).stages[0]


@pytest.mark.with_plans
def test_a_metered_step_is_computed_whole_so_that_it_can_be_held_against_the_plan(tmp_path: Path) -> None:
    trained(tmp_path, "keeping")
    result = train(recipe(tmp_path), out=tmp_path / "reading")
    assert [c.flops_agree for c in result.checks] == [True]


def worth(folder: Path, **changes: Any) -> str | None:
    wide = tiny.config("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    data = {**tiny.recipe_dict(folder)["data"], "length": 128, "batch": 4}
    prepared = prepare(recipe(folder, **{"model": wide, "data": data} | changes))
    return why_not_worth(plan_of(prepared), prepared.schedule, prepared.schedule.stages[0])


@pytest.mark.with_plans
def test_auto_asks_the_plan_whether_it_pays(tmp_path: Path) -> None:
    assert worth(tmp_path) is None
    assert "no row comes again" in (worth(tmp_path, stage={"epochs": 1}) or "")
    assert "0%" in (worth(tmp_path, model=tiny.config("llama")) or "")
    below = "about 0%" if POSITIONS_MULTIPLY else "nothing is computed below"
    assert below in (worth(tmp_path, stage={"learn": "ffn"}) or "")


REFUSED_BY_TRIAL = {"gemma3n_text": "depends on the other rows", "hrm_text": "depends on chance"}
"""Type without experts → what its frozen blocks were seen to do."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_of_every_type_the_split_is_exact_or_refused_for_a_reason_that_holds(model_type: str) -> None:
    model = all_types.small_model(model_type).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    anatomy = read_anatomy(model)
    last = ("layers", anatomy.n_layers - 1)
    paths = [c.path for c in anatomy.components if c.path[0][0] == "layers" and c.path[0] != last]
    expected = REFUSED_BY_TRIAL.get(model_type)
    if any(name in ("router", "experts") for path in paths for name, _ in path):
        expected = "is below: what experts compute"
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(input_ids=ids, labels=ids)
    if expected is not None:
        with pytest.raises((NoPrefixError, ChanceError), match=expected):
            tried(split_of(model, anatomy, stage_of(model, LAST)), model, batch, next_token_loss)
        return
    split = split_of(model, anatomy, stage_of(model, LAST))
    boundary = tried(split, model, batch, next_token_loss)
    with torch.no_grad(), split.entered(boundary):
        again = next_token_loss(model, batch)
    with torch.no_grad():
        assert torch.equal(again, next_token_loss(model, batch))


def test_what_was_said_is_in_the_run_folder(tmp_path: Path) -> None:
    trained(tmp_path, "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert [r["value"] for r in rows if r.get("setting") == "cache.prefix"] == ["on"]
