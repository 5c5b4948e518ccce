"""What a run leaves to others: a folder that plain transformers loads, and deltas that compose."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from frostline import train
from frostline.cli import app
from frostline.deltas import apply_deltas, export_delta, read_delta
from frostline.errors import ModelError, RunFolderError, StorageError
from frostline.export import export_run
from frostline.recipe import Recipe, recipe_from_dict
from frostline.tokenizer_files import tokenizer_from_files


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer, made by a run from scratch."""
    folder = tmp_path_factory.mktemp("base")
    return train(tiny.recipe(folder), out=folder / "run").folder / "model"


def on(base: Path, folder: Path, learn: str, **more: Any) -> Recipe:
    data = tiny.recipe_dict(folder)
    data.pop("tokenizer", None)
    stages = [{"name": "only", "learn": learn, "steps": 2, "lr": 1e-2, **more}]
    return recipe_from_dict(data | {"model": str(base), "stages": stages})


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits  # type: ignore[no-any-return]


def test_an_exported_folder_computes_the_same_logits_and_says_what_was_done(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "ffn | head.rows[3:9]"), out=tmp_path / "run").folder
    out = export_run(run, tmp_path / "out")
    assert torch.equal(logits(out), logits(run / "model"))
    assert AutoTokenizer.from_pretrained(out)("the cold river").input_ids
    card = (out / "README.md").read_text()
    assert "ffn \\| head.rows[3:9]" in card
    assert "Audit: passed." in card
    assert "model.safetensors" in card
    assert "steps: 2" in card
    with pytest.raises(RunFolderError, match="never overwrites"):
        export_run(run, tmp_path / "out")


def test_a_card_warns_of_removed_residual_connections(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "ffn", routes=[{"remove": "ffn.skip", "layers": 1}]), out=tmp_path / "run").folder
    assert "another function" in (export_run(run, tmp_path / "out") / "README.md").read_text()


def test_a_delta_holds_only_what_learned_and_gives_the_runs_model(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "layers[-1].attn.heads[0] | embed.rows[3:9]"), out=tmp_path / "run").folder
    delta = export_delta(run, tmp_path / "small.safetensors")
    assert delta.stat().st_size < (run / "model" / "model.safetensors").stat().st_size / 3
    out = apply_deltas(str(base), [delta], tmp_path / "out")
    assert torch.equal(logits(out), logits(run / "model"))
    first, second = (load_file(f / "model.safetensors") for f in (out, run / "model"))
    assert all(torch.equal(first[n], second[n]) for n in second)


def test_deltas_of_disjoint_parts_compose_exactly_in_any_order(base: Path, tmp_path: Path) -> None:
    parts = ("ffn", "attn.heads[0:2]")
    runs = [train(on(base, tmp_path, p), out=tmp_path / f"run-{i}").folder for i, p in enumerate(parts)]
    deltas = [export_delta(r, tmp_path / f"{i}.safetensors") for i, r in enumerate(runs)]
    one, other = (apply_deltas(str(base), d, tmp_path / n) for d, n in ((deltas, "a"), (deltas[::-1], "b")))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    start, ffn, attn, both = (
        load_file(f / "model.safetensors") for f in (base, runs[0] / "model", runs[1] / "model", one)
    )
    for name, value in both.items():
        expected = torch.where(ffn[name] != start[name], ffn[name], attn[name])
        assert torch.equal(value, expected), name


def test_overlapping_deltas_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    runs = [train(on(base, tmp_path, p), out=tmp_path / f"run-{i}").folder for i, p in enumerate(("ffn", "ffn.up"))]
    deltas = [export_delta(r, tmp_path / f"{i}.safetensors") for i, r in enumerate(runs)]
    with pytest.raises(ModelError, match=r"both hold elements of .*up_proj"):
        apply_deltas(str(base), deltas, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_folder_stands_for_its_model_and_a_delta_is_given_once(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
    delta = export_delta(run, tmp_path / "d.safetensors")
    out = apply_deltas(str(base.parent), [delta], tmp_path / "out")
    assert torch.equal(logits(out), logits(run / "model"))
    with pytest.raises(ModelError, match=r"d\.safetensors is given twice"):
        apply_deltas(str(base), [delta, delta], tmp_path / "again")
    with pytest.raises(ModelError, match=r"pieces differ .*; give the model that its run started from"):
        apply_deltas(str(out), [delta], tmp_path / "again")
    with pytest.raises(ModelError, match="plain weights; a delta is what `frostline export RUN FILE --delta` writes"):
        apply_deltas(str(base), [base / "model.safetensors"], tmp_path / "again")
    with pytest.raises(ModelError, match=r"the model of this run folder is .*run/model"):
        train(on(run, tmp_path, "norm"), out=tmp_path / "more")


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "ffn"), out=tmp_path / "run").folder
    delta = export_delta(run, tmp_path / "d.safetensors")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is not the model .*embed_tokens"):
        apply_deltas(str(other), [delta], tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "no delta", "text", "missing"])
