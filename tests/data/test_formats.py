"""Formats and files: found, or refused with the place; the same rows whatever kind of file they come from."""

from __future__ import annotations

import csv
import gzip
import json
import sys

import chats
import numpy as np
import pytest
from chats import shown
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.data import Document, Tally, files_to_hash, read_examples, train_byte_bpe
from frostline.data.sources import texts_of
from frostline.errors import DataError
from frostline.recipe import DataSpec, SourceSpec

TEXTS = ["the cold river", 'naïve\ncafé, with "quotes"', " two  spaces "]
quick = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def plain():
    return train_byte_bpe([Document("the cold river runs. " * 30, "x")], n_vocabulary=270)


def read(sources, made, *, tally=None, **fields):
    sources = sources if isinstance(sources, (list, tuple)) else [sources]
    spec = DataSpec(train=tuple(s if isinstance(s, SourceSpec) else str(s) for s in sources), **fields)
    return list(read_examples(spec, spec.train, made, n_vocabulary=len(made), tally=tally))


def refused(sources, made, **fields):
    with pytest.raises(DataError) as caught:
        read(sources, made, **fields)
    return str(caught.value)


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return path


# --- kinds of file --------------------------------------------------------------------------------------------------


def as_jsonl(path, rows):
    return jsonl(path / "a.jsonl", rows)


def as_gz(path, rows):
    file = path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl(path / "plain", rows).read_bytes()))
    return file


def as_zst(path, rows):
    arrow = pytest.importorskip("pyarrow")
    file = path / "a.jsonl.zst"
    with arrow.output_stream(str(file), compression="zstd") as stream:
        stream.write(jsonl(path / "plain", rows).read_bytes())
    return file


def as_json(path, rows):
    file = path / "a.json"
    file.write_text(json.dumps(rows, indent=2))
    return file


def as_json_with_data(path, rows):
    file = path / "a.json"
    file.write_text(json.dumps({"version": 1, "data": rows}))
    return file


def as_json_lines_called_json(path, rows):
    return jsonl(path / "a.json", rows)


def as_csv(path, rows):
    file = path / "a.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def as_parquet(path, rows):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path / "a.parquet")
    return path / "a.parquet"


