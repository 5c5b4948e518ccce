from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import frostline
from frostline.engine import StepDone
from frostline.errors import DataError, FrostlineError, ModelError, RecipeError, RunFolderError
from frostline.prepared import prepare
from frostline.recipe import load_recipe
from frostline.run_folder import RunFolder


def test_the_saved_model_loads_with_plain_transformers_tokenizer_included(tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "mixtral"):
        folder = tmp_path / architecture
        folder.mkdir()
        frostline.train(tiny.recipe(folder, architecture), out=folder / "run")
        model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
        assert tokenizer.decode(tokenizer("north river, ünïcode 北")["input_ids"]) == "north river, ünïcode 北"
        assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_run_starts_from_a_saved_folder_and_keeps_its_frozen_bytes(tmp_path: Path) -> None:
    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "first")
    base = tmp_path / "first" / "model"
    stages = [{"name": "ffn", "learn": "ffn", "steps": 2, "lr": 1e-3}]
    result = frostline.train(tiny.recipe(tmp_path, model=str(base), stages=stages), out=tmp_path / "second")
    assert result.audit.passed
    diff = frostline.diff_checkpoints(base, tmp_path / "second")
    moved = {r.component for r in diff.rows if r.bytes_changed}
    assert moved == {f"layers[{i}].ffn.{part}" for i in range(3) for part in ("gate", "up", "down")}


def test_the_run_folder_holds_what_its_tree_says(tmp_path: Path) -> None:
    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    found = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert found >= {
        "recipe.yaml", "environment.json", "anatomy.json", "schedule.json", "status.json", "metrics.jsonl",
        "timing.jsonl", "evidence/boundary-0.json", "evidence/boundary-1.json", "evidence/boundary-2.json",
        "evidence/entry-0.safetensors", "evidence/entry-1.safetensors", "evidence/gradients.jsonl",
        "model/config.json", "model/model.safetensors", "model/tokenizer.json",
    }  # fmt: skip
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert len(environment["data"][0]["sha256"]) == 64
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == tiny.recipe(tmp_path)


def test_entry_values_hold_exactly_what_the_stage_starts_to_train(tmp_path: Path) -> None:
    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    with safe_open(RunFolder(tmp_path / "run").entry(1), framework="pt") as file:
        assert all(".mlp." in name for name in file.keys())  # noqa: SIM118
        assert len(list(file.keys())) == 9


