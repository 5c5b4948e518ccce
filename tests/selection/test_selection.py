"""Selections against an independent evaluation: one mark per element of every parameter, combined with and, or, not."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import replace
from functools import lru_cache, reduce

import all_types
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frostline.anatomy import anatomy_of_parts, read_anatomy, slice_to_json
from frostline.errors import SelectionError
from frostline.selection import Selection, compare, known_names, select, selection_to_json, shared_heads

quick = settings(deadline=None, max_examples=20)
families = st.sampled_from(["llama", "gpt2", "mixtral", "olmo2"])

EXPERT = r"\.experts\[{}\]\."
LEAVES = {
    "all": ("", ""),
    "embed": ("^embed$", ""),
    "head": ("^head$", ""),
    "final_norm": ("^final_norm$", ""),
    "position": ("^position$", ""),
    "layers": ("^layers", ""),
    "layers[1]": (r"^layers\[1\]", ""),
    "layers[-1]": (r"^layers\[2\]", ""),
    "layers[-3]": (r"^layers\[0\]", ""),
    "layers[:2]": (r"^layers\[[01]\]", ""),
    "layers[1:]": (r"^layers\[[12]\]", ""),
    "layers[:]": (r"^layers", ""),
    "layers[::2]": (r"^layers\[[02]\]", ""),
    "layers[-2:-1]": (r"^layers\[1\]", ""),
    "layers[0, -1]": (r"^layers\[[02]\]", ""),
    "layers[0:1, 2]": (r"^layers\[[02]\]", ""),
    "attn": (r"\.attn\.", ""),
    "ffn": (r"\.ffn\.", ""),
    "q": (r"\.q$", ""),
    "attn.k": (r"\.attn\.k$", ""),
    "layers[2].attn.v": (r"^layers\[2\]\.attn\.v$", ""),
    "layers[1:].attn": (r"^layers\[[12]\]\.attn\.", ""),
    "{q,v}": (r"\.[qv]$", ""),
    "attn.{k,o}": (r"\.attn\.[ko]$", ""),
    "layers[::2].{attn,ffn}": (r"^layers\[[02]\]\.(attn|ffn)\.", ""),
    "ffn.up": (r"\.ffn\.up$", ""),
    "down": (r"\.down$", ""),
    "ffn_norm": (r"\.ffn_norm$", ""),
    "norm": ("norm$", ""),
    "layers.norm": ("^layers.*norm$", ""),
    "attn.norm": (r"\.attn\..*norm$", ""),
    "bias": ("", r"\.bias$"),
    "q.bias": (r"\.q$", r"\.bias$"),
    "layers[1].attn.bias": (r"^layers\[1\]\.attn\.", r"\.bias$"),
    "mixer": (r"\.attn\.", ""),
    "qk": (r"\.attn\.[qk]$", ""),
    "layers[0].vo": (r"^layers\[0\]\.attn\.[vo]$", ""),
    "router": (r"\.router$", ""),
    "experts": (r"\.experts\[", ""),
    "experts[0]": (EXPERT.format(0), ""),
    "ffn.experts[-1]": (EXPERT.format(3), ""),
    "experts[1:3].{gate,up}": (EXPERT.format("[12]") + "(gate|up)$", ""),
    "layers[0].ffn.experts[0,2:].down": (r"^layers\[0\]\.ffn\.experts\[[023]\]\.down$", ""),
}
"""Leaf → what the name of a component, and of a tensor, must contain: the meaning, written without the grammar."""


HEAD, LAST_KV = [*range(16, 24)], [*range(8, 16)]
SLICES = {
    "layers[1].attn.heads[2]": [
        (r"layers\.1\.self_attn\.(q_proj|q_norm)\.weight", 0, HEAD),
        (r"layers\.1\.self_attn\.o_proj\.weight", 1, HEAD),
        (r"h\.1\.attn\.c_attn\.weight", 1, HEAD + [32 + i for i in HEAD] + [64 + i for i in HEAD]),
        (r"h\.1\.attn\.c_attn\.bias", 0, HEAD + [32 + i for i in HEAD] + [64 + i for i in HEAD]),
        (r"h\.1\.attn\.c_proj\.weight", 0, HEAD),
    ],
    "kv_heads[-1]": [
        (r"self_attn\.(k_proj|v_proj|k_norm)\.weight", 0, LAST_KV),
        (r"h\.\d\.attn\.c_attn\.weight", 1, [*range(56, 64), *range(88, 96)]),
        (r"h\.\d\.attn\.c_attn\.bias", 0, [*range(56, 64), *range(88, 96)]),
    ],
    "layers[::2].ffn.neurons[0:5]": [
        (r"layers\.[02]\.mlp\.(gate|up)_proj\.weight", 0, range(5)),
        (r"layers\.[02]\.mlp\.down_proj\.weight", 1, range(5)),
        (r"h\.[02]\.mlp\.c_fc\.weight", 1, range(5)),
        (r"h\.[02]\.mlp\.c_fc\.bias|h\.[02]\.mlp\.c_proj\.weight", 0, range(5)),
    ],
    "embed.rows[300:]": [("embed_tokens|wte", 0, range(300, 320))],
    "head.rows[0, 7]": [("lm_head", 0, [0, 7])],
    'param("*.1.*weight")': [(r"\.1\..*weight$", 0, None)],
    "param('*.[02].?*_proj.weight')": [(r"\.[02]\..*_proj\.weight$", 0, None)],
}
"""Leaf below the tensor → (pattern of tensor names, dimension, indices or None for all), from how the models are built:
4 query heads of width 8, 2 key heads (4 in GPT-2, whose matrices are (inputs, outputs): q, then k, then v)."""


class UndefinedError(Exception):
    """An expression that has no meaning in this model."""


@lru_cache
def offsets(family):
    """Where the elements of each parameter (tied names apart) stand in the row of marks; and the row's length."""
    at, out = 0, {}
    for t in tiny.anatomy(family).tensors:
        if t.kind == "parameter":
            out[t.name] = at
            at += int(np.prod(t.shape))
    return out, at