def as_saved_dataset(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return path / "saved"


KINDS = [
    as_jsonl, as_gz, as_zst, as_json, as_json_with_data, as_json_lines_called_json, as_csv, as_parquet,
    as_saved_dataset,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, plain, kind):
    rows = [{"text": t, "id": str(i)} for i, t in enumerate(TEXTS)]
    tally = Tally()
    found = read(kind(tmp_path, rows), plain, tally=tally)
    assert [plain.decode(e.ids[:-1]) for e in found] == TEXTS
    assert [t.format for t in tally.files.values()] == ["text"]
    assert len({e.source for e in found}) == 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_conversations_come_from_every_kind_of_file_where_there_are_no_lists_as_json(tmp_path, kind):
    made = chats.tokenizer("chatml")
    rows = [{"messages": chats.CONVERSATIONS[n]["messages"]} for n in ("turns", "system")]
    if kind is as_csv:
        rows = [{"messages": json.dumps(r["messages"])} for r in rows]
    found = read(kind(tmp_path, rows), made)
    assert [shown(e, made) for e in found] == [chats.EXPECTED["chatml"][n] for n in ("turns", "system")]


def test_a_saved_dataset_with_splits_gives_the_one_asked_for(tmp_path, plain):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {n: datasets.Dataset.from_list([{"text": f"the {n}"}]) for n in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for split, expected in ((None, "the train"), ("test", "the test")):
        (example,) = read(SourceSpec(path=str(tmp_path / "saved"), split=split), plain)
        assert plain.decode(example.ids[:-1]) == expected
    found = refused(SourceSpec(path=str(tmp_path / "saved"), split="dev"), plain)
    assert "no split 'dev'; it has 'train', 'test'" in found


def test_a_hub_name_goes_to_datasets_with_its_settings(monkeypatch, plain):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*given, **settings):
        asked.append((given, settings))
        return iter([{"text": "the river"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read(SourceSpec(path="owner/name", split="test", subset="small", revision="abc"), plain)
    assert asked == [(("owner/name", "small"), {"split": "test", "revision": "abc"})]


def test_a_hub_name_without_a_network_is_refused_with_both_readings_of_the_name(plain):
    pytest.importorskip("datasets")
    found = refused("owner/surely-not-there", plain)
    assert "no file or folder owner/surely-not-there here, and no dataset of that name can be loaded" in found


@pytest.mark.parametrize(
    ("suffix", "package"), [(".parquet", "pyarrow.parquet"), (".jsonl.zst", "pyarrow")], ids=["parquet", "zst"]
)
def test_without_the_extra_the_message_says_what_to_install(tmp_path, plain, monkeypatch, suffix, package):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'frostline[data]'" in refused(file, plain)


def test_a_card_beside_data_is_no_text_and_other_readmes_are(tmp_path, plain):
    as_jsonl(tmp_path, [{"text": "the river"}])
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# A card")
    assert len(read(tmp_path, plain)) == 1
    card.write_text("# Words")
    assert len(read(tmp_path, plain)) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], "compression is broken"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst: cannot be read"),
        ("a.parquet", b"no parquet", "no readable Parquet file"),
        ("a.csv", b"text,text\na,b\n", "names a column twice: 'text'"),
        ("a.csv", b"text\na,b\n", "a.csv:2: 2 fields, but the header names 1"),
        ("a.csv", b'text\n"a\n', "not valid CSV"),
        ("a.json", b'{"text": "a"}', "found keys 'text'"),
        ("a.json", b"3", "found int"),
        ("a.json", b"[3]", "a.json[0]: expected an object"),
        ("a.json", b"[{]", "not valid JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path, plain, name, content, said):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(content)
    found = refused(file, plain)
    assert said in found
    assert str(file) in found


def test_undecodable_bytes_become_replacement_characters_when_that_is_chosen(tmp_path, plain):
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9")
    (example,) = read(file, plain, undecodable="replace")
    assert plain.decode(example.ids[:-1]) == "caf�"


# --- formats --------------------------------------------------------------------------------------------------------

PROMPT = {"prompt": "Q: cold? A:", "completion": " yes é"}


def test_of_prompt_and_completion_the_completion_learns_with_the_end(tmp_path, plain):
    (example,) = read(as_jsonl(tmp_path, [PROMPT]), plain)
    assert shown(example, plain) == "Q: cold? A:⟦ yes é<|endoftext|>⟧"
    assert example.n_bytes == len(" yes é".encode())
    (everything,) = read(as_jsonl(tmp_path, [PROMPT]), plain, loss_on="all")
    assert everything.learns.tolist() == [False] + [True] * (len(everything.ids) - 1)


@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
@quick
def test_prompt_and_completion_together_are_the_text_and_the_mask_begins_where_the_completion_does(
    tmp_path_factory, plain, prompt, completion
):
    file = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "completion": completion}))
    (example,) = read(file, plain)
    assert plain.decode(example.ids[:-1]) == prompt + completion
    n = int(np.argmax(example.learns))
    assert example.learns[n:].all()
    before = plain.decode(example.ids[:n]).rstrip("�")
    assert prompt.startswith(before) or not prompt  # the first token of a text is never learnt
    rest = plain(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    assert n <= max(len(rest), 1)


def test_prompt_and_completion_may_be_messages(tmp_path):
    made = chats.tokenizer("chatml")
    messages = chats.CONVERSATIONS["turns"]["messages"]
    (example,) = read(as_jsonl(tmp_path, [{"prompt": messages[:3], "completion": messages[3:]}]), made)
    assert shown(example, made) == chats.EXPECTED["chatml"]["turns"].replace("⟦", "", 1).replace("⟧", "", 1)


def test_messages_may_be_columns_of_roles_and_of_contents_as_some_datasets_have_them(tmp_path):
    made = chats.tokenizer("chatml")
    messages = chats.CONVERSATIONS["turns"]["messages"]
    row = {"messages": {k: [m[k] for m in messages] for k in ("role", "content")}}
    (example,) = read(as_jsonl(tmp_path, [row]), made)
    assert shown(example, made) == chats.EXPECTED["chatml"]["turns"]


def test_sharegpt_is_a_conversation_under_other_names(tmp_path):
    made = chats.tokenizer("chatml")
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    for name in ("turns", "system", "tool"):
        given = chats.CONVERSATIONS[name]
        turns = [
            {"from": "function_call", "value": '{"name": "depth", "arguments": {"of": "ice"}}'}
            if m.get("tool_calls")
            else {"from": names[m["role"]], "value": m["content"]}
            for m in given["messages"]
        ]
        row = {"conversations": turns, "tools": json.dumps(given.get("tools", []))}
        (example,) = read(as_jsonl(tmp_path, [row]), made)
        assert shown(example, made) == chats.EXPECTED["chatml"][name]


def test_alpaca_goes_through_the_chat_template_where_there_is_one_and_is_its_classic_prompt_elsewhere(tmp_path, plain):
    file = as_jsonl(tmp_path, [{"instruction": "Say it.", "input": "cold", "output": "Cold."}])
    made = chats.tokenizer("chatml")
    (example,) = read(file, made)
    assert shown(example, made) == (
        "<|im_start|>user\nSay it.\n\ncold<|im_end|>\n<|im_start|>assistant\n⟦Cold.<|im_end|>⟧\n"
    )
    (example,) = read(file, plain)
    assert shown(example, plain).endswith(
        "### Instruction:\nSay it.\n\n### Input:\ncold\n\n### Response:\n⟦Cold.<|endoftext|>⟧"
    )


@pytest.mark.parametrize(
    ("row", "learns"),
    [
        ({"input_ids": [5, 6, 7, 8]}, "0111"),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, "0011"),
        ({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}, "0010"),
        ({"input_ids": [5, 6, 7, 8], "loss_mask": [1, 1, 0, 1]}, "0101"),
        ({"input_ids": [5, 6, 7, 8], "completion_mask": [False, False, False, True]}, "0001"),
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, "01"),
        ({"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]}, "011"),
    ],
)
def test_tokens_made_elsewhere_keep_their_mask(tmp_path, plain, row, learns):
    (example,) = read(as_jsonl(tmp_path, [row]), plain)
    kept = [i for i, m in zip(row["input_ids"], row.get("attention_mask", [1] * 4), strict=True) if m]
    assert example.ids.tolist() == kept
    assert example.learns.tolist() == [c == "1" for c in learns]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "nothing to learn"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "nothing to learn"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "labels[0] is 6, input_ids[0] is 5"),
        ({"input_ids": [5, 6], "labels": [6]}, "'labels' has 1 entries, 'input_ids' 2"),
        ({"input_ids": [5, 6], "labels": [5, 6], "loss_mask": [1, 1]}, "'loss_mask', 'labels' each say"),
        ({"input_ids": [5, 6], "loss_mask": [1, 2]}, "must be a list of 0 and 1"),
        ({"input_ids": [5, 999]}, "input_ids holds 999, but the model's vocabulary has"),
        ({"input_ids": [5, -1]}, "input_ids holds -1"),
        ({"input_ids": [5, 1.5]}, "must be a list of whole numbers"),
        ({"input_ids": []}, "nothing to learn"),
        ({"prompt": "a", "completion": 3}, "a.jsonl:1: found the columns 'prompt', 'completion'"),
        ({"prompt": "a", "completion": [1]}, "both be strings or both be lists"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user"}]}, "message 0: has neither 'content' nor 'tool_calls'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "message 0: expected an object with a 'role'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "message 0: only text can be trained on, and a part of 'content' is 'image'",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "'weight' must be 0 or 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "needs a function with a 'name'"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "message 0: 'from' is 'martian'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "must be JSON with 'name'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "'tools' is not valid JSON"),
    ],
)
def test_a_row_that_is_not_what_its_format_says_is_refused_with_its_line(tmp_path, row, said):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    found = refused(file, chats.tokenizer("chatml"))
    assert said in found
    assert found.startswith(f"{file}:1: ")


