"""Model folders that do not say the same twice: what is not used is said, what does not fit is refused by its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from frostline import checkpoints, train
from frostline import ready as ready_module
from frostline.data.text import Document
from frostline.data.tokens import train_byte_bpe
from frostline.engine import Chose
from frostline.errors import FrostlineError, ModelError, StorageError
from frostline.export import export_run
from frostline.model import load_model, load_tokenizer, save_model
from frostline.moe import upcycle
from frostline.recipe import Recipe, ScratchModel, recipe_from_dict
from frostline.storage import storage_errors

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)


def folder_of(path: Path, architecture: str = "llama", change: Callable[[Tensors], object] = lambda _: None) -> Path:
    """A model folder whose weights were changed."""
    save_model(load_model(ScratchModel(**tiny.config(architecture))), None, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def recipe_on(base: Path, folder: Path, **more: object) -> Recipe:
    data = tiny.recipe_dict(folder, stages=[{"learn": "norm", "steps": 1, "lr": 1e-3}], eval={"batches": 1})
    return recipe_from_dict(data | {"model": str(base), "tokenizer": {"train": "byte-bpe", "vocab_size": 300}, **more})


def chosen(recipe: Recipe, out: Path) -> dict[str, Chose]:
    found: list[object] = []
    assert train(recipe, out=out, observers=[found.append]).audit.passed
    return {c.setting: c for c in found if isinstance(c, Chose)}


def test_tensors_that_a_model_has_no_place_for_are_said(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", change=lambda t: t.update({"extra.weight": torch.zeros(3)}))
    told = chosen(recipe_on(base, tmp_path), tmp_path / "run")["model"]
    assert (told.value, "extra.weight" in told.why) == ("1 tensors of its files are not used", True)


def test_a_configuration_with_fewer_layers_than_its_files_does_not_drop_them_in_silence(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    told = chosen(recipe_on(base, tmp_path), tmp_path / "run")["model"]
    assert told.value == "9 tensors of its files are not used"
    assert "model.layers.2." in told.why


def test_a_model_as_it_should_be_has_nothing_to_say_about_its_files(tmp_path: Path) -> None:
    told = chosen(recipe_on(folder_of(tmp_path / "base"), tmp_path), tmp_path / "run")
    assert not {"model", "data.length"} & set(told)


def test_tensors_of_other_shapes_are_refused_with_both_shapes(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", change=lambda t: t.update({UP: t[UP][:10].contiguous()}))
    said = r"other shapes for 1 tensors.*up_proj\.weight \(10, 32\) where its configuration says \(48, 32\)"
    with pytest.raises(ModelError, match=said):
        load_model(str(base))


def test_a_tied_head_with_weights_of_its_own_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", "gemma", lambda t: t.update({"lm_head.weight": torch.randn(320, 32)}))
    with pytest.raises(
        ModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*tie_word_embeddings: false"
    ):
        train(recipe_on(base, tmp_path, ties="together"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_tokenizer_alone_is_one(tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "words.txt").read_text()
    made = train_byte_bpe([Document(text=text, source="words.txt")], n_vocabulary=300)
    made.save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(str(tmp_path / "tokenizer")).get_vocab() == made.get_vocab()
    recipe = recipe_on(folder_of(tmp_path / "base"), tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert train(recipe, out=tmp_path / "run").audit.passed
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json or tokenizer_config\.json or tokenizer\.json"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_rows_longer_than_a_models_positions_are_said_or_refused_with_both_numbers(tmp_path: Path) -> None:
    data = tiny.recipe_dict(tmp_path)["data"] | {"length": 200}
    told = chosen(recipe_on(folder_of(tmp_path / "base"), tmp_path, data=data), tmp_path / "run")["data.length"]
    assert (told.value, "128 positions" in told.why) == ("200", True)
    learned = folder_of(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match=r"row of 200 tokens.*it has 128 positions"):
        train(recipe_on(learned, tmp_path, data=data, ties="together"), out=tmp_path / "refused")


def test_a_mixture_is_not_upcycled_again_and_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'mixtral' model is a mixture of experts already"):
        upcycle(str(folder_of(tmp_path / "base", "mixtral")), tmp_path / "out")


def test_a_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe_on(folder_of(tmp_path / "base"), tmp_path), out=tmp_path / "run")

    def refuse(source: Path, _target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(StorageError, match=r"cannot read .*run/model/.*: Permission denied"):
            export_run(tmp_path / "run", tmp_path / "out")
    for names in [
        (str(tmp_path),),
        ("a", None, "out"),
        (str(tmp_path / "out.tmp"),),
        (str(tmp_path / ".out.tmp-1/a"),),
    ]:
        with pytest.raises(StorageError, match=r"cannot write .*out: No space"), storage_errors(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def test_a_checkpoint_that_has_no_room_says_how_much_it_needs_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1_100_000))
    with pytest.raises(FrostlineError, match="needs 1110000 bytes and 1100000 are free"):
        checkpoints.Checkpoints(tmp_path / "saved", run="x").write(1, {"weights": {"a": torch.zeros(25_000)}}, {})
