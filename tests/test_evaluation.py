"""What is measured beside training: held-out data, what is to be kept, single files; against plain transformers."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import frostline
from frostline.engine import StepDone
from frostline.engine.evaluation import bits_per_byte
from frostline.errors import DataError, RunFolderError
from frostline.experiment.report import write_report
from frostline.recipe import recipe_from_dict
from frostline.resume import resume
from frostline.run_folder import RunFolder
from frostline.sets import short_names

LENGTH, BATCH = 32, 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("train", "held", "kept"), start=1):
        tiny.write_text(folder / f"{name}.txt", n_words=3000 if name == "train" else 900, seed=seed)
    (folder / "numbers.txt").write_text("one two three four five six seven eight nine ten " * 60, encoding="utf-8")
    words = [" ".join(tiny.WORDS[i:] + tiny.WORDS[:i]) for i in range(len(tiny.WORDS))]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": w}) for w in words * 4), encoding="utf-8")
    return folder


def recipe(texts, keep=("kept.txt",), by_source=False, held_out=("held.txt",), **fields):
    given = tiny.recipe_dict(texts)
    given["data"] |= {"train": str(texts / "train.txt"), "length": LENGTH, "batch": BATCH}
    given["data"]["held_out"] = [str(texts / h) for h in held_out]
    given["data"] |= fields.pop("data", {})
    given["eval"] = {"batches": 100, "every": 2, "by_source": by_source}
    if keep:
        given["eval"]["keep"] = [str(texts / k) for k in keep]
    return recipe_from_dict(given | fields)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of_set(run, name):
    return {r["step"]: r["set_loss"] for r in rows_of(run) if r.get("set") == name}


@pytest.fixture(scope="module")
def run(texts):
    given = recipe(texts, keep=("kept.txt", "numbers.txt"), by_source=True, held_out=("held.txt", "numbers.txt"))
    assert frostline.train(given, out=texts / "run").audit.passed
    return texts / "run"


def by_hand(run, *files):
    """(mean loss per token, tokens, bytes) of the rows of files, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokens, n_bytes = [], 0
    for file in files:
        text = file.read_text()
        ids = tokenizer(text)["input_ids"]
        tokens += [*ids, tokenizer.eos_token_id]
        n_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    n_rows = (len(tokens) - 1) // LENGTH
    ids = torch.tensor(tokens)
    inputs, labels = ids[: n_rows * LENGTH].view(n_rows, LENGTH), ids[1 : n_rows * LENGTH + 1].view(n_rows, LENGTH)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), len(tokens) - len(files), n_bytes


def test_every_set_is_measured_where_the_held_out_loss_is(run):
    steps = [r["step"] for r in rows_of(run) if "held_out_loss" in r]
    assert steps == [0, 2, 3, 4, 6]
    sets = {r["set"] for r in rows_of(run) if "set" in r}
    assert sets == {"keep", "keep/kept.txt", "keep/numbers.txt", "held_out/held.txt", "held_out/numbers.txt"}
    assert all(list(of_set(run, name)) == steps for name in sets)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("keep", ("kept.txt", "numbers.txt")),
        ("keep/numbers.txt", ("numbers.txt",)),
        ("held_out/held.txt", ("held.txt",)),
    ],
)
def test_losses_and_bits_per_byte_are_those_of_plain_transformers_on_the_saved_model(run, texts, name, files):
    loss, n_targets, n_bytes = by_hand(run, *(texts / f for f in files))
    last = next(r for r in reversed(rows_of(run)) if r.get("set") == name)
    assert last["set_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(loss * n_targets / n_bytes / math.log(2), rel=0.01)


def test_bits_per_byte_do_not_depend_on_the_tokens():
    """Two tokenizers that say the same of a text: half as many tokens, each of twice the loss."""
    assert bits_per_byte(2.0, 4.0) == pytest.approx(bits_per_byte(1.0, 2.0))
    assert bits_per_byte(8 * math.log(2), 1.0) == pytest.approx(8.0)  # one byte, all 256 alike
    assert bits_per_byte(1.0, None) is None


@pytest.fixture(scope="module")
def plain(texts):
    """The same run without the sets."""
    frostline.train(recipe(texts, keep=(), held_out=("held.txt", "numbers.txt")), out=texts / "plain")
    return texts / "plain"


def test_measuring_more_changes_nothing_that_is_trained(run, plain):
    for more, without in zip([r for r in rows_of(run) if "set" not in r], rows_of(plain), strict=True):
        assert more == without
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (plain / name).read_bytes()


def test_an_interrupted_run_with_sets_ends_with_the_same_metrics(run, texts):
    def stop(event):
        if isinstance(event, StepDone) and event.step == 5:
            raise KeyboardInterrupt

    given = recipe(
        texts, keep=("kept.txt", "numbers.txt"), by_source=True, held_out=("held.txt", "numbers.txt"),
        checkpoint={"every": 1},
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        frostline.train(given, out=texts / "stopped", observers=[stop])
    resume(texts / "stopped")
    assert (texts / "stopped/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_changed_keep_set_refuses_an_exact_resume(texts, tmp_path):
    keep = tiny.write_text(tmp_path / "keep.txt", n_words=300)

    def stop(event):
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frostline.train(recipe(texts, keep=(keep,)), out=tmp_path / "run", observers=[stop])
    keep.write_text(keep.read_text() + " frost")
    with pytest.raises(RunFolderError, match=r"keep\.txt"):
        resume(tmp_path / "run")


def test_a_keep_set_that_is_no_row_is_refused_before_anything_is_written(texts, tmp_path):
    (tmp_path / "short.txt").write_text("frost line", encoding="utf-8")
    with pytest.raises(DataError, match=r"eval.keep: too little text: .*short.txt"):
        frostline.train(recipe(texts, keep=(tmp_path / "short.txt",)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_sets_have_the_layout_of_the_run(texts, layout):
    out = texts / layout
    documents = {"train": str(texts / "documents.jsonl"), "held_out": 0.1, "layout": layout}
    frostline.train(recipe(texts, keep=("documents.jsonl",), data=documents), out=out)
    last = next(r for r in reversed(rows_of(out)) if r.get("set") == "keep")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    total, n_targets = 0.0, 0
    for line in (texts / "documents.jsonl").read_text().splitlines():
        ids = torch.tensor([*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id])
        for at in range(0, len(ids) - 1, LENGTH):
            window = ids[at : at + LENGTH + 1]
            with torch.no_grad():
                logits = model(input_ids=window[None, :-1]).logits[0]
            total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
            n_targets += len(window) - 1
    assert last["set_loss"] == pytest.approx(total / n_targets, rel=1e-5)


def test_the_report_shows_learning_against_forgetting(run, plain):
    page = write_report(run).read_text()
    assert "Learning and forgetting" in page
    rows = rows_of(run)
    first, last = (next(r for r in rs if r.get("set") == "keep")["set_loss"] for rs in (rows, rows[::-1]))
    assert f"{last - first:+.4f}" in page
    assert "Change of the loss of every measured set" in page
    page = write_report(plain).read_text()
    assert "Change of the loss of every measured set" not in page
    assert "bits per byte" in page
    assert RunFolder.open(run).read_json("environment.json")["data"][-1]["path"].endswith(".txt")


def test_names_are_as_short_as_they_can_be_and_differ():
    assert short_names(["/a/b/c.txt", "/a/d/e.txt"]) == ["c.txt", "e.txt"]
    assert short_names(["/a/b/c.txt", "/a/d/c.txt"]) == ["b/c.txt", "d/c.txt"]
    assert short_names([]) == []