def test_unknown_columns_are_refused_with_what_was_found_what_is_known_and_what_is_nearest(tmp_path, plain):
    found = refused(as_jsonl(tmp_path, [{"prompts": "a", "completions": "b"}]), plain)
    assert "found the columns 'prompts', 'completions'" in found
    assert "messages: messages; sharegpt: conversations; tokens: input_ids; prompt: prompt, completion" in found
    assert "the nearest is prompt: `data.columns: {prompt: prompts, completion: completions}`" in found
    found = refused(as_jsonl(tmp_path, [{"id": 1, "question": "a", "answer": "b"}]), plain)
    assert "the nearest is prompt: `data.columns: {prompt: question, completion: answer}`" in found
    found = refused(as_jsonl(tmp_path, [{"text": 3}]), plain)
    assert "'text' holds int, which is not what text has there" in found
    found = refused(as_jsonl(tmp_path, [{"x": 1}]), plain)
    assert "data.columns`, as in {text: body}" in found
    found = refused(as_jsonl(tmp_path, [{"chosen": "a", "rejected": "b"}]), plain)
    assert "preference pairs (chosen, rejected) are no training text" in found


def test_columns_can_be_named(tmp_path, plain):
    file = as_jsonl(tmp_path, [{"question": "Q: A:", "answer": " b", "prompt": "other"}])
    (example,) = read(file, plain, columns={"prompt": "question", "completion": "answer"})
    assert shown(example, plain) == "Q: A:⟦ b<|endoftext|>⟧"
    found = refused(file, plain, columns={"text": "awnser"})
    assert "data.columns names 'awnser', found 'question', 'answer', 'prompt'. Did you mean 'answer'?" in found


