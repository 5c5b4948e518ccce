"""Data: what is read from files, that every token counts once, and that batches are a pure function of the step."""

from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frostline.data import Batch, Document, Rows, encode, read_documents, read_examples, rows_at, train_byte_bpe
from frostline.errors import DataError
from frostline.recipe import DataSpec

quick = settings(deadline=None, max_examples=40)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(*paths):
    return [d.text for d in read_documents(paths)]


def refused(*paths):
    with pytest.raises(DataError) as caught:
        read_documents(paths)
    return str(caught.value)


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_with_its_file_as_the_source(tmp_path):
    file = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert read_documents([file]) == [Document("one\n\ntwo\n", str(file))]


@pytest.mark.parametrize("name", ["a.md", "a.py", "noend", "a.TXT"])
def test_a_file_named_by_hand_is_read_as_text_whatever_its_suffix(tmp_path, name):
    assert texts(write(tmp_path / name, "some text")) == ["some text"]


def test_files_are_read_in_the_order_given(tmp_path):
    b, a = write(tmp_path / "b.txt", "b"), write(tmp_path / "a.txt", "a")
    assert texts(b, a, str(b)) == ["b", "a", "b"]


def test_a_folder_is_read_sorted_by_name_with_the_folders_inside_it(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "aa/z.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "c.jsonl", '{"text": "c.jsonl"}\n')
    write(tmp_path / "picture.png", b"\xff\xd8")
    assert texts(tmp_path) == ["a.md", "aa/z.txt", "b.txt", "c.jsonl", "sub/c.txt"]


def test_a_jsonl_file_is_one_document_per_line_with_its_line(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "one", "id": 3}\n\n{"id": 4, "text": "two\\nlines"}')
    assert read_documents([file]) == [Document("one", f"{file}:1"), Document("two\nlines", f"{file}:3")]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]
    assert texts(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}')) == ["hello"]


