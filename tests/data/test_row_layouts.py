"""Layouts: every document lies in rows once, what is too long has a policy and is counted, batches are pure."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.data import Documents, Example, FlatRows, PackedRows, PaddedRows, Rows, Store, cut, rows_at
from frostline.data.packing import pack_lengths, plan_rows
from frostline.data.store import file_of

quick = settings(deadline=None, max_examples=40)
LENGTH = 8


def example(*ids, learns=None, source="a.jsonl:1"):
    mask = [False, *[True] * (len(ids) - 1)] if learns is None else learns
    return Example(
        ids=np.asarray(ids, np.int32), learns=np.asarray(mask, np.bool_), n_bytes=len(ids) - 1, source=source
    )


def store_of(lengths):
    """Documents of so many tokens, all tokens different."""
    ends = list(accumulate(lengths))
    return Store.of(example(*range(end - n, end)) for n, end in zip(lengths, ends, strict=True))


def all_rows(store, layout, *, long="split", length=LENGTH, seed=0):
    pieces = cut(store, length, long)
    match layout:
        case "packed":
            return PackedRows.of(pieces, length, seed=seed, kept_by="calls")
        case "flat":
            return FlatRows(pieces, "calls")
        case _:
            return PaddedRows(pieces)


def pairs(batch):
    """(input, label) of every place that counts."""
    counts = batch.labels != -100
    return list(zip(batch.input_ids[counts].tolist(), batch.labels[counts].tolist(), strict=True))


documents = st.lists(st.integers(0, 30), min_size=1, max_size=40)
each_layout = pytest.mark.parametrize("layout", ["packed", "padded", "flat"])


# --- packing --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(0, 3))
@quick
def test_every_document_lies_in_exactly_one_row_and_no_row_is_too_full(lengths, seed):
    lengths = np.asarray(lengths, np.int64)
    plan = plan_rows(lengths, 20, seed=seed)
    assert sorted(plan.members.tolist()) == list(range(len(lengths)))
    assert all(1 <= lengths[plan.row(i)].sum() <= 20 for i in range(len(plan)))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@quick
def test_rows_are_as_few_as_best_fit_decreasing_one_by_one_makes_them(lengths):
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        best = min((i for i, room in enumerate(rooms) if room >= n), key=lambda i: rooms[i], default=None)
        if best is None:
            rooms.append(20 - n)
        else:
            rooms[best] -= n
    assert sum(n for _, n in pack_lengths(np.asarray(lengths), 20)) == len(rooms)


def test_many_documents_take_few_patterns():
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.clamp((90 * torch.exp(0.98 * drawn)).long(), 1, 1024).numpy()
    patterns = pack_lengths(lengths, 1024)
    assert len(patterns) < 4000
    assert lengths.sum() / (1024 * sum(n for _, n in patterns)) > 0.999


def test_which_documents_share_a_row_follows_from_the_seed():
    lengths = np.asarray([3, 4, 5, 3, 4, 5, 2, 2] * 4)
    one, same, other = (plan_rows(lengths, 12, seed=s).members.tolist() for s in (1, 1, 2))
    assert one == same != other


# --- what is too long -----------------------------------------------------------------------------------------------


@given(documents)
@quick
def test_split_documents_lose_no_target_and_count_none_twice(lengths):
    store = store_of(lengths)
    pieces = cut(store, LENGTH, "split")
    found = [p for i in range(len(pieces)) for p in zip(*(t.tolist() for t in pieces.piece(i)), strict=True)]
    ends = list(accumulate(lengths))
    expected = [(t, t + 1) for n, end in zip(lengths, ends, strict=True) for t in range(end - n, end - 1)]
    assert found == expected
    assert pieces.cutting.tokens_left_out == 0
    assert all(1 <= n <= LENGTH for n in pieces.lengths)


def test_each_policy_does_to_a_long_document_what_its_name_says_and_counts_it():
    store = store_of([5, 20, 9, 1, 10])
    found = {long: cut(store, LENGTH, long) for long in ("split", "truncate", "drop")}
    assert found["split"].lengths.tolist() == [4, 8, 8, 3, 8, 8, 1]
    assert found["truncate"].lengths.tolist() == [4, 8, 8, 8]
    assert found["drop"].lengths.tolist() == [4, 8]
    assert found["truncate"].piece(1)[0].tolist() == list(range(5, 13))
    for long, left_out in (("split", 0), ("truncate", 11 + 1), ("drop", 19 + 9)):
        cutting = found[long].cutting
        assert (cutting.documents, cutting.long, cutting.tokens_left_out) == (5, 2, left_out)
        assert (cutting.policy, cutting.pieces) == (long, len(found[long]))


def test_a_document_of_one_token_has_no_target_and_is_counted():
    cutting = cut(store_of([1, 4, 1]), LENGTH, "split").cutting
    assert (cutting.without_target, cutting.pieces) == (2, 1)


def test_a_piece_in_which_nothing_learns_is_left_out_and_counted():
    long = example(*range(20), learns=[False] * 12 + [True] * 8)
    pieces = cut(Store.of([long, example(1, 2, learns=[False, True])]), LENGTH, "split")
    assert pieces.lengths.tolist() == [8, 3, 1]  # the first eight targets of the long one do not count
    assert pieces.piece(0)[1].tolist() == [-100] * 3 + [12, 13, 14, 15, 16]
    assert (pieces.cutting.without_target, pieces.cutting.tokens_left_out) == (1, 8)


# --- rows -----------------------------------------------------------------------------------------------------------


@each_layout
@given(lengths=documents)
@quick
def test_every_target_of_every_document_is_in_the_rows_once_after_its_own_token(layout, lengths):
    rows = all_rows(store_of(lengths), layout)
    found = sorted(p for i in range(len(rows)) for p in pairs(rows.batch([i])))
    ends = list(accumulate(lengths))
    assert found == [(t, t + 1) for n, end in zip(lengths, ends, strict=True) for t in range(end - n, end - 1)]


@each_layout
def test_positions_begin_again_with_every_document_and_no_label_reaches_into_the_next(layout):
    store = store_of([5, 3, 7, 4, 2, 6])
    batch = all_rows(store, layout).batch([0, 1])
    inputs = batch.inputs
    if layout == "padded":
        assert torch.equal(inputs["attention_mask"], (batch.labels != -100).long())
        return
    starts = set(store.offsets.tolist())
    positions = inputs["position_ids"]
    assert positions.shape == batch.input_ids.shape
    inside = batch.labels != -100
    assert {
        t for t, p in zip(batch.input_ids[inside].tolist(), positions[inside].tolist(), strict=True) if p == 0
    } <= starts
    assert all(t not in starts for _, t in pairs(batch))


def test_rows_of_the_stream_count_only_what_learns():
    store = Store.of([example(1, 2, 3, 4, learns=[False, False, True, True]), example(5, 6, learns=[False, True])])
    rows = Rows(store.tokens, 5, store.learns)
    assert rows.batch([0]).labels.tolist() == [[-100, 3, 4, -100, 6]]


def test_only_rows_of_a_fixed_shape_say_which_they_are():
    store = store_of([5, 3, 7])
    assert all_rows(store, "packed").batch([1]).indices == (1,)
    assert all_rows(store, "padded").batch([1]).indices is None
    assert all_rows(store, "flat").batch([1]).indices is None
    assert Rows(store.tokens, 4).batch([2, 0]).indices == (2, 0)


# --- micro-batches --------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_micro_batches_hold_every_pair_of_the_batch_once(layout, n):
    rows = all_rows(store_of([5, 3, 7, 4, 2, 6, 8, 9, 3, 5, 9, 9, 9]), layout)
    batch = rows.batch(range(6))
    parts = batch.split(n)
    assert len(parts) == n
    assert [p for part in parts for p in pairs(part)] == pairs(batch)
    assert sum(part.n_targets for part in parts) == batch.n_targets
    assert all(part.inputs.keys() == batch.inputs.keys() for part in parts)


def test_a_padded_micro_batch_is_no_longer_than_its_own_longest_document():
    rows = all_rows(store_of([3, 2, 9, 4]), "padded")
    assert [tuple(p.input_ids.shape) for p in rows.batch(range(4)).split(2)] == [(2, 2), (2, 8)]


# --- order ----------------------------------------------------------------------------------------------------------


@each_layout
def test_the_next_hundred_batches_are_the_same_after_a_restart_and_do_not_depend_on_how_ranks_divide_them(layout):
    lengths = [int(n) for n in torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(1))]
    first, again = (all_rows(store_of(lengths), layout, seed=3) for _ in range(2))
    n, size = len(first), 4

    def at(rows, step, world=1):
        indices = rows_at(step, seed=3, n_rows=n, batch=size)
        each = size // world
        return [p for rank in range(world) for p in pairs(rows.batch(indices[rank * each : (rank + 1) * each]))]

    steps = range(n // size // 2, n // size // 2 + 100)  # across epochs
    assert steps.stop * size > 2 * n
    assert [at(first, s) for s in steps] == [at(again, s) for s in steps] == [at(again, s, world=2) for s in steps]


def test_the_order_of_rows_is_that_of_the_first_release():
    assert rows_at(5, seed=1, n_rows=10, batch=4) == [9, 1, 8, 7]


# --- stores ---------------------------------------------------------------------------------------------------------


def test_a_store_keeps_what_examples_say():
    store = Store.of([example(1, 2, 3), example(4, source="b.json[7]"), example(5, 6, source="a.jsonl:9")])
    assert store.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert store.tokens.dtype == torch.int32
    assert store.offsets.tolist() == [0, 3, 4, 6]
    assert (store.learns, store.n_learning) == (None, 3)
    assert (store.files, store.sources.tolist()) == (("a.jsonl", "b.json"), [0, 1, 0])
    assert store.of_files([1]).tolist() == [1]


@pytest.mark.parametrize(
    ("place", "file"),
    [("a.jsonl:12", "a.jsonl"), ("a.json[3]", "a.json"), ("a.txt", "a.txt"), ("C:b", "C:b"), ("x[y]", "x[y]")],
)
def test_the_file_of_a_place(place, file):
    assert file_of(place) == file


def test_no_examples_are_an_empty_store():
    store = Store.of([])
    assert (store.n_documents, len(store.tokens)) == (0, 0)
    assert len(cut(store, LENGTH, "split")) == 0


def test_padding_after_the_documents_of_a_row_counts_its_own_positions():
    assert Documents(((2, 3), (4,))).positions(6).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