def test_a_run_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="never overwrites"):
        frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file: a run never overwrites"):
        frostline.train(tiny.recipe(tmp_path), out=tmp_path / "file")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", r"is under way or was killed \(`frostline resume .*run` goes on\)"),
        ("interrupted", r"was interrupted after step 4 \(`frostline resume"),
        ("failed", r"failed after step 4 \(`frostline resume"),
        ("finished", r"holds a run, finished after step 4: a run never overwrites; name another --out"),
        (None, r"killed while its folder was made \(delete it\)"),
    ],
)
def test_training_into_a_folder_with_a_run_says_how_far_it_is_and_how_to_go_on(
    tmp_path: Path, state: Any, said: str
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_status(state or "running", step=4)
    if state:
        folder.recipe.write_text("")
        folder.write_json("environment.json", {})
    with pytest.raises(RunFolderError, match=said):
        frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_after_the_step_with_everything_saved(tmp_path: Path, number: int) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            os.kill(os.getpid(), number)

    result = frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run", observers=[interrupt])
    assert (result.state, result.steps) == ("interrupted", 4)
    assert RunFolder.open(tmp_path / "run").read_status()["state"] == "interrupted"
    assert not result.audit.failures
    assert [e.claim for e in result.audit.evidence if not e.passed] == ["every stage ran to its end"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_the_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run", observers=[interrupt])


def test_untie_gives_the_head_weights_of_its_own_and_the_saved_model_keeps_them(tmp_path: Path) -> None:
    stages = [{"name": "head", "learn": "head", "steps": 2, "lr": 1e-2}]
    result = frostline.train(tiny.recipe(tmp_path, "gpt2", ties="untie", stages=stages), out=tmp_path / "run")
    assert result.audit.passed
    moved = {r.component for r in result.audit.rows if r.bytes_changed}
    assert moved == {"head"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not (model.lm_head.weight == model.transformer.wte.weight).all()


def test_ties_together_lets_both_learn(tmp_path: Path) -> None:
    stages = [{"name": "head", "learn": "head", "steps": 2, "lr": 1e-2}]
    result = frostline.train(tiny.recipe(tmp_path, "gpt2", ties="together", stages=stages), out=tmp_path / "run")
    assert {r.component for r in result.audit.rows if r.bytes_changed} == {"embed"}


BAD_STAGES = [
    ("no part 'ffm'", "ffm"),
    ("out of range", "layers[7].ffn"),
    ("nothing in common", "ffn & attn"),
    ("without 'embed'", "head"),
    ("expected", "(ffn"),
]


@pytest.mark.parametrize(("message", "learn"), BAD_STAGES)
def test_a_bad_selection_names_the_stage_and_writes_nothing(tmp_path: Path, message: str, learn: str) -> None:
    stages = [
        {"learn": "ffn", "steps": 1, "lr": 1e-3},
        {"learn": learn, "steps": 1, "lr": 1e-3},
    ]
    with pytest.raises(RecipeError, match=message) as caught:
        frostline.train(tiny.recipe(tmp_path, "gpt2", stages=stages), out=tmp_path / "run")
    assert "stages[1].learn" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_models_and_data_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "pickle").mkdir()
    config = {"model_type": "llama", **tiny.SMALL}
    (tmp_path / "pickle" / "config.json").write_text(json.dumps(config))
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "bare").mkdir()
    data = {"length": 32, "batch": 4}
    latin = {"train": str(tmp_path / "latin.txt"), **data}
    misspelt = tiny.config("llama", hiden_size=3)
    cases: list[tuple[type[FrostlineError], str, dict[str, object]]] = [
        (ModelError, "no such folder", {"model": str(tmp_path / "nothing")}),
        (ModelError, "no config.json", {"model": str(tmp_path / "bare")}),
        (ModelError, "pickle", {"model": str(tmp_path / "pickle"), "tokenizer": {"train": "byte-bpe"}}),
        (ModelError, "no architecture 'lama'. Did you mean 'llama", {"model": {"architecture": "lama"}}),
        (ModelError, "no field 'hiden_size'. Did you mean 'hidden_size'", {"model": misspelt}),
        (ModelError, "refuses", {"model": tiny.config("llama", hidden_size="x")}),
        (ModelError, "zzz", {"model": tiny.config("llama", hidden_act="zzz")}),
        (ModelError, "ZeroDivisionError", {"model": tiny.config("llama", hidden_size=0)}),
        (ModelError, "AssertionError", {"model": tiny.config("llama", pad_token_id=999)}),
        (ModelError, "tokenizer", {"tokenizer": str(tmp_path / "pickle")}),
        (DataError, "no such file", {"data": {"train": str(tmp_path / "none.txt"), **data}}),
        (DataError, "no text", {"data": {"train": str(tmp_path / "empty.txt"), **data}}),
        (DataError, "latin.txt:1: not UTF-8: byte 0xe9 at offset 3", {"data": latin}),
        (DataError, "too little text", {"data": {"train": str(tmp_path / "text.txt"), "length": 100000}}),
    ]  # fmt: skip
    for kind, message, change in cases:
        with pytest.raises(kind) as caught:
            frostline.train(tiny.recipe(tmp_path, **change), out=tmp_path / "run")
        assert message in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        frostline.train(tiny.recipe(tmp_path, model=str(path.parent)), out=tmp_path / "second")


def test_prepare_writes_nothing_and_counts_rows(tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    recipe = tiny.recipe(tmp_path)
    prepared = prepare(recipe)
    assert len(prepared.feed.train) > len(prepared.feed.held_out) > 0
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "text.txt"}