def marks(family, slices):
    """How often each element is held by the slices."""
    start, length = offsets(family)
    row = np.zeros(length, dtype=int)
    for s in slices:
        shape = tiny.anatomy(family).tensor[s.tensor].shape
        flat = row[start[s.tensor] :][: int(np.prod(shape))].reshape(shape)
        flat[np.ix_(*([i for r in dim for i in r] for dim in s.index))] += 1
    return row


def slice_marks(family, leaf):
    """Marks of a leaf of `SLICES`."""
    start, length = offsets(family)
    row = np.zeros(length, dtype=bool)
    for t in tiny.anatomy(family).tensors:
        for pattern, dim, indices in SLICES[leaf]:
            if t.kind == "parameter" and re.search(pattern, t.name):
                part = row[start[t.name] :][: t.n_elements].reshape(t.shape)
                np.moveaxis(part, dim, 0)[slice(None) if indices is None else list(indices)] = True
    return row


@lru_cache(maxsize=256)
def leaf_marks(family, leaf):
    if leaf in SLICES:
        found = slice_marks(family, leaf)
        if not found.any():
            raise UndefinedError
        return found
    component, tensor = LEAVES[leaf]
    anatomy = tiny.anatomy(family)
    found = marks(
        family,
        [
            s
            for c in anatomy.components
            for s in c.slices
            if re.search(component, c.name) and re.search(tensor, s.tensor) and s.tensor in offsets(family)[0]
        ],
    )
    if not found.any():
        raise UndefinedError
    return found == 1


def evaluate(family, tree):
    match tree:
        case str():
            return leaf_marks(family, tree)
        case ("~", operand):
            return ~evaluate(family, operand)
        case ("|", left, right):
            return evaluate(family, left) | evaluate(family, right)
        case (op, left, right):
            left, right = evaluate(family, left), evaluate(family, right)
            if not (left & right).any():
                raise UndefinedError
            return left & (right if op == "&" else ~right)


def expected_marks(family, tree, ties):
    """The marks of a whole expression: not empty, and tied names together (or refused), under the owning name."""
    found = evaluate(family, tree).copy()
    if not found.any():
        raise UndefinedError
    start, _ = offsets(family)
    for alias, source in tiny.anatomy(family).ties.items():
        n = tiny.anatomy(family).tensor[alias].n_elements
        as_alias, as_source = found[start[alias] :][:n], found[start[source] :][:n]
        if ties == "error" and (as_alias != as_source).any():
            raise UndefinedError
        as_source |= as_alias
        as_alias[:] = False
    return found


