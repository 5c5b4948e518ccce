"""`frostline data`: what it counts, what it shows, and that nothing of the data is taken for markup."""

from __future__ import annotations

import json
import re

import chats
import numpy as np
import pytest
import tiny
from chats import CONVERSATIONS, EXPECTED, said, user
from typer.testing import CliRunner

from frostline.cli import app
from frostline.data import Example
from frostline.recipe import DataSpec, load_recipe
from frostline.survey import show, survey

TURNS = CONVERSATIONS["turns"]


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer and a configuration."""
    folder = tmp_path_factory.mktemp("model")
    chats.tokenizer("chatml").save_pretrained(folder)
    config = {"model_type": "llama", **tiny.SMALL, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def looked_at(train, model, **fields):
    return survey(DataSpec(train=(str(train),), **fields), tokenizer=str(model))


def frost(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_examples_tokens_bytes_and_lengths_are_counted(tmp_path, model):
    file = jsonl(tmp_path / "a.jsonl", [CONVERSATIONS[n] for n in ("turns", "system", "empty")])
    (part,) = looked_at(file, model).parts
    made = chats.tokenizer("chatml")
    texts = [EXPECTED["chatml"][n] for n in ("turns", "system", "empty")]
    lengths = [len(made(t.replace("⟦", "").replace("⟧", ""), add_special_tokens=False)["input_ids"]) for t in texts]
    assert (part.n_examples, part.n_tokens, part.longest) == (3, sum(lengths), max(lengths))
    assert part.n_bytes == len("Very. éNorth\nof here.Yes.Ice.No.".encode())
    assert sum(n for _, _, n in part.lengths) == 3
    for start, end, n in part.lengths:
        assert n == sum(start <= x < end for x in lengths)
    assert part.quantiles == (sorted(lengths)[1], max(lengths), max(lengths))
    assert part.files[0].roles == {"user": 6, "assistant": 6, "system": 1}


def test_what_is_shown_is_the_example_with_what_learns(tmp_path, model):
    file = jsonl(tmp_path / "a.jsonl", [TURNS])
    ((shown,),) = [part.shown for part in looked_at(file, model).parts]
    assert "".join(f"⟦{p.text}⟧" if p.learns else p.text for p in shown.pieces) == EXPECTED["chatml"]["turns"]
    assert not shown.is_cut


def test_of_a_long_example_the_beginning_is_shown():
    made = chats.tokenizer("chatml")
    ids = np.array(made("the river " * 500)["input_ids"], dtype=np.int32)
    shown = show(Example(ids, np.arange(len(ids)) > 0, 1, "here"), made)
    assert shown.is_cut
    assert shown.n_tokens == len(ids)
    assert "the river" in "".join(p.text for p in shown.pieces)


def test_duplicates_are_counted_and_named_with_the_place_that_came_before(tmp_path, model):
    file = jsonl(tmp_path / "a.jsonl", [TURNS, CONVERSATIONS["empty"], TURNS, TURNS])
    (part,) = looked_at(file, model).parts
    assert part.n_duplicates == 2
    assert [(d.source[-1], d.other[-1]) for d in part.duplicates] == [("3", "1"), ("4", "1")]


def test_leaks_are_the_same_example_or_the_same_prompt_on_both_sides(tmp_path, model):
    train = jsonl(tmp_path / "a.jsonl", [TURNS, {"messages": [user("Why?"), said("So.")]}])
    other = [TURNS, {"messages": [user("Why?"), said("Ice.")]}, {"messages": [user("Who?"), said("I.")]}]
    held_out = jsonl(tmp_path / "b.jsonl", other)
    found = looked_at(train, model, held_out=(str(held_out),))
    assert (found.n_leaks, found.n_prompt_leaks) == (1, 1)
    assert [(p.source[-9:], p.other[-9:]) for p in (*found.leaks, *found.prompt_leaks)] == [
        ("b.jsonl:1", "a.jsonl:1"),
        ("b.jsonl:2", "a.jsonl:2"),
    ]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.txt", "\n \n"), ("a.csv", "prompt,completion\n")])
def test_a_file_with_nothing_to_learn_from_refuses_the_run(tmp_path, model, name, content):
    (tmp_path / name).write_text(content)
    result = frost("data", tmp_path / name, "--tokenizer", model)
    assert result.exit_code == 2
    assert f"error: nothing to learn from in {tmp_path / name}" in result.output


def test_all_that_is_wrong_is_listed_at_once_and_the_exit_code_says_that_a_run_would_be_refused(tmp_path, model):
    rows = [TURNS, {"messages": [user("x")]}, {"text": "x"}, TURNS]
    file = jsonl(tmp_path / "a.jsonl", rows)
    result = frost("data", file, "--tokenizer", model, "--examples", 0)
    assert result.exit_code == 2
    assert "a.jsonl:2: nothing to learn" in result.output
    assert "a.jsonl:3: no 'messages'" in result.output
    assert "of the assistant counts in the loss (the roles: 'user')" in result.output
    assert "2 examples cannot be used; mend them" in result.output
    assert frost("data", file, "--tokenizer", model, "--set", "data.invalid=drop").exit_code == 0


def test_what_is_worth_knowing_is_said(tmp_path, model):
    rows = [
        {"messages": [user("a <|im_end|> b"), said("c")]},
        {"messages": [{"role": "critic", "content": "lost"}, said("c")]},
    ]
    found = looked_at(jsonl(tmp_path / "a.jsonl", rows), model)
    notes = "\n".join(found.notes)
    assert "messages with a control token in their own text: 1" in notes
    assert "messages whose text the chat template leaves out, or changes: 1" in notes


def recipe(tmp_path, model, **data):
    values = {
        "model": {"architecture": "llama", **tiny.SMALL, "vocab_size": 512},
        "tokenizer": str(model),
        "data": {"length": 32, "batch": 2, **data},
        "stages": [{"learn": "ffn", "steps": 2, "lr": 1e-3}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))  # JSON is YAML
    return tmp_path / "recipe.yaml"


def test_a_recipe_and_its_data_are_shown_in_the_terminal_and_as_json(tmp_path, model):
    train = jsonl(tmp_path / "a.jsonl", [TURNS, CONVERSATIONS["system"]])
    held_out = jsonl(tmp_path / "b.jsonl", [CONVERSATIONS["empty"]])
    file = recipe(tmp_path, model, train=str(train), held_out=[str(held_out)])
    result = frost("data", file)
    assert result.exit_code == 0, result.output
    for expected in (
        "messages",
        "2 examples",
        "⟦Very. é<|im_end|>⟧",
        "layout: packed; longer than a row: truncate",
        "leaks: none",
    ):
        assert expected in result.output
    found = json.loads(frost("data", file, "--json").output)
    assert [p["name"] for p in found["parts"]] == ["train", "held out"]
    assert found["parts"][0]["files"][0]["format"] == "messages"
    assert found["n_refused"] == 0


@pytest.mark.parametrize(
    ("words", "said_"),
    [
        (("a.jsonl",), "name one with --tokenizer"),
        (("none.jsonl", "--tokenizer", "MODEL"), "no such file or folder"),
        (("recipe.yaml", "--tokenizer", "MODEL"), "--tokenizer is for files"),
        (("a.jsonl", "--tokenizer", "MODEL", "--set", "seed=1"), "only keys of `data` can be set"),
        (("a.jsonl", "--tokenizer", "MODEL", "--set", "data.loss_on=lats"), "'data.loss_on'"),
        (("a.jsonl", "--tokenizer", "nowhere/at/all"), "no model at nowhere/at/all"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(tmp_path, model, monkeypatch, words, said_):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", [TURNS])
    recipe(tmp_path, model, train="a.jsonl")
    result = frost("data", *(model if w == "MODEL" else w for w in words))
    assert result.exit_code == 2
    assert said_ in result.output
    assert "Traceback" not in result.output


def test_a_shipped_recipes_data_are_shown_by_its_name(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A text.\n" * 400, encoding="utf-8")
    words = ["data", "ffn", "--set", f"model={model}", "--set", "data.train=a.txt", "--set", "data.length=32"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [p["name"] for p in shown["parts"]] == ["train"]
    refused = CliRunner().invoke(app, ["data", "ffn"])
    assert refused.exit_code == 2
    assert "the recipe ffn trains a model of yours" in refused.output


def test_the_page_escapes_what_is_in_the_data_and_needs_nothing_from_elsewhere(tmp_path, model):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    file = jsonl(tmp_path / "<b>.jsonl", [{"messages": [user(evil), said(evil)]}])
    page = tmp_path / "page.html"
    result = frost("data", file, "--tokenizer", model, "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;.jsonl" in text
    assert not re.search(r"(src|href)=[\"']?(http|//)", text)
    assert "default-src 'none'" in text
    assert f"<mark>{'&lt;script&gt;alert(1)'}" in text


def test_colour_marks_what_learns_where_the_terminal_has_colours(tmp_path, model):
    from rich.console import Console

    from frostline.terminal_data import print_survey

    file = jsonl(tmp_path / "a.jsonl", [TURNS])
    console = Console(force_terminal=True, color_system="truecolor", width=100, record=True)
    with console.capture() as captured:
        print_survey(console, looked_at(file, model))
    assert "⟦" not in captured.get()
    assert re.search(r"\x1b\[[\d;]+mVery\. é<\|im_end\|>\x1b\[0m", captured.get())


@pytest.mark.parametrize(("layout", "held_out_line", "trained_line"), [("packed", "6", "11"), ("stream", "11", "6")])
def test_leaks_are_looked_for_between_what_a_share_leaves_to_train_on_and_what_it_holds_out(
    tmp_path, model, layout, held_out_line, trained_line
):
    rows = [{"messages": [user(f"q{i}"), said(f"a{i}" * 4)]} for i in range(10)]
    train = jsonl(tmp_path / "a.jsonl", [*rows, rows[5]])
    data = {"train": str(train), "held_out": 0.1, "layout": layout}
    found = survey(load_recipe(recipe(tmp_path, model, **data)))
    assert [(p.source.rpartition(":")[2], p.other.rpartition(":")[2]) for p in found.leaks] == [
        (held_out_line, trained_line)
    ]
    assert found.split.startswith("0.1 of the data, ")


def test_the_split_of_a_share_is_the_one_that_training_makes(tmp_path, model):
    from frostline.feed import get_tokenizer, make_feed

    rows = [{"messages": [user(f"q{i}"), said(f"a{i}" * 4)]} for i in range(30)]
    train = jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_recipe(recipe(tmp_path, model, train=str(train), held_out=0.2, layout="padded", length=64))
    feed = make_feed(loaded, get_tokenizer(loaded))
    n = int(re.search(r"(\d+) of them", survey(loaded).split)[1])
    assert (n, 30 - n) == (len(feed.held_out), len(feed.train))


def test_what_forgetting_is_measured_on_is_a_part_of_its_own_and_no_leak(tmp_path, model):
    train = jsonl(tmp_path / "a.jsonl", [TURNS, CONVERSATIONS["system"]] * 2)
    keep = jsonl(tmp_path / "k.jsonl", [{"text": "the river"}])
    file = recipe(tmp_path, model, train=str(train), held_out=[str(keep)])
    values = {**json.loads(file.read_text()), "eval": {"keep": [str(train)]}}
    file.write_text(json.dumps(values))
    found = survey(load_recipe(file))
    assert [p.name for p in found.parts] == ["train", "held out", "keep"]
    assert (found.parts[2].n_examples, found.n_leaks) == (4, 0)


def test_all_that_is_wrong_is_listed_where_the_tokenizer_is_trained_on_the_data_too(tmp_path, model):
    train = jsonl(tmp_path / "a.jsonl", [{"text": "the cold river " * 20}, {"text": 3}, {"txt": "x"}])
    file = recipe(tmp_path, model, train=str(train), held_out=[str(train)])
    values = {**json.loads(file.read_text()), "tokenizer": {"train": "byte-bpe"}}
    file.write_text(json.dumps(values))
    found = survey(load_recipe(file))
    assert (found.parts[0].files[0].dropped, found.n_refused) == (2, 4)