def test_a_file_is_one_format_and_a_row_of_another_is_refused_with_its_line(tmp_path, plain):
    file = as_jsonl(tmp_path, [{"text": "a"}, PROMPT])
    found = refused(file, plain)
    assert f"{file}:2: no 'text' for the format text; it looks like the format prompt" in found


def test_files_of_different_formats_may_be_mixed_and_each_is_said(tmp_path, plain):
    (tmp_path / "x").mkdir()
    first, second = as_jsonl(tmp_path, [{"text": "a b"}]), as_jsonl(tmp_path / "x", [PROMPT])
    tally = Tally()
    assert len(read([first, second], plain, tally=tally)) == 2
    assert [t.format for t in tally.files.values()] == ["text", "prompt"]


def test_where_several_formats_fit_the_others_are_said_and_the_recipe_can_choose(tmp_path):
    made = chats.tokenizer("chatml")
    row = {"text": "hello there", "messages": chats.CONVERSATIONS["turns"]["messages"]}
    tally = Tally()
    (example,) = read(as_jsonl(tmp_path, [row]), made, tally=tally)
    (file,) = tally.files.values()
    assert (file.format, file.also, file.given) == ("messages", ("text",), False)
    (example,) = read(as_jsonl(tmp_path, [row]), made, format="text", tally=(tally := Tally()))
    assert made.decode(example.ids[:-1]) == "hello there"
    assert next(iter(tally.files.values())).given


def test_a_text_file_cannot_be_given_another_format(tmp_path, plain):
    file = tmp_path / "a.txt"
    file.write_text("x")
    assert "a text file cannot hold the format messages" in refused(file, plain, format="messages")


def test_what_is_blank_or_dropped_is_counted(tmp_path, plain):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a b"}\n{"text": " "}\nno json\n{"text": 3}\n[1]\n{"text": "c"}\n')
    tally = Tally()
    assert len(read(file, plain, invalid="drop", tally=tally)) == 2
    (found,) = tally.files.values()
    assert (found.rows, found.examples, found.blank, found.dropped, len(found.reasons)) == (6, 2, 1, 3, 3)
    assert refused(file, plain).startswith(f"{file}:3: not valid JSON")


def test_an_empty_file_has_no_examples(tmp_path, plain):
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name, plain) == []


def test_null_bytes_stay_and_byte_order_marks_go(tmp_path, plain):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\na\x00b\r\n")
    (example,) = read(tmp_path / "a.csv", plain)
    assert plain.decode(example.ids[:-1]) == "a\x00b"


# --- mixtures -------------------------------------------------------------------------------------------------------


def numbered(folder, name, n):
    return jsonl(folder / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(n)])


