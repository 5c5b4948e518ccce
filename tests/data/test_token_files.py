"""Tokens in files: the same as in memory, made once, by any number of processes, resumable, never stale, never torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from frostline.data import Document, Store, Tally, read_examples, token_files, train_byte_bpe
from frostline.data.caching import cache_folder, load_store
from frostline.data.parts import chunks_of
from frostline.data.token_files import content_hash, tokenised
from frostline.errors import DataError, StorageError
from frostline.recipe import DataSpec, source_of

N = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe([Document(" ".join(tiny.WORDS) * 5, "a")], n_vocabulary=300)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, and prompts with completions, of which only the latter learn."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)

    def words():
        n = int(torch.randint(1, 40, (1,), generator=generator))
        return " ".join(tiny.WORDS[i] for i in torch.randint(len(tiny.WORDS), (n,), generator=generator))

    texts, pairs = folder / "texts.jsonl", folder / "pairs.jsonl"
    texts.write_text("\n".join(json.dumps({"text": words()}) for _ in range(N)), encoding="utf-8")
    pairs.write_text(
        "\n".join(json.dumps({"prompt": words() + " ", "completion": words()}) for _ in range(N)), encoding="utf-8"
    )
    return texts, pairs


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("frostline.data.parts.CHARACTERS", 4000)


def spec_of(*paths, **fields):
    return DataSpec(train=tuple(map(str, paths)), **fields)


def made(cache, tokenizer, *paths, workers=1, say=lambda _: None, **fields):
    spec, tally = spec_of(*paths, **fields), Tally()
    store = tokenised(spec, spec.train, tokenizer, n_vocabulary=300, cache=cache, workers=workers, tally=tally, say=say)
    return store, tally


def in_memory(tokenizer, *paths, **fields):
    spec, tally = spec_of(*paths, **fields), Tally()
    return Store.of(read_examples(spec, spec.train, tokenizer, n_vocabulary=300, tally=tally)), tally


def assert_equal(found: Store, expected: Store):
    for name in ("tokens", "learns", "offsets", "n_bytes", "sources"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert found.files == expected.files


def parts_of(cache):
    return sorted(p.name for p in cache.glob("*.partial/part-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_files_hold_what_memory_holds_however_many_processes_make_them(tmp_path, files, tokenizer, workers):
    for paths in (files, files[:1]):
        store, tally = made(tmp_path, tokenizer, *paths, workers=workers)
        expected, expected_tally = in_memory(tokenizer, *paths)
        assert_equal(store, expected)
        assert tally == expected_tally
        assert (store.learns is None) == (len(paths) == 1)
        assert store.n_documents == N * len(paths)


def test_what_is_dropped_is_counted_when_it_is_made_and_when_it_is_only_opened(tmp_path, tokenizer):
    file = tokens_with_nothing_to_learn(tmp_path / "tokens.jsonl")
    file.write_text(file.read_text() + "no json\n", encoding="utf-8")
    for _ in range(2):
        store, tally = made(tmp_path / "cache", tokenizer, file, workers=2, invalid="drop")
        expected, expected_tally = in_memory(tokenizer, file, invalid="drop")
        assert_equal(store, expected)
        assert sorted(tally.files[str(file)].reasons) == sorted(expected_tally.files[str(file)].reasons)
        assert tally.files[str(file)].dropped == expected_tally.files[str(file)].dropped == 11


def test_a_row_that_is_refused_stops_every_process_with_its_place(tmp_path, tokenizer):
    file = tokens_with_nothing_to_learn(tmp_path / "tokens.jsonl")
    with pytest.raises(DataError, match=r"tokens.jsonl:1: nothing to learn"):
        made(tmp_path / "cache", tokenizer, file, workers=2)


def tokens_with_nothing_to_learn(file):
    """100 rows of tokens; in every tenth no token counts."""
    rows = [{"input_ids": [5, 6, 7 + i], "loss_mask": [0, 0, int(i % 10 > 0)]} for i in range(100)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


def test_a_second_run_makes_nothing(tmp_path, files, tokenizer, monkeypatch):
    first, _ = made(tmp_path, tokenizer, *files)
    monkeypatch.setattr(token_files, "chunks_of", lambda *_: pytest.fail("read again"))
    again, _ = made(tmp_path, tokenizer, *files)
    assert_equal(again, first)


def test_tokens_are_never_stale(tmp_path, files, tokenizer, monkeypatch):
    texts = files[0]
    copy = tmp_path / "texts.jsonl"
    copy.write_bytes(texts.read_bytes())
    spec = spec_of(copy)
    other_tokenizer = train_byte_bpe([Document("another text", "a")], n_vocabulary=290)

    def key(spec=spec, tokenizer=tokenizer, n_vocabulary=300):
        return content_hash(spec, [source_of(s) for s in spec.train], tokenizer, n_vocabulary=n_vocabulary)

    keys = [key(), key(tokenizer=other_tokenizer), key(n_vocabulary=301), key(spec_of(copy, format="text"))]
    copy.write_bytes(texts.read_bytes().replace(b"frost", b"Frost", 1))
    keys.append(key())
    monkeypatch.setattr(token_files, "hash_file", lambda path: f"other code of {path.name}")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_tokens_does_not_change_the_cache(files, tokenizer):
    keys = {
        content_hash(spec, [source_of(s) for s in spec.train], tokenizer, n_vocabulary=300)
        for spec in (
            spec_of(files[0]),
            spec_of(files[0], length=99, batch=3, layout="flat", long="drop", held_out=0.3, workers=4),
        )
    }
    assert len(keys) == 1


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("point", ["part", "before manifest", "before rename", "after rename"])
def test_stopped_at_any_point_it_goes_on_to_the_same_tokens(tmp_path, files, tokenizer, monkeypatch, point):
    times = []

    def stop(at):
        if at == point:
            times.append(at)
            if point != "part" or len(times) == 3:
                raise StoppedError

    monkeypatch.setattr(token_files, "reached", stop)
    with pytest.raises(StoppedError):
        made(tmp_path, tokenizer, *files)
    if point == "part":
        assert len(parts_of(tmp_path)) == 3
    monkeypatch.undo()
    monkeypatch.setattr("frostline.data.parts.CHARACTERS", 4000)
    said = []
    store, tally = made(tmp_path, tokenizer, *files, say=said.append)
    expected, expected_tally = in_memory(tokenizer, *files)
    assert_equal(store, expected)
    assert tally == expected_tally
    if point == "part":
        assert "tokens: 3 parts are there from before" in said


def test_a_part_that_is_damaged_is_made_again(tmp_path, files, tokenizer, monkeypatch):
    def stop(at):
        if at == "before manifest":
            raise StoppedError

    monkeypatch.setattr(token_files, "reached", stop)
    with pytest.raises(StoppedError):
        made(tmp_path, tokenizer, files[0])
    monkeypatch.setattr(token_files, "reached", lambda _: None)
    first, second, *_ = sorted(tmp_path.glob("*.partial/part-*"))
    first.write_bytes(first.read_bytes()[:40])
    second.unlink()
    store, _ = made(tmp_path, tokenizer, files[0])
    assert_equal(store, in_memory(tokenizer, files[0])[0])


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "MANIFEST.json"])
def test_damaged_files_are_said_and_made_again(tmp_path, files, tokenizer, name):
    made(tmp_path, tokenizer, files[0])
    (path,) = tmp_path.glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = []
    store, _ = made(tmp_path, tokenizer, files[0], say=said.append)
    assert_equal(store, in_memory(tokenizer, files[0])[0])
    assert any("is damaged" in line for line in said)


KILLED = """
import sys
from pathlib import Path
from frostline.data import Tally, parts, token_files
from transformers import PreTrainedTokenizerFast
from frostline.recipe import DataSpec
parts.CHARACTERS = 4000
token_files.reached = lambda point: (print(point, flush=True), sys.stdin.readline())
source, tokenizer, cache = sys.argv[1:]
spec = DataSpec(train=(source,))
token_files.tokenised(
    spec,
    spec.train,
    PreTrainedTokenizerFast.from_pretrained(tokenizer),
    n_vocabulary=300,
    cache=Path(cache),
    workers=2,
    tally=Tally(),
)
"""


def test_killed_it_leaves_whole_parts_and_no_processes(tmp_path, files, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(files[0]), str(tmp_path / "tokenizer"), str(tmp_path / "cache")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "part\n"
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.stdout.readline() == "part\n"
    process.kill()
    process.communicate(timeout=60)  # until its workers, which hold the same pipe, have ended too
    assert len(parts_of(tmp_path / "cache")) == 4
    store, _ = made(tmp_path / "cache", tokenizer, files[0])
    assert_equal(store, in_memory(tokenizer, files[0])[0])


def test_a_process_that_is_ended_from_outside_is_a_typed_error(tmp_path, files, tokenizer, monkeypatch):
    monkeypatch.setattr("frostline.data.parts._made", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="out of memory"):
        made(tmp_path, tokenizer, files[0], workers=2)


def test_a_cache_that_cannot_be_written_is_an_error_of_storage(tmp_path, files, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        made(tmp_path / "file" / "cache", tokenizer, files[0])


def test_parts_follow_from_the_sources_alone(files):
    spec = spec_of(*files)
    one, two = ([c.shapes for c in chunks_of(spec, map(source_of, spec.train), Tally())] for _ in range(2))
    assert one == two
    assert len(one) > 5
    assert sum(map(len, one)) == 2 * N


def test_small_inputs_stay_in_memory_and_large_ones_go_to_the_users_cache(files, tokenizer, monkeypatch, tmp_path):
    spec = spec_of(files[0])
    sources = [source_of(s) for s in spec.train]
    assert cache_folder(spec, sources) is None
    assert cache_folder(spec_of(files[0], cache="here"), sources) == Path("here")
    monkeypatch.setattr("frostline.data.caching.IN_MEMORY_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "own"))
    assert cache_folder(spec, sources) == tmp_path / "own" / "tokens"
    monkeypatch.delenv("FROSTLINE_CACHE")
    assert cache_folder(spec, sources) == tmp_path / "frostline" / "tokens"
    store = load_store(spec, spec.train, tokenizer, n_vocabulary=300, tally=Tally())
    assert_equal(store, in_memory(tokenizer, files[0])[0])
    assert len(list((tmp_path / "frostline").glob("tokens/*/tokens.bin"))) == 1


def test_mapped_tokens_are_not_in_memory(tmp_path, tokenizer):
    file = tmp_path / "one.txt"
    file.write_text("frost " * 200)
    store, _ = made(tmp_path / "cache", tokenizer, file)
    (path,) = (tmp_path / "cache").glob("*/tokens.bin")
    expected = np.fromfile(path, np.int32)
    assert np.array_equal(store.tokens.numpy(), expected)
    assert str(path) in Path("/proc/self/maps").read_text()
