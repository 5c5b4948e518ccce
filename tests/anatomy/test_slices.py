"""Slices against Python's sets of index tuples, and reading and writing them against numpy's indexing."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.anatomy import (
    Slice,
    fingerprint,
    intersect,
    intersect_all,
    merge,
    part,
    put,
    refine,
    slice_from_json,
    slice_to_json,
    subtract,
    subtract_all,
    take,
    whole,
)
from frostline.anatomy.slices import compress

quick = settings(deadline=None, max_examples=30)

SHAPES = {"scalar": (), "vector": (9,), "matrix": (5, 6), "packed": (3, 4, 5)}
"""Tensor → shape."""


def elements(*slices):
    """(tensor, index, …) of every element, each as often as it is held."""
    found = []
    for s in slices:
        found += [(s.tensor, *at) for at in product(*([i for r in dim for i in r] for dim in s.index))]
    return found


def disjoint(slices):
    found = elements(*slices)
    return len(found) == len(set(found))


def one_by_one(indices):
    """The same indices as ranges of one: allowed by the type, but not the canonical form."""
    return tuple(range(i, i + 1) for i in sorted(indices))


@st.composite
def slices(draw, tensors=tuple(SHAPES)):
    """Any slice of one of the tensors: per dimension a part of the indices, in canonical form or not."""
    tensor = draw(st.sampled_from(tensors))
    index = []
    for n in SHAPES[tensor]:
        chosen = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
        index.append(draw(st.sampled_from((compress, one_by_one)))(chosen))
    return Slice(tensor, tuple(index))


@st.composite
def disjoint_slices(draw, tensors=tuple(SHAPES)):
    chosen: list[Slice] = []
    for s in draw(st.lists(slices(tensors), max_size=5)):
        if disjoint([*chosen, s]):
            chosen.append(s)
    return tuple(chosen)


def assert_well_formed(found):
    """What the type promises: every dimension has ascending, disjoint, non-empty ranges."""
    for s in found:
        for dim in s.index:
            indices = [i for r in dim for i in r]
            assert indices == sorted(set(indices))
            assert all(len(r) for r in dim)
            assert dim


@given(st.lists(st.integers(0, 40)))
@quick
def test_compress_holds_exactly_the_indices_it_was_given(indices):
    ranges = compress(indices)
    assert [i for r in ranges for i in r] == sorted(set(indices))
    assert all(len(r) for r in ranges)


@given(st.lists(st.integers(0, 40)), st.randoms())
@quick
def test_compress_gives_one_canonical_form_whatever_the_order(indices, random):
    shuffled = indices + indices[:3]
    random.shuffle(shuffled)
    assert compress(shuffled) == compress(indices)
    assert all(len(r) >= 3 for r in compress(indices) if r.step > 1)


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [
        ([], ()),
        ([4], (range(4, 5),)),
        ([0, 1, 2, 3], (range(4),)),
        ([0, 2, 4, 6], (range(0, 8, 2),)),
        ([0, 5], (range(1), range(5, 6))),
        ([0, 1, 4, 6, 8, 9], (range(2), range(4, 9, 2), range(9, 10))),
    ],
)
def test_compress_writes_runs_of_equal_steps_as_one_range(indices, ranges):
    assert compress(indices) == ranges


@given(slices())
@quick
def test_a_slice_counts_its_elements(piece):
    assert piece.n_elements == len(elements(piece)) == np.prod(piece.shape, dtype=int)
    assert piece.shape == tuple(len({i for r in dim for i in r}) for dim in piece.index)


@pytest.mark.parametrize(("tensor", "shape"), SHAPES.items())
def test_the_whole_is_every_index_of_the_shape(tensor, shape):
    assert set(elements(whole(tensor, shape))) == {(tensor, *at) for at in np.ndindex(shape)}
    assert whole(tensor, shape).n_elements == int(np.prod(shape))


@pytest.mark.parametrize("indices", [range(2), range(3, 5), range(1, 5, 2)])
def test_a_part_takes_indices_of_one_dimension_and_all_of_the_others(indices):
    found = set(elements(part("packed", (6, 5, 2), 1, indices)))
    assert found == {("packed", *at) for at in np.ndindex((6, 5, 2)) if at[1] in indices}


@given(slices(), slices())
@quick
def test_intersect_is_the_intersection_of_the_sets(a, b):
    common = intersect(a, b)
    expected = set(elements(a)) & set(elements(b))
    assert (common is None) == (not expected)
    assert set(elements(*([common] if common else []))) == expected
    assert_well_formed([common] if common else [])


@given(slices(), slices())
@quick
def test_subtract_is_the_difference_of_the_sets_in_disjoint_pieces(a, b):
    pieces = subtract(a, b)
    assert set(elements(*pieces)) == set(elements(a)) - set(elements(b))
    assert disjoint(pieces)
    assert len(pieces) <= max(1, len(a.index))
    assert_well_formed(pieces)


@given(slices())
@quick
def test_a_slice_without_itself_is_nothing_and_with_itself_the_same(piece):
    assert subtract(piece, piece) == ()
    assert intersect(piece, piece) == piece


def test_slices_of_different_tensors_never_meet():
    a, b = whole("a", (2, 3)), whole("b", (2, 3))
    assert intersect(a, b) is None
    assert subtract(a, b) == (a,)
    assert intersect_all((a,), (b,)) == ()
    assert subtract_all((a,), (b,)) == (a,)


@given(disjoint_slices(), st.lists(slices(), max_size=4))
@quick
def test_subtract_all_takes_away_every_set_even_overlapping_ones(kept, taken):
    rest = subtract_all(kept, taken)
    assert set(elements(*rest)) == set(elements(*kept)) - set(elements(*taken))
    assert disjoint(rest)
    assert_well_formed(rest)


@given(disjoint_slices(), disjoint_slices())
@quick
def test_intersect_all_is_the_intersection_of_the_unions(left, right):
    common = intersect_all(left, right)
    assert set(elements(*common)) == set(elements(*left)) & set(elements(*right))
    assert disjoint(common)
    assert_well_formed(common)


@given(disjoint_slices(), disjoint_slices())
@quick
def test_refine_keeps_the_elements_and_lets_no_piece_straddle_the_cutter(pieces, cutter):
    refined = refine(pieces, cutter)
    inside = set(elements(*cutter))
    assert sorted(elements(*refined)) == sorted(elements(*pieces))
    assert all(len({e in inside for e in elements(p)}) == 1 for p in refined)
    assert_well_formed(refined)


@given(disjoint_slices())
@quick
def test_merge_keeps_the_elements_in_no_more_slices(pieces):
    merged = merge(pieces)
    assert sorted(elements(*merged)) == sorted(elements(*pieces))
    assert len(merged) <= len(pieces)
    assert_well_formed(merged)


@given(st.sampled_from(["vector", "matrix", "packed"]), st.data())
@quick
def test_merge_undoes_a_cut_along_one_dimension(tensor, data):
    shape = SHAPES[tensor]
    dim = data.draw(st.integers(0, len(shape) - 1))
    inner = data.draw(st.lists(st.integers(1, shape[dim] - 1), unique=True))
    cuts = [0, *sorted(inner), shape[dim]]
    pieces = [part(tensor, shape, dim, range(*ends)) for ends in pairwise(cuts)]
    assert merge(data.draw(st.permutations(pieces))) == (whole(tensor, shape),)


def test_merge_joins_experts_that_lie_apart_into_one_slice():
    odd = [part("packed", (6, 2, 2), 0, range(i, i + 1)) for i in (1, 3, 5)]
    assert merge(odd) == (part("packed", (6, 2, 2), 0, range(1, 6, 2)),)


@given(slices())
@quick
def test_a_slice_survives_json(piece):
    assert slice_from_json(json.loads(json.dumps(slice_to_json(piece)))) == piece


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (whole("w", ()), "w"),
        (whole("w", (3,)), "w[0:3]"),
        (Slice("w", ((range(2), range(4, 9, 2)), (range(1),))), "w[0:2+4:9:2, 0:1]"),
    ],
)
def test_a_slice_is_written_as_its_ranges(piece, text):
    assert str(piece) == text


def grid(piece):
    """The same elements for numpy; for a 0-dimensional tensor `()`, which indexes its one element."""
    return np.ix_(*([i for r in dim for i in r] for dim in piece.index))


def numbered(tensor):
    return np.arange(np.prod(SHAPES[tensor], dtype=int), dtype=np.float32).reshape(SHAPES[tensor])


@given(slices())
@quick
def test_take_reads_what_numpy_reads(piece):
    array = numbered(piece.tensor)
    taken = take(torch.from_numpy(array), piece)
    assert taken.shape == piece.shape
    np.testing.assert_array_equal(taken.numpy(), array[grid(piece)])


@given(slices(), st.sampled_from("CF"))
@quick
def test_put_writes_what_numpy_writes_and_nothing_else(piece, order_in_memory):
    expected = numbered(piece.tensor)
    values = np.asarray(-1 - np.arange(piece.n_elements, dtype=np.float32).reshape(piece.shape))
    target = torch.from_numpy(expected.copy(order=order_in_memory))
    expected[grid(piece)] = values
    put(target, piece, torch.from_numpy(values))
    np.testing.assert_array_equal(target.numpy(), expected)


@given(slices())
@quick
def test_putting_back_what_was_taken_changes_nothing(piece):
    tensor = torch.from_numpy(numbered(piece.tensor))
    before = fingerprint(tensor)
    put(tensor, piece, take(tensor, piece).clone())
    assert fingerprint(tensor) == before


def test_take_is_a_view_where_one_range_per_dimension_allows_it():
    tensor = torch.zeros(6, 8)
    take(tensor, Slice("w", ((range(1, 3),), (range(0, 8, 2),)))).fill_(1)
    assert tensor.sum() == 8
    assert torch.equal(tensor[1:3, ::2], torch.ones(2, 4))


def test_put_into_a_leaf_that_needs_a_gradient_works_without_recording_it():
    leaf = torch.nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        put(leaf, Slice("w", ((range(1), range(2, 3)), (range(4),))), torch.ones(2, 4))
    assert leaf.is_leaf
    assert leaf.detach().sum(1).tolist() == [4, 0, 4, 0]


def test_a_fingerprint_is_the_hash_of_type_shape_and_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(b"torch.float32(2, 3)" + array.tobytes()).hexdigest()
    assert fingerprint(torch.from_numpy(array)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_fingerprint_exists_for_every_type_and_shape_and_depends_on_one_element(dtype, shape):
    tensor = torch.zeros(shape, dtype=dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    if tensor.numel():
        other = tensor.clone()
        other.view(-1)[-1] = 1
        assert fingerprint(other) != fingerprint(tensor)


def test_a_fingerprint_sees_elements_in_row_major_order_whatever_the_memory():
    tensor = torch.arange(12.0).view(3, 4)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous()) != fingerprint(tensor)
    assert fingerprint(tensor[:, ::2]) == fingerprint(tensor[:, ::2].clone())


def test_fingerprints_tell_apart_equal_numbers_of_other_bytes_types_and_shapes():
    zero = torch.zeros(4)
    others = [-zero, zero.view(2, 2), zero.double(), zero.int(), torch.zeros(8, dtype=torch.bfloat16)]
    assert len({fingerprint(t) for t in (zero, *others)}) == 6


def test_equal_not_a_number_bytes_have_equal_fingerprints():
    assert fingerprint(torch.tensor([float("nan")])) == fingerprint(torch.tensor([float("nan")]))