LEVEL = {"|": 0, "&": 1, "-": 1}


def written(tree, level=0):
    """The text of a tree, with parentheses only where the grammar asks for them."""
    match tree:
        case str():
            return tree
        case ("~", operand):
            return f"~{written(operand, 2)}"
        case (op, left, right):
            text = f"{written(left, LEVEL[op])} {op} {written(right, LEVEL[op] + 1)}"
            return f"({text})" if LEVEL[op] < level else text


def combined(leaves):
    return st.recursive(
        st.sampled_from(leaves),
        lambda inner: st.tuples(st.just("~"), inner) | st.tuples(st.sampled_from("||&-"), inner, inner),
        max_leaves=6,
    )


IN_ALL = [
    leaf
    for leaf in (*LEAVES, *SLICES)
    if not re.search("position|bias|attn.norm|ffn_norm|ffn.up|router|experts|neurons|_proj", leaf)
]
"""Leaves that match something in every family."""
trees = st.one_of(combined(IN_ALL), combined(list(SLICES) + IN_ALL[:8]), combined([*LEAVES, *SLICES]))
defined = st.lists(st.sampled_from(IN_ALL), min_size=1, max_size=3).map(
    lambda found: reduce(lambda a, b: ("|", a, b), found)
)
"""Unions of such leaves: expressions that mean something in every family."""


def outcome(family, text, ties="together"):
    """The selection, or None where it is refused."""
    try:
        return select(tiny.anatomy(family), text, ties=ties)
    except SelectionError as error:
        assert 0 <= error.column <= len(text), error  # noqa: PT017
        return None


def chosen(text, family="mixtral", **settings_):
    return select(tiny.anatomy(family), text, **settings_)


# --- against the independent evaluation -----------------------------------------------------------------------------


@given(families, trees, st.sampled_from(["error", "together"]))
@settings(quick, max_examples=80)
def test_an_expression_means_what_its_marks_mean_and_is_refused_where_they_mean_nothing(family, tree, ties):
    try:
        expected = expected_marks(family, tree, ties)
    except UndefinedError:
        assert outcome(family, written(tree), ties) is None
        return
    selection = outcome(family, written(tree), ties)
    assert selection is not None
    assert (marks(family, selection.slices) == expected).all()
    assert selection.n_elements == expected.sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "olmo2", "qwen2"])
def test_every_leaf_means_the_components_that_its_words_say(family):
    for leaf in LEAVES:
        try:
            expected = expected_marks(family, leaf, "together")
        except UndefinedError:
            assert outcome(family, leaf) is None, leaf
        else:
            assert (marks(family, outcome(family, leaf).slices) == expected).all(), leaf


@given(families, defined)
@quick
def test_the_slices_are_disjoint_parameters_in_the_order_of_the_anatomy_and_their_counts_add_up(family, tree):
    selection = chosen(written(tree), family, ties="together")
    anatomy = tiny.anatomy(family)
    held = marks(family, selection.slices)
    assert held.max() == 1
    assert selection.n_elements == held.sum() == sum(s.n_elements for s in selection.slices) <= anatomy.n_parameters
    names = [t.name for t in anatomy.tensors]
    order = [(names.index(s.tensor), [dim[0].start for dim in s.index]) for s in selection.slices]
    assert order == sorted(order)
    assert all(anatomy.learnable(s) and s.tensor not in anatomy.ties for s in selection.slices)
    assert selection.n_tensors == len({s.tensor for s in selection.slices})


@given(families, defined)
@quick
def test_the_parts_by_component_hold_every_selected_element_once(family, tree):
    selection = chosen(written(tree), family, ties="together")
    parts = list(selection.by_component())
    assert (marks(family, [s for _, found in parts for s in found]) == marks(family, selection.slices)).all()
    for component, found in parts:
        own = marks(family, [s for s in component.slices if tiny.anatomy(family).learnable(s)])
        assert (marks(family, found) <= own).all()
    layers = {int(m[1]) for c, _ in parts if (m := re.match(r"layers\[(\d+)\]", c.name))}
    assert set(selection.layers) == layers


# --- algebra --------------------------------------------------------------------------------------------------------


