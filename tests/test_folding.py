"""Names folded into expressions: exactly those names, in as few expressions as indices allow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from frostline.folding import fold, folded


def names(*pairs):
    return [f"layers[{a}].ffn.experts[{b}].up" for a, b in pairs]


def test_what_is_a_product_is_one_expression():
    assert folded(names(*((a, b) for a in range(3) for b in (0, 1, 3)))) == ["layers[0:3].ffn.experts[0:2,3].up"]


def test_other_experts_in_other_layers_are_not_folded_into_one():
    found = folded(names((0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1)))
    assert found == ["layers[0,2].ffn.experts[0:2].up", "layers[1].ffn.experts[1:3].up"]


def test_names_without_indices_stand_for_themselves():
    assert folded(["embed", "final_norm", "embed"]) == ["embed", "final_norm"]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_every_name_is_in_exactly_one_fold_and_every_fold_is_a_product(pairs):
    folds = fold((name, None) for name in names(*sorted(pairs)))
    together = [name for f in folds for name in f.names]
    assert sorted(together) == sorted(names(*pairs))
    for f in folds:
        rows = {name.split(".ffn")[0] for name in f.names}
        columns = {name.split("experts")[1] for name in f.names}
        assert len(f.names) == len(rows) * len(columns)
