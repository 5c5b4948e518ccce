"""`frostline upcycle` and `frostline experts`, as typed."""

from __future__ import annotations

import json

import pytest
import tiny
from dense import save_llama
from typer.testing import CliRunner

from frostline.cli import app
from frostline.selection import select


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model, a text and an upcycled model."""
    folder = tmp_path_factory.mktemp("moe")
    save_llama(folder / "dense")
    tiny.write_text(folder / "text.txt")
    made = run("upcycle", folder / "dense", folder / "moe", "--experts", 4)
    assert made.exit_code == 0, made.output
    (folder / "said").write_text(made.output)
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_upcycle_prints_what_it_made_and_measured(place):
    said = (place / "said").read_text()
    assert "llama → mixtral: 4 experts, 2 per token, in 3 layers" in said
    assert "the same function: ‖Δlogits‖/‖logits‖ = " in said
    assert "note: all experts are equal at first" in said


def test_upcycle_prints_its_record_as_json(place, tmp_path):
    words = ("--top-k", 1, "--top1", "switch", "--target", "qwen2_moe", "--layers", "0,2", "--json")
    made = run("upcycle", place / "dense", tmp_path / "moe", *words)
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert (record["target"], record["layers"], record["promised"]) == ("qwen2_moe", [0, 2], False)
    assert 0.55 < record["ffn_factor"] < 0.65  # half is the shared expert's, the rest has a weight of about 1/8


def test_experts_says_that_copies_are_identical_and_none_is_unused(place):
    said = run("experts", place / "moe", "--data", place / "text.txt", "--length", 32)
    assert said.exit_code == 0, said.output
    assert "3 of 3 layers have identical experts" in said.output
    assert "layers[2].ffn" in said.output


def test_experts_prints_a_selection_that_can_be_trained_and_writes_it_for_esft(place, tmp_path):
    words = ("--data", place / "text.txt", "--length", 32, "--top", 2, "--by", "gate", "--esft", tmp_path / "e.json")
    said = run("experts", place / "moe", *words, "--json")
    assert said.exit_code == 0, said.output
    data = json.loads(said.stdout)
    chosen = select(tiny.anatomy("mixtral"), data["learn"])
    assert chosen.n_elements == 3 * 2 * 3 * 32 * 48
    assert {len(e) for e in json.loads((tmp_path / "e.json").read_text())["experts"].values()} == {2}
    shares = [sum(s["load"]) for s in data["sites"]]
    assert shares == [2 * data["n_tokens"]] * 3


@pytest.fixture(scope="module")
def chat(place):
    """Conversations, a chat template, and what it makes of them as a text."""
    (place / "chat.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    turns = [{"role": "user", "content": "Where is the cold river?"}, {"role": "assistant", "content": "North of it."}]
    (place / "chat.jsonl").write_text((json.dumps({"talk": turns}) + "\n") * 8)
    return place / "chat.jsonl", ("--set", "data.columns={messages: talk}"), f"data.chat_template={place}/chat.jinja"


@pytest.mark.parametrize("command", [("experts",), ("select", "experts[top 1 by tokens]")])
def test_conversations_are_measured_with_the_data_settings_of_a_recipe(place, chat, command):
    file, columns, template = chat
    name, *expression = command
    words = (name, place / "moe", *expression, "--data", file, *columns, "--length", 8, "--json")
    found = run(*words, "--set", template)
    assert found.exit_code == 0, found.output
    refused = run(*words)
    assert (refused.exit_code, "chat template" in refused.output) == (2, True)


def test_the_tokens_that_are_measured_are_those_of_the_chat_template(place, chat):
    file, columns, template = chat
    count = lambda *more: json.loads(run("experts", place / "moe", *more, "--length", 2, "--json").stdout)["n_tokens"]  # noqa: E731
    (place / "as-text.txt").write_text("user: Where is the cold river?\nassistant: North of it.\n" * 8)
    as_text = count("--data", place / "as-text.txt")
    assert abs(count("--data", file, *columns, "--set", template) - as_text) <= 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "x.txt", "--set", "data.length=4"), "data.length does not change which tokens a file has"),
        (("--data", "x.txt", "--set", "model=y"), "only keys of `data` can be set"),
        (("--set", "data.format=text"), "give --data too"),
        (("--data", "x.txt", "--set", "data.loss_onn=all"), "loss_on"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(place, words, said):
    found = run("experts", place / "moe", *words)
    assert (found.exit_code, said in found.output) == (2, True), found.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("upcycle", "{dense}", "{dense}"), "never overwrites"),
        (("upcycle", "{dense}", "{out}", "--layers", "a"), "write numbers with commas"),
        (("experts", "{dense}", "--data", "{text}"), "no router"),
        (("experts", "{moe}", "--data", "{text}", "--top", "1", "--cover", "0.5"), "two ways to choose"),
        (("experts", "{moe}", "--data", "{text}", "--esft", "{out}"), "give --top or --cover too"),
        (("experts", "{moe}", "--data", "{text}", "--length", "100000"), "less than one row"),
        (("experts", "{moe}", "--data", "{text}", "--length", "32", "--top", "9"), "name 1 to 4"),
    ],
)
def test_a_users_mistake_is_said_and_exits_with_2(place, tmp_path, words, said):
    names = {"dense": place / "dense", "moe": place / "moe", "text": place / "text.txt", "out": tmp_path / "out"}
    result = run(*(w.format(**names) for w in words))
    assert result.exit_code == 2
    assert said in result.output