@given(families, trees, trees)
@quick
def test_and_and_or_do_not_care_for_the_order_of_their_sides(family, a, b):
    for op in "&|":
        assert outcome(family, written((op, a, b))) == outcome(family, written((op, b, a)))


@given(families, trees)
@quick
def test_the_complement_of_the_complement_is_the_same(family, a):
    once, twice = outcome(family, written(a)), outcome(family, written(("~", ("~", a))))
    assert once == twice


@given(families, trees, defined)
@quick
def test_minus_is_and_with_the_complement_where_it_removes_something(family, a, b):
    a = ("|", a, b)
    minus, with_complement = outcome(family, written(("-", a, b))), outcome(family, written(("&", a, ("~", b))))
    assert minus == with_complement


@given(families, defined, defined)
@quick
def test_selections_are_equal_exactly_when_their_elements_are(family, a, b):
    left, right = (chosen(written(tree), family, ties="together") for tree in (a, b))
    same = bool((marks(family, left.slices) == marks(family, right.slices)).all())
    assert (left == right) == same
    assert not same or hash(left) == hash(right)


def test_a_selection_equals_another_cut_of_the_same_elements():
    assert (
        chosen("attn", "llama") == chosen("qk | vo", "llama") == chosen("layers[0:2].mixer | layers[2].attn", "llama")
    )
    assert chosen("attn", "llama") != chosen("qk", "llama")
    assert chosen("attn", "llama") != "attn"


# --- any text -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["llama", "gpt2", "mixtral"]), st.text())
@quick
def test_any_text_selects_something_or_is_refused_at_a_column_of_it(family, text):
    selection = outcome(family, text, "error")
    assert selection is None or selection.n_elements > 0


SIGNS = ["|", "&", "-", "~", "(", ")", "{", "}", "[", "]", ".", ",", ":", " ", "0", "2", "-1", "3"]


@st.composite
def glued(draw):
    family = draw(st.sampled_from(["llama", "gpt2", "mixtral"]))
    names = known_names(tiny.anatomy(family))
    return family, "".join(draw(st.lists(st.sampled_from(SIGNS) | st.sampled_from(names), max_size=12)))


@st.composite
def paths(draw):
    """Steps that read as a path, whether or not the model has it."""
    family = draw(st.sampled_from(["llama", "gpt2", "mixtral"]))
    names = st.sampled_from(known_names(tiny.anatomy(family)))
    braces = st.lists(names, min_size=1, max_size=3).map(lambda n: f"{{{','.join(n)}}}")
    item = st.sampled_from(["0", "1", "3", "-1", "-4", "0:2", ":", "1:", "::2", ":-1", "2:1", "5:9"])
    items = st.lists(item, min_size=1, max_size=3).map(lambda i: f"[{','.join(i)}]")
    step = st.tuples(names | braces, st.just("") | items).map("".join)
    return family, ".".join(draw(st.lists(step, min_size=1, max_size=4)))


@given(glued() | paths())
@settings(quick, max_examples=80)
def test_any_row_of_words_and_signs_selects_something_or_is_refused_at_a_column_of_it(written_for):
    family, text = written_for
    selection = outcome(family, text, "error")
    assert selection is None or selection.n_elements > 0


# --- examples -------------------------------------------------------------------------------------------------------


def refused(text, family="llama", **settings_):
    with pytest.raises(SelectionError) as caught:
        chosen(text, family, **settings_)
    assert 0 <= caught.value.column <= len(text)
    return caught.value


def components(text, family="llama"):
    return [c.name for c, _ in chosen(text, family).by_component()]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("final_norm | head", ["final_norm", "head"]),
        ("layers[-1].attn", [f"layers[2].attn.{p}" for p in "qkvo"]),
        ("layers[0].norm", ["layers[0].attn_norm", "layers[0].ffn_norm"]),
        ("layers[0:3:2].attn.q", ["layers[0].attn.q", "layers[2].attn.q"]),
        ("layers[2,0].attn.{v,q}", [f"layers[{i}].attn.{p}" for i in (0, 2) for p in "qv"]),
        ("layers[1].qk", ["layers[1].attn.q", "layers[1].attn.k"]),
        ("vo & layers[1]", ["layers[1].attn.v", "layers[1].attn.o"]),
        ("layers[0].mixer - qk", ["layers[0].attn.v", "layers[0].attn.o"]),
        ("all - layers", ["embed", "final_norm", "head"]),
    ],
)
def test_an_expression_selects_these_components(text, names):
    assert components(text) == names


