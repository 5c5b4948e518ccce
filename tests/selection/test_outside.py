"""Selections by use and by file: their grammar, what they mean given scores, what is said where scores are lacking."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import SelectionError
from frostline.selection import chosen, needs, parse, plain, select
from frostline.selection.grammar import Ranked

SCORES = {
    "tokens": {
        "layers[0].ffn": (0.4, 0.3, 0.2, 0.1),
        "layers[1].ffn": (0.1, 0.2, 0.3, 0.4),
        "layers[2].ffn": (0.25, 0.25, 0.25, 0.25),
    },
    "gate": {f"layers[{i}].ffn": (0.0, 0.0, 0.9, 0.1) for i in range(3)},
}


def means(expression, **others):
    return plain(tiny.anatomy("mixtral"), expression, scores=SCORES, **others)


def error_of(run, expression):
    with pytest.raises(SelectionError) as caught:
        run(expression)
    return caught.value


@pytest.mark.parametrize(
    ("expression", "meaning"),
    [
        (
            "experts[top 1 by tokens]",
            "(layers[0].ffn.experts[0] | layers[1].ffn.experts[3] | layers[2].ffn.experts[0])",
        ),
        ("layers[1].ffn.experts[top 2 by tokens]", "(layers[1].ffn.experts[2,3])"),
        (
            "layers[0:2].ffn.experts[cover 0.7 by tokens].down",
            "(layers[0].ffn.experts[0,1].down | layers[1].ffn.experts[2,3].down)",
        ),
        ("layers[2].ffn.experts[cover 1 by tokens]", "(layers[2].ffn.experts[0,1,2,3])"),
        (
            "router | layers[0].ffn.experts[top 1 by gate] - experts.up",
            "router | (layers[0].ffn.experts[2]) - experts.up",
        ),
        ("layers[0].ffn.experts[ top  1 by gate ]", "(layers[0].ffn.experts[2])"),
        ("experts[0] & ffn", "experts[0] & ffn"),
    ],
)  # fmt: skip
def test_a_ranking_means_the_experts_with_the_highest_scores(expression, meaning):
    assert means(expression) == meaning
    assert select(tiny.anatomy("mixtral"), meaning).n_elements


def test_the_plain_selection_is_the_one_written_by_hand():
    anatomy = tiny.anatomy("mixtral")
    by_use = select(anatomy, means("(router | experts[top 2 by tokens]) - layers[2]"))
    by_hand = select(anatomy, "layers[0:2] & router | layers[0].ffn.experts[0,1] | layers[1].ffn.experts[2:4]")
    assert by_use == by_hand


def test_a_file_means_what_it_is_read_as():
    text = 'router | esft("a/b.json")'
    assert needs(text).files == ("a/b.json",)
    assert means(text, files={"a/b.json": "layers[0].ffn.experts[1]"}) == "router | (layers[0].ffn.experts[1])"
    error = error_of(lambda e: select(tiny.anatomy("mixtral"), e), text)
    assert (error.column, "names a file" in str(error)) == (9, True)


def test_what_an_expression_needs_is_read_off_its_text():
    asked = needs("~(experts[top 2 by gate] | layers[0].ffn.experts[cover 0.5 by tokens]) & experts[top 1 by gate]")
    assert set(asked.scores) == {"gate", "tokens"}
    assert not needs("layers[2:].ffn & experts[1]")


@pytest.mark.parametrize(
    ("expression", "column", "said"),
    [
        ("experts[top by tokens]", 12, "expected a number of experts after 'top', found 'by'"),
        ("experts[top 0 by tokens]", 12, "a whole number of experts"),
        ("experts[top 1.5 by tokens]", 12, "a whole number of experts"),
        ("experts[top 4]", 13, "expected 'by tokens' or 'by gate', found ']'"),
        ("experts[top 4 by]", 16, "'tokens' or 'gate', found ']'"),
        ("experts[top 4 by token]", 17, "Did you mean 'tokens'"),
        ("experts[tops 4 by tokens]", 8, "Did you mean 'top'"),
        ("experts[cover 0 by gate]", 14, "above 0 and at most 1"),
        ("experts[cover 1.5 by gate]", 14, "above 0 and at most 1"),
        ("experts[cover by gate]", 14, "expected a share, such as 0.2, after 'cover'"),
        ("experts[cover 0 .5 by gate]", 14, "above 0"),
        ("experts[0, top 1 by gate]", 11, "stands alone"),
        ("layers[top 2 by tokens]", 7, "only experts are ranked"),
        ("{experts,router}[top 2 by tokens]", 17, "only experts are ranked"),
        ("experts[top 1234567890 by gate]", 12, "too large"),
        ("esft(experts.json)", 5, "a quoted file"),
        ('esft("")', 6, "cannot be empty"),
        ('esft("a"', 8, "')' after the file"),
    ],
)
def test_a_mistake_is_pointed_at(expression, column, said):
    error = error_of(parse, expression)
    assert said in str(error)
    assert error.column == column


def test_without_a_measurement_it_is_said_how_to_get_one():
    error = error_of(lambda e: select(tiny.anatomy("mixtral"), e), "router | experts[top 2 by tokens]")
    assert error.column == 17
    assert "frostline select MODEL EXPRESSION --data FILE" in str(error)


@pytest.mark.parametrize(
    ("expression", "column", "said"),
    [
        ("experts[top 5 by tokens]", 8, "has 4 experts; name 1 to 4"),
        ("layers[9].ffn.experts[top 1 by tokens]", 7, "out of range"),
        ("attn.experts[top 1 by tokens]", 5, "has no part 'experts'"),
        ("experts[top 1 by tokens].gates", 25, "gate"),
    ],
)
def test_what_the_model_lacks_is_pointed_at(expression, column, said):
    error = error_of(means, expression)
    assert said in str(error)
    assert error.column == column


def test_a_dense_model_has_nothing_to_rank():
    assert "no part 'experts'" in str(
        error_of(lambda e: plain(tiny.anatomy("llama"), e, scores=SCORES), "experts[top 1 by tokens]")
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(any), st.floats(0.01, 1), st.integers(1, 9))
def test_the_fewest_experts_cover_a_share_and_the_best_are_on_top(scores, share, n):
    shares = [s / sum(scores) for s in scores]
    covering = chosen(Ranked(share, "gate"), shares)
    assert sum(shares[e] for e in covering) >= share - 1e-9
    assert len(covering) == 1 or sum(shares[e] for e in covering[:-1]) < share
    top = chosen(Ranked(n, "gate"), shares)
    assert len(top) == min(n, len(shares))
    assert min(shares[e] for e in top) >= max((s for e, s in enumerate(shares) if e not in top), default=0)