def test_ends_of_lines_of_other_systems_end_json_lines_and_stay_in_texts(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a"}\r\n\r\n{"text": "b"}\r\n')) == ["a", "b"]
    assert texts(write(tmp_path / "a.txt", "a\r\nb\r\n")) == ["a\r\nb\r\n"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_only_a_line_feed_ends_a_json_line(tmp_path, mark):
    row = json.dumps({"text": f"a{mark}b"}, ensure_ascii=False)
    assert texts(write(tmp_path / "a.jsonl", f"{row}\n{row}\n")) == [f"a{mark}b"] * 2


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", ""), ("a.txt", " \n\t\n"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": " "}')]
)
def test_what_holds_no_text_is_no_document(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == []


@given(st.lists(st.text()))
@quick
def test_texts_survive_jsonl(tmp_path_factory, found):
    rows = "\n".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(found))
    file = write(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    assert texts(file) == [t for t in found if t.strip()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": ', ":2: not valid JSON"),
        ('{"text": "a"}\n\n\nplain words\n', ":4: not valid JSON"),
        ("[" * 100_000, ":1: not valid JSON"),
        ('{"text": "a"} {"text": "b"}', ":1: not valid JSON: it ends before character 15, and the line goes on; one"),
        ('[{"text": "a"},\n{"text": "b"}]', ":1: not valid JSON: one example is one line; a list, or what is spread"),
        ('{\n "text": "a"\n}', ":1: not valid JSON: one example is one line; a list, or what is spread over lines, is"),
        ('{"text": "a"}\n' + "\0" * 9, ":2: not valid JSON: the line holds NUL bytes, as after a write that was cut"),
        ('{"txt": "a"}', ":1: expected an object with a string under 'text', found keys 'txt'"),
        (
            '{"text": "a"}\n{"body": 1, "id": 2}',
            ":2: expected an object with a string under 'text', found keys 'body', 'id'",
        ),
        ('{"text": 3}', ":1: expected an object with a string under 'text'"),
        ('{"text": null}', ":1: expected an object with a string under 'text'"),
        ("{}", ":1: expected an object with a string under 'text'"),
        ('["text"]', ":1: expected an object with named values, found list"),
        ('"text"', ":1: expected an object with named values, found str"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, content, said):
    file = write(tmp_path / "a.jsonl", content)
    assert refused(file).startswith(f"{file}{said}")


def test_a_row_with_an_enormous_number_is_refused_with_file_and_line(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}")
    assert refused(file).startswith(f"{file}:1: ")


def test_a_row_with_half_a_surrogate_pair_is_refused_with_file_and_line(tmp_path):
    file = write(tmp_path / "a.jsonl", r'{"text": "a\ud800b"}')
    assert refused(file).startswith(f"{file}:1: ")


def test_bytes_that_are_not_utf_8_are_refused_with_byte_and_offset(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        file = write(tmp_path / name, b"\n \n\xffdef")
        assert refused(file).startswith(f"{file}:3: not UTF-8: byte 0xff at offset 3 of the file; convert the file")
    said = refused(write(tmp_path / "b.txt", "text".encode("utf-16")))
    assert "byte 0xff at offset 0" in said
    assert said.endswith("convert the file to UTF-8 (it is UTF-16: iconv -f UTF-16 -t UTF-8)")
    said = refused(write(tmp_path / "c.txt", "café".encode("latin-1")))
    assert "byte 0xe9 at offset 3" in said
    assert said.endswith("or set `data.undecodable: replace`")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("paper.pdf", b"%PDF-1.4 and only ASCII", "this is a PDF document, no text"),
        ("sheet.xlsx", b"PK\x03\x04", "this is a ZIP archive (.docx and .xlsx are such), no text"),
        (
            "packed",
            gzip.compress(b"text", mtime=0),
            "this is packed by gzip, which is unpacked where the name ends in .gz",
        ),
        ("table.csv", b"prompt;completion\na;b\n", ":1: the header is one column, 'prompt;completion': columns stand"),
        ("table.tsv", b"prompt,completion\na,b\n", "columns stand between commas in .csv, tabs in .tsv"),
    ],
)
def test_what_is_no_text_and_no_table_is_refused_by_what_it_is(tmp_path, name, content, said):
    assert said in refused(write(tmp_path / name, content))


def test_tabs_separate_the_columns_of_tsv(tmp_path):
    file = write(tmp_path / "a.tsv", 'text\tn\n"one, two"\t1\n"tab\there"\t2\n')
    assert texts(file) == ["one, two", "tab\there"]
    assert texts(tmp_path) == texts(file)


def test_the_offset_counts_the_byte_order_mark(tmp_path):
    assert "byte 0xff at offset 5" in refused(write(tmp_path / "a.txt", b"\xef\xbb\xbfab\xff"))


def test_a_missing_path_is_refused(tmp_path):
    assert refused(tmp_path / "none.txt") == f"no text at {tmp_path / 'none.txt'}: there is no such file or folder"


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "a.png", b"x")
    assert refused(tmp_path) == f"the folder {tmp_path} holds no .txt, .md, .jsonl, .json, .csv, .tsv, .parquet file"


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def forbidden(_path):
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refused(file) == f"{file}: cannot be read: Permission denied"


@given(
    st.binary() | st.text(alphabet='{}[]":,\\ \ntexu0d18e-.', max_size=60).map(str.encode),
    st.sampled_from(["txt", "jsonl"]),
)
@quick
def test_any_bytes_are_documents_or_refused_with_their_file(tmp_path_factory, content, suffix):
    file = write(tmp_path_factory.getbasetemp() / f"any.{suffix}", content)
    try:
        found = read_documents([file])
    except DataError as error:
        said = str(error)
    else:
        said = str(file)
        assert all(d.text.strip() and d.source.startswith(str(file)) for d in found)
    assert said.startswith(str(file))


# --- rows -----------------------------------------------------------------------------------------------------------

streams = st.tuples(st.integers(0, 60), st.integers(1, 9))
"""Tokens in the stream, tokens per row."""


def counted(n_tokens, length):
    """A stream in which every token is its own position."""
    return Rows(torch.arange(n_tokens, dtype=torch.int32), length)


def targets(rows):
    return rows.batch(range(len(rows))).labels.flatten().tolist()


@given(streams)
@quick
def test_every_token_but_the_first_is_a_target_once_in_order_up_to_the_last_whole_row(stream):
    n_tokens, length = stream
    rows = counted(n_tokens, length)
    found = targets(rows)
    assert found == list(range(1, len(found) + 1))
    assert 0 <= max(0, n_tokens - 1) - len(found) < length


@given(streams)
@quick
def test_labels_are_the_inputs_one_token_ahead(stream):
    rows = counted(*stream)
    batch = rows.batch(range(len(rows)))
    assert batch.input_ids.shape == batch.labels.shape == (len(rows), stream[1])
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, batch.input_ids + 1)
    assert batch.n_targets == len(rows) * stream[1]