def test_a_selection_prints_its_counts():
    text = "layers[1:].attn.q"
    assert str(chosen(text, "llama")) == f"{text}: 2.05 k of 43.7 k parameters (4.7 %) in 2 tensors, 2 of 3 layers"


def test_each_leaf_says_what_it_matched_in_the_order_of_the_expression():
    selection = chosen("layers[0].ffn - experts[1:3] | norm")
    found = [(m.text, m.n_components, m.n_tensors, m.n_elements, m.layers) for m in selection.matches]
    assert found == [
        ("layers[0].ffn", 13, 3, 4 * 32 + 4 * 3 * 48 * 32, (0,)),
        ("experts[1:3]", 3 * 2 * 3, 6, 3 * 2 * 3 * 48 * 32, (0, 1, 2)),
        ("norm", 7, 7, 7 * 32, (0, 1, 2)),
    ]


def test_a_leaf_never_matches_more_parameters_than_the_model_has():
    selection = chosen("all", "gpt2")
    assert selection.matches[0].n_elements == selection.n_elements == tiny.anatomy("gpt2").n_parameters


def test_a_selection_as_plain_data_lists_its_slices_per_component():
    selection = chosen("layers[0].attn.q | layers[0].ffn.experts[2].up")
    data = json.loads(json.dumps(selection_to_json(selection)))
    assert [c["name"] for c in data["components"]] == ["layers[0].attn.q", "layers[0].ffn.experts[2].up"]
    assert data["n_elements"] == sum(c["n_elements"] for c in data["components"]) == selection.n_elements
    slices = [s for c in data["components"] for s in c["slices"]]
    assert slices == [json.loads(json.dumps(slice_to_json(s))) for s in selection.slices]


def test_buffers_are_never_selected():
    assert "position" not in components("all", "llama")
    error = refused("embed | position")
    assert error.column == 8
    assert "'position' holds only buffers, and buffers never learn" in error.problem
    assert [s.tensor for s in chosen("embed", "gemma", ties="together").slices] == ["model.embed_tokens.weight"]