def test_a_weight_is_how_often_the_examples_of_a_source_come(tmp_path, plain):
    a, b = numbered(tmp_path, "a", 40), numbered(tmp_path, "b", 40)
    sources = [SourceSpec(path=str(a), weight=2.5), str(b), SourceSpec(path=str(b), weight=0.25)]
    held_out = (str(b),)
    found = [plain.decode(e.ids[:-1]) for e in read(sources, plain, held_out=held_out)]
    again = [plain.decode(e.ids[:-1]) for e in read(sources, plain, held_out=held_out)]
    assert found == again
    counts = [found.count(f"a {i}") for i in range(40)]
    assert set(counts) == {2, 3}
    assert 8 <= counts.count(3) <= 32
    more = [found.count(f"b {i}") for i in range(40)]
    assert set(more) == {1, 2}
    assert 2 <= more.count(2) <= 20


def test_a_share_cannot_be_held_out_of_a_weighted_mixture():
    with pytest.raises(ValueError, match="copies of what is held out would be trained on"):
        DataSpec(train=({"path": "a.jsonl", "weight": 2},))


def test_everything_written_is_there_to_train_a_tokenizer(tmp_path):
    files = [
        jsonl(tmp_path / "a.jsonl", [{"text": "one"}]),
        jsonl(tmp_path / "b.jsonl", [{"prompt": "two ", "completion": "three"}]),
        jsonl(tmp_path / "c.jsonl", [chats.CONVERSATIONS["tool"]]),
    ]
    spec = DataSpec(train=tuple(map(str, files)))
    found = [d.text for d in texts_of(spec, spec.train)]
    assert found == ["one", "two three", "How deep?", "3 m", "Three.", "Sure?", "Yes."]
    tokens = jsonl(tmp_path / "d.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(DataError, match="no tokenizer can be trained on tokens"):
        list(texts_of(spec, [tokens]))


def test_what_decides_the_data_is_hashed_downloads_and_chat_template_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    file = as_jsonl(tmp_path, [{"text": "the river"}])
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "kept")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(tmp_path / "kept"))
    spec = DataSpec(train=(str(file), "owner/name"), held_out=(str(file),), chat_template="chat.jinja")
    found = files_to_hash(spec)
    assert found[0] == str(file)
    assert found[1].startswith(str(tmp_path / "kept"))
    assert found[1].endswith(".arrow")
    assert found[2:] == ("chat.jinja",)


def test_a_text_of_one_token_is_an_example_without_a_target_of_its_own(tmp_path):
    letters = train_byte_bpe([Document("ab " * 50, "x")], n_vocabulary=257)
    letters.eos_token = None
    (example,) = read(as_jsonl(tmp_path, [{"text": "a"}]), letters)
    assert (len(example.ids), example.learns.tolist(), example.n_bytes) == (1, [False], 0)
    assert "nothing to learn" in refused(as_jsonl(tmp_path, [{"prompt": "", "completion": "a"}]), letters)


def test_without_an_end_token_texts_have_no_end_and_that_is_said(tmp_path):
    from frostline.survey import survey

    letters = train_byte_bpe([Document("ab " * 50, "x")], n_vocabulary=257)
    letters.eos_token = None
    file = as_jsonl(tmp_path, [{"text": "ab"}])
    (example,) = read(file, letters)
    assert letters.decode(example.ids) == "ab"
    letters.save_pretrained(tmp_path / "letters")
    (tmp_path / "letters" / "config.json").write_text('{"model_type": "llama"}')
    found = survey(DataSpec(train=(str(file),)), tokenizer=str(tmp_path / "letters"))
    assert any("no end token" in note for note in found.notes)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient_that_is_not_finite():
    import tiny
    import torch

    from frostline.data import Batch
    from frostline.engine import next_token_loss, step

    model = tiny.model("llama")
    ids = torch.arange(8).reshape(1, 8)
    empty = Batch(input_ids=ids, labels=torch.full((1, 8), -100))
    full = Batch(input_ids=ids, labels=ids)
    assert float(next_token_loss(model, empty).detach()) == 0.0
    kept = {"seed": 0, "device": torch.device("cpu")}
    assert float(step(model, [empty], next_token_loss, **kept).loss) == 0.0
    model.zero_grad()
    step(model, [empty, full], next_token_loss, **kept)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    step(model, [full], next_token_loss, **kept)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, plain, monkeypatch):
    from frostline.data import files

    monkeypatch.setattr(files, "LINE_BYTES", 1000)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"x" * 100_000))
    assert f"{file}:2: a line of more than 1000 bytes" in refused(file, plain)