@given(st.integers(2, 9), st.lists(st.integers(0, 6), max_size=8))
@quick
def test_a_batch_has_the_rows_asked_for_in_that_order(length, indices):
    rows = counted(7 * length + 1, length)
    stream = np.arange(7 * length + 1)
    expected = np.array([stream[i * length : (i + 1) * length] for i in indices]).reshape(len(indices), length)
    np.testing.assert_array_equal(rows.batch(indices).input_ids.numpy(), expected)


@given(st.integers(2, 60), st.integers(1, 9), st.floats(0.01, 0.99))
@quick
def test_the_split_off_end_shares_no_target_with_the_rest_and_nothing_is_lost(n_tokens, length, share):
    rows = counted(n_tokens, length)
    if not len(rows):
        return
    rest, end = rows.split_end(share)
    assert targets(rest) + targets(end) == targets(rows)
    assert len(end) == max(1, round(len(rows) * share))


def test_micro_batches_are_the_rows_in_order():
    batch = counted(25, 4).batch(range(6))
    parts = batch.split(3)
    assert [p.n_targets for p in parts] == [8, 8, 8]
    assert torch.equal(torch.cat([p.input_ids for p in parts]), batch.input_ids)
    assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)


def test_labels_of_minus_100_are_no_targets():
    assert Batch(input_ids=torch.zeros(1, 4), labels=torch.tensor([[5, -100, 0, -100]])).n_targets == 2


# --- order ----------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(1, 15))
"""Seed, rows, batch."""


@given(sizes, st.integers(1, 4))
@quick
def test_every_row_comes_exactly_once_per_epoch_and_a_batch_may_span_epochs(size, n_epochs):
    seed, n_rows, batch = size
    n_steps = -(-n_epochs * n_rows // batch)
    order = list(chain.from_iterable(rows_at(s, seed=seed, n_rows=n_rows, batch=batch) for s in range(n_steps)))
    assert len(order) == n_steps * batch
    for epoch in range(n_epochs):
        assert sorted(order[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


@given(sizes, st.lists(st.integers(0, 30), min_size=1), st.randoms())
@quick
def test_the_rows_of_a_step_do_not_depend_on_which_steps_were_asked_for_before(size, steps, random):
    seed, n_rows, batch = size
    first = {s: rows_at(s, seed=seed, n_rows=n_rows, batch=batch) for s in steps}
    rows_at(steps[0], seed=seed, n_rows=n_rows, batch=batch).clear()  # what a caller does with its list is its own
    random.shuffle(steps)
    assert {s: rows_at(s, seed=seed, n_rows=n_rows, batch=batch) for s in steps} == first


@given(sizes, st.integers(0, 20))
@quick
def test_the_order_does_not_depend_on_the_size_of_the_batch(size, step):
    seed, n_rows, batch = size
    one_by_one = [rows_at(i, seed=seed, n_rows=n_rows, batch=1)[0] for i in range(step * batch, (step + 1) * batch)]
    assert rows_at(step, seed=seed, n_rows=n_rows, batch=batch) == one_by_one


def test_order_differs_between_seeds_and_between_epochs():
    orders = [tuple(rows_at(epoch, seed=seed, n_rows=50, batch=50)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_asking_for_rows_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows_at(0, seed=123_456, n_rows=9, batch=4)
    assert torch.equal(torch.rand(1), expected)


# --- tokens ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single letters: a is 10, b is 11, …"""

    def __init__(self, *, bos=None, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, found, *, add_special_tokens, **_):
        assert add_special_tokens is False
        return {"input_ids": [[ord(c) - ord("a") + 10 for c in text] for text in found]}


DOCUMENTS = [Document("ab", "1"), Document("c", "2"), Document("", "3")]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Letters(), [10, 11, 12]),
        (Letters(eos=0), [10, 11, 0, 12, 0, 0]),
        (Letters(bos=1), [1, 10, 11, 1, 12, 1]),
        (Letters(bos=1, eos=0), [1, 10, 11, 0, 1, 12, 0, 1, 0]),
    ],
)
def test_each_document_stands_between_the_begin_and_end_tokens_that_there_are(tokenizer, expected):
    tokens = encode(DOCUMENTS, tokenizer, n_vocabulary=20)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == expected


def test_no_documents_are_no_tokens():
    assert encode([], Letters(), n_vocabulary=20).tolist() == []


def test_a_token_outside_the_vocabulary_is_refused_with_both_numbers():
    assert encode([Document("j", "1")], Letters(), n_vocabulary=20).tolist() == [19]
    with pytest.raises(DataError, match="the tokenizer gives token 20, but the model's vocabulary has 20 entries"):
        encode([Document("ak", "1")], Letters(), n_vocabulary=20)
    with pytest.raises(DataError, match="the tokenizer gives token 20"):
        encode([Document("a", "1")], Letters(eos=20), n_vocabulary=20)


@pytest.fixture(scope="module")
def tokenizer():
    sample = "the cold river runs under the frost line, and the warm stone lies over it. " * 20
    return train_byte_bpe([Document(sample, "sample"), Document("naïve café", "more")], n_vocabulary=300)


def decoded(tokenizer, text):
    ids = encode([Document(text, "here")], tokenizer, n_vocabulary=300).tolist()
    assert ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids[:-1])


@given(st.text())
@example("\x00\x7f\x85\u2028\ufeff\U0010ffff")
@example(" two  spaces . before , signs \n\n\t")
@example("e\u0301 \u00e9 ﬁ ½")
@settings(quick, max_examples=100)
def test_any_text_comes_back_from_its_tokens_as_it_was(tokenizer, text):
    assert decoded(tokenizer, text) == text


def test_training_merges_what_is_frequent_and_ends_documents_with_one_token(tokenizer):
    assert 257 < len(tokenizer) <= 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer("the river")["input_ids"]) < len("the river")


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    documents = [Document("over and under " * 30, "a"), Document("north and south " * 30, "b")]
    one, two = (train_byte_bpe(documents, n_vocabulary=290) for _ in range(2))
    assert one.get_vocab() == two.get_vocab() != tokenizer.get_vocab()