# --- nothing is silent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "text", "column", "said"),
    [
        ("llama", "embed | bias", 8, "'bias' matches no part of this model"),
        ("llama", "embed | q.norm", 8, "'q.norm' matches no part of this model"),
        ("llama", "ffn.qk", 0, "'ffn.qk' matches no part of this model"),
        ("mixtral", "experts[0].norm", 0, "'experts[0].norm' matches no part of this model"),
        ("llama", "ffn & norm", 4, "the two sides of this '&' have nothing in common"),
        ("llama", "embed | (q & k)", 11, "the two sides of this '&' have nothing in common"),
        ("llama", "~q & q", 3, "the two sides of this '&' have nothing in common"),
        ("llama", "attn - ffn", 5, "this '-' removes nothing"),
        ("llama", "all - q - q", 8, "this '-' removes nothing"),
        ("llama", "~all", 0, "this selects nothing"),
        ("llama", "all - all", 0, "this selects nothing"),
        ("llama", "ffn - up - (gate | down)", 0, "this selects nothing"),
        ("llama", "layers[3]", 7, "layers[3] is out of range: there are 3, 0 to 2"),
        ("llama", "layers[-4]", 7, "layers[-4] is out of range: there are 3, 0 to 2"),
        ("llama", "layers[0, 7]", 10, "layers[7] is out of range: there are 3, 0 to 2"),
        ("llama", "layers[1:4]", 7, "layers[1:4] is out of range: there are 3, 0 to 2"),
        ("llama", "layers[2:1]", 7, "layers[2:1] is empty: a range ends before its second number"),
        ("llama", "layers[1:1]", 7, "layers[1:1] is empty"),
        ("mixtral", "layers[0].ffn.experts[4]", 22, "experts[4] is out of range: there are 4, 0 to 3"),
        ("llama", "attn.q[0]", 7, "'q' takes no index"),
        ("llama", "ffn | norm[0]", 11, "'norm' is a group and takes no index"),
        ("llama", "norm.q", 0, "the group 'norm' can only stand alone or at the end of a path"),
        ("llama", "attn.{norm,q}", 6, "the group 'norm' can only stand alone or at the end of a path"),
        ("llama", "layers.q", 7, "'layers' has no part 'q' directly inside. It has: attn_norm, attn, ffn_norm, ffn."),
        (
            "llama",
            "layers[0].attn.{q,up}",
            18,
            "'layers[0].attn' has no part 'up' directly inside. It has: q, k, v, o, heads",
        ),
        (
            "llama",
            "layers[0].ffn.gatee",
            14,
            "'layers[0].ffn' has no part 'gatee' directly inside. Did you mean 'gate'?",
        ),
        ("llama", "layers[0].ffn.gatee", 14, "It has: gate, up, down, neurons."),
        ("llama", "attn.heads[4]", 11, "heads[4] is out of range: there are 4, 0 to 3"),
        ("llama", "kv_heads[0,2]", 11, "kv_heads[2] is out of range: there are 2, 0 to 1"),
        ("llama", "heads[2:2]", 6, "heads[2:2] is empty"),
        ("llama", "layers[0].attn.heads[1].q", 24, "write 'layers[0].attn.heads[1] & layers[0].attn.q'"),
        ("gpt2", "heads.bias", 6, "write 'heads & bias'"),
        ("llama", "attn.{q,heads}", 8, "'heads' cannot stand in braces with others: join them with '|'"),
        ("llama", "ffn.heads[0]", 4, "'ffn' has no part 'heads' directly inside"),
        ("mixtral", "ffn.neurons[0]", 4, "'ffn' has no part 'neurons' directly inside"),
        ("llama", 'ffn | param("model.layers.*.mpl.*")', 13, "no tensor of this model has a name like"),
        ("gpt2", 'param("*.attn.bias")', 7, "no tensor of this model has a name like"),
        ("llama", 'param("model.embed")', 7, "Did you mean 'model.embed_tokens.weight'"),
        ("llama", "embed.q", 6, "'embed' has no part 'q' directly inside"),
        (
            "mixtral",
            "experts[0].{gate,q}",
            17,
            "'experts[0]' has no part 'q' directly inside. It has: gate, up, down, neurons.",
        ),
    ],
)
def test_what_matches_nothing_is_refused_where_it_stands(family, text, column, said):
    error = refused(text, family)
    assert said in error.problem
    assert error.column == column


@pytest.mark.parametrize(
    ("family", "text", "near"),
    [
        ("llama", "attention", "'attn'"),
        ("llama", "layer[0]", "'layers'"),
        ("llama", "embedding", "'embed'"),
        ("llama", "headz", "'head'"),
        ("llama", "norms", "'norm'"),
        ("mixtral", "expert[0]", "'experts'"),
        ("llama", "ffn.ups", "'up'"),
        ("llama", "layers[0].atn.q", "'attn'"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(family, text, near):
    error = refused(text, family)
    assert "Did you mean" in error.problem
    assert near in error.problem


@pytest.mark.parametrize(
    ("family", "text", "meant"),
    [
        ("llama", "mlp", "'ffn': write that, or param(\"*.mlp.*\")"),
        ("llama", "gate_proj", "'ffn.gate': write that"),
        ("llama", "lm_head", "'head': write that, or param(\"*lm_head.*\")"),
        ("gpt2", "c_attn", "'attn': write that, or param(\"*.c_attn.*\")"),
        ("gpt2", "wte", "'embed': write that"),
        ("llama", "FFN", "Did you mean 'ffn'"),
        ("llama", "ffn + attn", "'|' takes both"),
        ("llama", "layers[*].ffn", "a name without an index means every one"),
        ("llama", "ffn and attn", "'|' takes both, '&' what is in both"),
        ("llama", "not ffn", "'~' means everything but"),
        ("llama", "layers(0)", "as in layers[0]"),
        ("llama", "model.layers.0.mlp", "as in layers[0]"),
    ],
)
def test_what_is_written_as_elsewhere_is_answered_with_how_it_is_written_here(family, text, meant):
    assert meant in refused(text, family).problem


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "mlp"), ("llama", "lm_head"), ("gpt2", "c_attn"), ("gpt2", "wte")]
)
def test_the_pattern_that_is_offered_for_a_tensors_own_name_selects_those_tensors(family, name):
    pattern = re.search(r"param\(.*\)", refused(name, family).problem)[0]
    found = select(tiny.anatomy(family), pattern, ties="together")
    assert all(name in s.tensor.split(".") or s.tensor in found.anatomy.ties.values() for s in found.slices)


