"""From a file of conversations to a trained model: the loss is that of the assistant's tokens and of nothing else."""

from __future__ import annotations

import json

import chats
import pytest
import tiny
import torch
from chats import CONVERSATIONS, said, shown, user
from torch.nn.functional import cross_entropy

import frostline
from frostline.data import files_to_hash, read_examples
from frostline.environment import describe_environment
from frostline.errors import DataError
from frostline.feed import get_tokenizer
from frostline.model import load_model, save_model
from frostline.recipe import ScratchModel, recipe_from_dict

ROWS = [
    {"messages": [user(f"How cold is {n}?"), said(f"{n} is cold."), user("Sure?"), said("Yes.")]}
    for n in ("ice", "snow", "the river", "north wind", "stone", "frost", "the lake", "March")
]


@pytest.fixture
def base(tmp_path):
    model = load_model(ScratchModel(**tiny.config("llama", vocab_size=512)), seed=3)
    save_model(model, chats.tokenizer("chatml"), tmp_path / "base")
    return tmp_path / "base"


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def recipe(base, train, held_out, **data):
    return recipe_from_dict(
        {
            "model": str(base),
            "data": {"train": train, "held_out": held_out, "length": 128, "batch": 4, **data},
            "stages": [{"learn": "ffn", "steps": 6, "lr": 1e-2}],
            "device": "cpu",
        }
    )


def loss_alone(model, examples):
    """The mean loss of what learns, each conversation by itself, straight from transformers."""
    total, n = 0.0, 0
    for e in examples:
        ids = torch.from_numpy(e.ids).long()[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        learns = torch.from_numpy(e.learns[1:])
        total += float(cross_entropy(logits[learns], ids[0, 1:][learns], reduction="sum"))
        n += int(learns.sum())
    return total / n


@pytest.mark.parametrize("layout", [None, "padded"])
def test_ffn_only_training_lowers_the_loss_of_what_the_assistant_says_and_passes_its_audit(tmp_path, base, layout):
    train, held_out = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:2])
    made = recipe(base, train, [held_out], layout=layout)
    result = frostline.train(made, out=tmp_path / "run")
    assert result.audit.passed
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    tokenizer = chats.tokenizer("chatml")
    examples = list(read_examples(made.data, [held_out], tokenizer, n_vocabulary=512))
    assert "⟦ice is cold.<|im_end|>⟧" in shown(examples[0], tokenizer)
    for model, value in ((base, measured[0]), (tmp_path / "run" / "model", measured[-1])):
        assert value == pytest.approx(loss_alone(load_model(str(model)).eval(), examples), rel=1e-5)
    assert measured[-1] < 0.95 * measured[0]


def test_a_run_with_nothing_to_learn_is_refused_with_nothing_written(tmp_path, base):
    good, mute = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"messages": [user("x")]}] * 3)
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    for said_, train, fields in (
        ("b.jsonl:1: nothing to learn", mute, {}),
        ("too little text", mute, {"invalid": "drop"}),
        ("too little text", write(tmp_path / "c.jsonl", []), {}),
        ("a.jsonl:1: message 1", good, {"chat_template": str(silent)}),
    ):
        with pytest.raises(DataError, match=said_.replace(".", r"\.")):
            frostline.train(recipe(base, train, [good], **fields), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_saved_model_has_the_chat_template_that_it_was_trained_with(tmp_path, base):
    data = write(tmp_path / "a.jsonl", ROWS)
    marked = chats.TEMPLATES / "chatml_marked.jinja"
    frostline.train(recipe(base, data, [data], chat_template=str(marked)), out=tmp_path / "run")
    from frostline.model import load_tokenizer

    assert load_tokenizer(str(tmp_path / "run" / "model")).chat_template == marked.read_text(encoding="utf-8")


def test_a_change_of_any_file_that_decides_the_tokens_changes_what_a_resume_compares(tmp_path, base):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    files = [tmp_path / n for n in ("a.jsonl", "b.jsonl")]
    for f in files:
        write(f, ROWS)
    sources = [str(files[0]), {"path": str(files[1]), "weight": 2}]
    made = recipe(base, sources, [str(files[0])], chat_template=str(template))

    def hashes():
        found = describe_environment(device=torch.device("cpu"), data=files_to_hash(made.data), base=str(base))
        return {entry["path"]: entry["sha256"] for key in ("data", "base") for entry in found[key]}

    before = hashes()
    for changed in (*files, template, base / "chat_template.jinja", base / "tokenizer.json"):
        with changed.open("a") as stream:
            stream.write("\n")
        now = hashes()
        assert {p for p in now if now[p] != before[p]} == {str(changed)}
        before = now


def test_tool_calls_are_learnt_in_a_run_too(tmp_path, base):
    data = write(tmp_path / "a.jsonl", [CONVERSATIONS["tool"]] * 4)
    result = frostline.train(recipe(base, data, [data], length=512, batch=2), out=tmp_path / "run")
    assert result.audit.passed


def test_a_run_says_what_its_files_were_and_keeps_it(tmp_path, base):
    data = write(tmp_path / "a.jsonl", [*ROWS, {"messages": [user("x")]}])
    lines = []
    frostline.train(recipe(base, data, [data], invalid="drop"), out=tmp_path / "run", say=lines.append)
    assert lines[0] == f"data: messages, 16 examples (2 files, from {data}); 2 dropped"
    assert any(line.startswith(f"dropped: {data}:9: nothing to learn") for line in lines)
    files = json.loads((tmp_path / "run" / "environment.json").read_text())["rows"]["files"]
    assert [(f["format"], f["examples"], f["dropped"]) for f in files] == [("messages", 8, 1)] * 2


def test_from_scratch_a_trained_tokenizer_has_the_control_tokens_of_its_chat_template(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    values = {
        "model": tiny.config("llama"),
        "tokenizer": {"train": "byte-bpe", "special_tokens": chats.CONTROL["chatml"]},
        "data": {"train": data, "held_out": [data], "length": 128, "batch": 4},
        "stages": [{"learn": "all", "steps": 1, "lr": 1e-3}],
        "device": "cpu",
    }
    values["data"]["chat_template"] = str(chats.TEMPLATES / "chatml.jinja")
    made = recipe_from_dict(values)
    tokenizer = get_tokenizer(made)
    (first, *_) = read_examples(made.data, [data], tokenizer, n_vocabulary=tiny.VOCABULARY)
    ids = first.ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4
    assert "⟦Yes.<|im_end|>⟧" in shown(first, tokenizer)
    assert frostline.train(made, out=tmp_path / "run").audit.passed