def test_a_vocabulary_of_every_byte_and_the_end_is_the_smallest():
    smallest = train_byte_bpe([Document("aaaa", "a")], n_vocabulary=257)
    assert len(smallest) == 257
    assert len(smallest("aaaa")["input_ids"]) == 4
    with pytest.raises(DataError, match="needs a vocabulary of at least 257, not 256"):
        train_byte_bpe([Document("aaaa", "a")], n_vocabulary=256)


def test_text_that_looks_like_the_end_token_does_not_end_a_document(tokenizer):
    tokens = encode([Document("a<|endoftext|>b", "here")], tokenizer, n_vocabulary=300)
    assert tokens.tolist().count(tokenizer.eos_token_id) == 1


# --- examples -------------------------------------------------------------------------------------------------------


def plain(tmp_path, **fields):
    return DataSpec(train=(str(tmp_path / "a.jsonl"),), **fields)


def test_the_examples_of_texts_are_the_stream_cut_at_documents(tmp_path, tokenizer):
    found = ["the cold river", "naïve", "over and under " * 20]
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in found))
    examples = list(read_examples(plain(tmp_path), [file], tokenizer, n_vocabulary=300))
    stream = encode(read_documents([file]), tokenizer, n_vocabulary=300)
    np.testing.assert_array_equal(np.concatenate([e.ids for e in examples]), stream.numpy())
    assert [e.source for e in examples] == [f"{file}:{n}" for n in (1, 2, 3)]
    for e, text in zip(examples, found, strict=True):
        assert e.learns.tolist() == [False] + [True] * (len(e.ids) - 1)
        first = tokenizer.decode(e.ids[:1])
        assert e.n_bytes == len(text.encode()) - len(first.encode())


def test_reading_examples_is_lazy(tmp_path, tokenizer):
    rows = [json.dumps({"text": "the river"})] * 200 + ["no json"]
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    examples = read_examples(plain(tmp_path), [file], tokenizer, n_vocabulary=300)
    assert next(examples).source.endswith(":1")
    with pytest.raises(DataError, match=":201: not valid JSON"):
        list(examples)


def test_labels_that_do_not_count_leave_the_inputs_of_a_single_row_as_they_are() -> None:
    tokens, learns = torch.arange(9, dtype=torch.int32), torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.uint8)
    (row,) = Rows(tokens, 8, learns).batch([0]).input_ids
    assert row.tolist() == list(range(8))