def test_an_unknown_name_far_from_all_is_answered_with_all_names():
    error = refused("tokens | zebra")
    assert error.column == 0
    assert error.problem == (
        "this model has no part 'tokens'. Known parts: embed, position, layers, attn_norm, attn, q, k, v, o, ffn_norm, "
        "ffn, gate, up, down, final_norm, head, rows, heads, kv_heads, neurons, all, norm, bias, mixer, qk, vo."
    )


def test_a_name_of_another_family_is_unknown_here():
    assert "this model has no part 'experts'" in refused("experts[0]", "llama").problem
    assert "this model has no part 'gate'" in refused("gate", "gpt2").problem


@pytest.mark.parametrize("text", ["attn.{q,o}.bias", "layers[0].{attn,ffn}.bias"])
def test_every_name_in_braces_must_lead_to_something_of_the_group(text):
    assert "bias" in refused(text, "qwen2").problem


@pytest.mark.parametrize(
    ("family", "text", "column"), [("llama", "{attn,layers}[0]", 1), ("mixtral", "{layers,experts}[3]", 1)]
)
def test_an_index_that_one_name_in_braces_cannot_take_is_refused_by_a_message_that_says_so(family, text, column):
    error = refused(text, family)
    assert error.column == column
    assert "index" in error.problem or "out of range" in error.problem
    assert "''" not in error.problem


def test_parts_of_other_depth_count_their_own_indices():
    uneven = uneven_experts()
    assert [c.name for c, _ in select(uneven, "experts[-1]").by_component()] == [
        "layers[0].experts[0]",
        "layers[1].experts[1]",
    ]
    with pytest.raises(SelectionError):
        select(uneven, "layers[0].experts[1]")


@pytest.mark.parametrize("text", ["layers[0].experts[0,1]", "layers[0].experts[1] | head"])
def test_an_index_out_of_range_where_it_stands_is_refused_even_if_it_is_in_range_elsewhere(text):
    with pytest.raises(SelectionError, match="out of range"):
        select(uneven_experts(), text)


def test_a_head_that_some_of_the_named_layers_lack_is_refused_with_the_layer():
    with torch.device("meta"):
        anatomy = read_anatomy(all_types.small_model("mimo_v2_flash"))
    assert {c.n for c in anatomy.cuts if c.name.endswith("kv_heads")} == {2, 4}
    with pytest.raises(SelectionError, match=r"layers\[0\]\.attn\.kv_heads\[2:4\] is out of range: there are 2"):
        select(anatomy, "attn.kv_heads[2:4]")
    assert select(anatomy, "attn.kv_heads[-1]").layers == (0, 1, 2, 3)


def uneven_experts():
    """One expert in the first layer, two in the second."""
    module = nn.ModuleDict({f"m{i}": nn.Linear(2, 2, bias=False) for i in range(4)})
    names = ["layers[0].experts[0]", "layers[1].experts[0]", "layers[1].experts[1]", "head"]
    return anatomy_of_parts(module, {name: [f"m{i}"] for i, name in enumerate(names)})


@given(families, st.text(alphabet="abdeglmopw_.*?[]!-012", max_size=12))
@quick
def test_any_pattern_of_raw_names_selects_what_it_matches_or_is_refused(family, pattern):
    found = outcome(family, f'param("{pattern}")')
    names = [t.name for t in tiny.anatomy(family).tensors if t.kind == "parameter"]
    expected = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
    ties = tiny.anatomy(family).ties
    assert {s.tensor for s in found.slices} == {ties.get(n, n) for n in expected} if found else not expected


def test_a_term_of_heads_says_how_many_share_a_key_head_and_only_where_they_do():
    assert shared_heads(chosen("attn.heads[0] | ffn", "llama")) == (4, 2)
    assert shared_heads(chosen("attn.kv_heads[0]", "llama")) is None
    assert shared_heads(chosen("attn.heads[0]", "gpt2")) is None