def test_a_damaged_delta_is_refused_with_its_name(base: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "delta.safetensors"
    if damage == "no delta":
        save_file({"x": torch.zeros(2)}, path)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "cut":
        run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
        path.write_bytes(export_delta(run, tmp_path / "whole.safetensors").read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"delta\.safetensors"):
        read_delta(path)


def test_the_commands_do_the_same_and_say_what_is_wrong(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
    cli = CliRunner()
    done = cli.invoke(app, ["export", str(run), str(tmp_path / "d.safetensors"), "--delta"])
    assert done.exit_code == 0, done.output
    done = cli.invoke(app, ["apply", str(base), str(tmp_path / "d.safetensors"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert torch.equal(logits(tmp_path / "out"), logits(run / "model"))
    wrong = cli.invoke(app, ["apply", str(base), str(tmp_path / "out2")])
    assert wrong.exit_code == 2
    assert "at least one delta" in wrong.output


def test_a_delta_whose_values_changed_is_refused(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
    path = export_delta(run, tmp_path / "delta.safetensors")
    data = bytearray(path.read_bytes())
    data[-9] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="not those that were written"):
        read_delta(path)


TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def trained_with(template: str, base: Path, folder: Path, learn: str) -> Path:
    folder.mkdir()
    (folder / "own.jinja").write_text(template)
    recipe = on(base, folder, learn)
    data = recipe.data.model_copy(update={"chat_template": str(folder / "own.jinja")})
    return train(recipe.model_copy(update={"data": data}), out=folder / "run").folder


def test_an_exported_model_and_an_applied_delta_have_the_chat_template_of_the_run(base: Path, tmp_path: Path) -> None:
    run = trained_with(TEMPLATE, base, tmp_path / "own", "norm")
    delta = export_delta(run, tmp_path / "delta.safetensors")
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    for out in (export_run(run, tmp_path / "a"), apply_deltas(str(base), [delta], tmp_path / "b")):
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer("the river").input_ids == AutoTokenizer.from_pretrained(base)("the river").input_ids
    plain = train(on(base, tmp_path / "own", "ffn"), out=tmp_path / "plain").folder
    both = [export_delta(plain, tmp_path / "plain.safetensors"), delta]
    assert not read_delta(both[0]).tokenizer  # it is the base's
    assert AutoTokenizer.from_pretrained(apply_deltas(str(base), both, tmp_path / "c")).chat_template == TEMPLATE


def test_deltas_that_came_with_different_chat_templates_are_not_applied_together(base: Path, tmp_path: Path) -> None:
    runs = [trained_with(TEMPLATE + x, base, tmp_path / n, n) for x, n in (("", "norm"), ("end", "ffn"))]
    deltas = [export_delta(r, tmp_path / f"{i}.safetensors") for i, r in enumerate(runs)]
    with pytest.raises(ModelError, match=r"different tokenizers or chat templates \(chat_template.jinja differ\)"):
        apply_deltas(str(base), deltas, tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside", "/outside", "C:outside", "a\\..\\b", "config.json"])
def test_files_of_a_tokenizer_do_not_lead_out_of_their_folder(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be named"):
        tokenizer_from_files({name: b"{}"}, config=LlamaConfig())


def test_nothing_is_exported_into_the_run_folder_and_no_path_stands_in_the_card(base: Path, tmp_path: Path) -> None:
    run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
    with pytest.raises(RunFolderError, match="in the run folder itself"):
        export_run(run, run / "model" / "x")
    assert str(tmp_path) not in (export_run(run, tmp_path / "out") / "README.md").read_text()


def test_what_cannot_be_written_whole_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(on(base, tmp_path, "norm"), out=tmp_path / "run").folder
    delta = export_delta(run, tmp_path / "delta.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    for write in (
        lambda: export_run(run, tmp_path / "out"),
        lambda: export_delta(run, tmp_path / "other.safetensors"),
        lambda: apply_deltas(str(base), [delta], tmp_path / "out"),
    ):
        with pytest.raises(StorageError, match="No space left on device"):
            write()
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_in_the_place_of_a_delta_says_the_order(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, and no delta: frostline apply BASE DELTA"):
        read_delta(tmp_path)


def test_a_delta_of_a_run_from_scratch_has_no_base_and_is_refused_with_what_to_do(base: Path, tmp_path: Path) -> None:
    run = base.parent
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "d.safetensors"), "--delta"])
    assert done.exit_code == 2, done.output
    assert "no base that a delta could be put into" in done.output
    assert f"frostline export {run}" in done.output
    assert not list(tmp_path.iterdir())