def test_two_selections_are_compared_component_by_component():
    first, second = chosen("layers[0].attn.{q,k}", "llama"), chosen("layers[0].attn.heads[0] | head", "llama")
    assert [(d.component, d.only_first, d.only_second, d.both) for d in compare(first, second)] == [
        ("layers[0].attn.q", 24 * 32, 0, 8 * 32),
        ("layers[0].attn.k", 16 * 32, 0, 0),
        ("layers[0].attn.o", 0, 32 * 8, 0),
        ("head", 0, 320 * 32, 0),
    ]


@given(families, defined, defined)
@quick
def test_a_comparison_adds_up_to_both_selections(family, one, other):
    first, second = outcome(family, written(one)), outcome(family, written(other))
    found = compare(first, second)
    assert sum(d.only_first + d.both for d in found) == counted(first)
    assert sum(d.only_second + d.both for d in found) == counted(second)
    assert (first == second) == all(d.only_first == d.only_second == 0 for d in found)


def counted(selection):
    return sum(s.n_elements for _, slices in selection.by_component() for s in slices)


def test_together_says_which_part_learns_without_being_named():
    assert chosen("layers | head", "gpt2", ties="together").pulled_in == (("head", "embed"),)
    assert chosen("layers | head | embed", "gpt2", ties="together").pulled_in == ()


def test_bytes_follow_the_type_of_the_tensors():
    anatomy = tiny.anatomy("llama")
    half = replace(anatomy, tensors=tuple(replace(t, dtype="bfloat16") for t in anatomy.tensors))
    assert select(anatomy, "ffn.up").n_bytes == 2 * select(half, "ffn.up").n_bytes == 3 * 48 * 32 * 4


# --- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
@pytest.mark.parametrize(
    ("text", "taken", "other", "column"),
    [
        ("head", "head", "embed", 0),
        ("embed", "embed", "head", 0),
        ("layers[0] | head", "head", "embed", 12),
        ("all - head", "embed", "head", 0),
        ("all - embed", "head", "embed", 0),
    ],
)
def test_one_of_two_tied_parts_alone_is_refused_with_both_names_and_both_remedies(family, text, taken, other, column):
    error = refused(text, family)
    assert f"this selects '{taken}' without '{other}'" in error.problem
    assert f"'{taken} | {other}'" in error.problem
    assert "ties: together" in error.problem
    assert "ties: untie" in error.problem
    assert error.column == column


@pytest.mark.parametrize("text", ["embed | head", "head | embed", "all - layers - final_norm - position"])
def test_both_tied_parts_are_one_storage_counted_once(text):
    selection = chosen(text, "gpt2")
    assert [str(s) for s in selection.slices] == ["transformer.wte.weight[0:320, 0:32]"]
    assert selection.n_elements == 320 * 32


@pytest.mark.parametrize("text", ["embed", "head", "embed | head"])
def test_together_takes_both_tied_parts_for_one(text):
    assert chosen(text, "gpt2", ties="together") == chosen("embed | head", "gpt2")


@pytest.mark.parametrize("text", ["layers", "~(head | embed)", "final_norm"])
def test_a_selection_of_neither_tied_part_does_not_care(text):
    assert chosen(text, "gpt2", ties="error") == chosen(text, "gpt2", ties="together")


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "~" * 50 + "q",
        "(" * 50 + "q" + ")" * 50,
        " | ".join(["q"] * 300),
        "layers[" + ",".join(["0", "1"] * 1000) + "]",
        "{" + ",".join(["q", "k"] * 500) + "}",
    ],
    ids=["complements", "parentheses", "terms", "indices", "names"],
)
def test_a_long_expression_within_the_limits_is_selected(text):
    assert isinstance(chosen(text, "llama"), Selection)


@pytest.mark.parametrize(
    "text", ["~" * 51 + "q", "(" * 51 + "q" + ")" * 51, "q." * 5000 + "q", "x" * 100_000], ids=["~", "(", ".", "x"]
)
def test_an_expression_beyond_the_limits_is_refused(text):
    refused(text)


@pytest.mark.parametrize("term", ["q | ", "all & ", "all - "])
def test_a_row_of_thousands_of_terms_is_selected_or_refused(term):
    outcome("llama", term * 1100 + "q")
