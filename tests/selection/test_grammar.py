"""The language of selections: what binds to what, and that every text is either read or refused at a column."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.errors import SelectionError
from frostline.selection.grammar import MAX_DEPTH, Binary, Complement, Path, parse

quick = settings(deadline=None, max_examples=80)


def shown(tree):
    """The tree with every operator in parentheses of its own."""
    match tree:
        case Path():
            return tree.text
        case Complement():
            return f"(~ {shown(tree.operand)})"
        case Binary():
            return f"({shown(tree.left)} {tree.op} {shown(tree.right)})"


def refused(text):
    with pytest.raises(SelectionError) as caught:
        parse(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a | b & c", "(a | (b & c))"),
        ("a & b | c", "((a & b) | c)"),
        ("a | b - c", "(a | (b - c))"),
        ("a - b | c", "((a - b) | c)"),
        ("~a & b", "((~ a) & b)"),
        ("~a - b", "((~ a) - b)"),
        ("~a | b", "((~ a) | b)"),
        ("a - ~b", "(a - (~ b))"),
        ("a - b - c", "((a - b) - c)"),
        ("a & b - c", "((a & b) - c)"),
        ("a - b & c", "((a - b) & c)"),
        ("a | b | c", "((a | b) | c)"),
        ("a & (b | c)", "(a & (b | c))"),
        ("a - (b - c)", "(a - (b - c))"),
        ("~(a | b)", "(~ (a | b))"),
        ("~~a", "(~ (~ a))"),
        ("((a))", "a"),
        ("a|b&c-~d", "(a | ((b & c) - (~ d)))"),
    ],
)
def test_complement_binds_tighter_than_and_and_minus_and_these_tighter_than_or(text, tree):
    assert shown(parse(text)) == tree


@pytest.mark.parametrize("text", ['q | param("a.*[0-3] & (b")', "q | param ( 'a.*[0-3] & (b' )"])
def test_a_raw_name_is_quoted_and_may_hold_anything_but_its_quote(text):
    leaf = parse(text).right
    assert (leaf.pattern, text[leaf.pattern_column]) == ("a.*[0-3] & (b", "a")
    assert (leaf.text, leaf.column) == (text[4:], 4)


def test_param_without_a_parenthesis_is_a_name_like_any_other():
    assert parse("param.q").segments[0].names == ("param",)


LEVEL = {"|": 0, "&": 1, "-": 1}


def needs_least_parentheses(tree, level=0):
    """The text of a tree made of nested tuples, with parentheses only where the grammar asks for them."""
    match tree:
        case str():
            return tree
        case ("~", operand):
            return f"~{needs_least_parentheses(operand, 2)}"
        case (op, left, right):
            own = LEVEL[op]
            text = f"{needs_least_parentheses(left, own)} {op} {needs_least_parentheses(right, own + 1)}"
            return f"({text})" if own < level else text


def all_parentheses(tree):
    match tree:
        case str():
            return tree
        case ("~", operand):
            return f"(~ {all_parentheses(operand)})"
        case (op, left, right):
            return f"({all_parentheses(left)} {op} {all_parentheses(right)})"


trees = st.recursive(
    st.sampled_from(["a", "b.c", "layers[0].q", "{x,y}"]),
    lambda inner: st.tuples(st.just("~"), inner) | st.tuples(st.sampled_from("|&-"), inner, inner),
    max_leaves=12,
)


@given(trees)
@quick
def test_a_tree_written_with_the_fewest_parentheses_reads_back_as_itself(tree):
    assert shown(parse(needs_least_parentheses(tree))) == all_parentheses(tree)


@given(trees, st.sampled_from([" ", "  ", "\n", "\t", "\u00a0"]))
@quick
def test_white_space_between_parts_means_nothing(tree, space):
    text = needs_least_parentheses(tree)
    assert shown(parse(f"{space}{text.replace(' ', space)}{space}")) == all_parentheses(tree)


def test_a_path_keeps_its_names_indices_and_columns():
    tree = parse(" x | layers[-1, 2:8:3].{q,v}")
    path = tree.right
    first, second = path.segments
    assert (path.text, path.column) == ("layers[-1, 2:8:3].{q,v}", 5)
    assert [(i.text, i.column, i.value) for i in first.items] == [("-1", 12, -1), ("2:8:3", 16, slice(2, 8, 3))]
    assert (second.names, second.columns, second.items) == (("q", "v"), (24, 26), None)
    assert (tree.op, tree.column) == ("|", 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-2", -2),
        (":", slice(None, None)),
        ("::", slice(None, None, None)),
        ("3:", slice(3, None)),
        (":-1", slice(None, -1)),
        ("1:9:2", slice(1, 9, 2)),
        ("::2", slice(None, None, 2)),
    ],
)
def test_an_index_is_written_as_in_python(text, value):
    (item,) = parse(f"layers[{text}]").segments[0].items
    assert item.value == value


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 0, "a selection cannot be empty; write 'all'"),
        (" \n\t", 0, "a selection cannot be empty"),
        ("q @ k", 2, "unexpected character '@'"),
        ("q –k", 2, "unexpected character '–'"),
        ("layers[٣]", 7, "unexpected character '٣'"),
        ("é", 0, "unexpected character 'é'"),
        ("q\n|\n\x00", 4, r"unexpected character '\x00'"),
        ("q k", 2, "expected '|', '&' or '-' between parts, found 'k'"),
        ("q)", 1, "expected '|', '&' or '-' between parts, found ')'"),
        ("layers 0", 7, "expected '|', '&' or '-' between parts, found '0'"),
        ("layers[0][1]", 9, "expected '|', '&' or '-' between parts, found '['"),
        ("q ~ k", 2, "expected '|', '&' or '-' between parts, found '~'"),
        ("q |", 3, "expected the name of a part, found the end"),
        ("q |  ", 3, "expected the name of a part, found the end"),
        ("| q", 0, "expected the name of a part, found '|'"),
        ("q & - k", 4, "expected the name of a part, found '-'"),
        ("()", 1, "expected the name of a part, found ')'"),
        ("attn.", 5, "expected the name of a part, found the end"),
        ("attn.3", 5, "expected the name of a part, found '3'"),
        ("3", 0, "expected the name of a part, found '3'"),
        ("(q | (k)", 8, "expected ')' for the '(' at column 1, found the end"),
        ("(q k)", 3, "expected ')' for the '(' at column 1, found 'k'"),
        ("{}", 1, "expected a name, found '}'"),
        ("{q,}", 3, "expected a name, found '}'"),
        ("{q k}", 3, "expected ',' or '}', found 'k'"),
        ("{q", 2, "expected ',' or '}', found the end"),
        ("layers[]", 7, "expected an index or a range such as 2:8, found ']'"),
        ("layers[0,]", 9, "expected an index or a range such as 2:8, found ']'"),
        ("layers[x]", 7, "expected an index or a range such as 2:8, found 'x'"),
        ("layers[0", 8, "expected ',' or ']', found the end"),
        ("layers[0 1]", 9, "expected ',' or ']', found '1'"),
        ("layers[0:1:2:3]", 12, "expected ',' or ']', found ':'"),
        ("layers[-]", 8, "expected a number, found ']'"),
        ("layers[--1]", 8, "expected a number, found '-'"),
        ("layers[0:4:0]", 7, "the step of a range must be at least 1"),
        ("layers[4:0:-1]", 7, "the step of a range must be at least 1"),
        ('param("a.b', 6, "this quote is not closed"),
        ("param('a.b\")", 6, "this quote is not closed"),
        ("param(a.b)", 6, "expected a quoted name, as in param"),
        ("param()", 6, "expected a quoted name, as in param"),
        ("param('')", 7, "a name cannot be empty"),
        ("param('a' 'b')", 11, "expected ')' after the name, found 'b'"),
        ("param('a').q", 10, "expected '|', '&' or '-' between parts, found '.'"),
        ("'a'", 1, "expected the name of a part, found 'a'"),
        ("layers[1234567890]", 7, "this number is too large"),
        ("~" * (MAX_DEPTH + 1) + "q", MAX_DEPTH, "nested more than 50 deep"),
        ("(" * (MAX_DEPTH + 1) + "q", MAX_DEPTH, "nested more than 50 deep"),
    ],
)
def test_an_error_of_syntax_says_what_is_wrong_at_which_column(text, column, said):
    error = refused(text)
    assert (error.column, error.expression) == (column, text)
    assert said in error.problem


def test_an_error_shows_the_expression_on_one_line_with_a_mark_under_the_column():
    message, expression, mark = str(refused("attn\n| ffn.@")).splitlines()
    assert message == "unexpected character '@'"
    assert expression[mark.index("^")] == "@"


@pytest.mark.parametrize("opening", ["~", "(", "~("])
def test_nesting_up_to_the_limit_is_read_and_beside_each_other_counts_once(opening):
    closing = ")" * opening.count("(")
    times = MAX_DEPTH // len(opening)
    deep = opening * times + "q" + closing * times
    assert shown(parse(f"{deep} | {deep} | {deep}")).count("q") == 3


@pytest.mark.parametrize("text", ["(" * 5_000, "~" * 5_000, "a." * 5_000, "[" * 5_000, "a" * 5_000 + "!"])
def test_a_very_long_text_without_sense_is_refused_like_a_short_one(text):
    error = refused(text)
    assert 0 <= error.column <= len(text)


def column_of(text):
    """Where a text is refused; 0 where it is read."""
    try:
        parse(text)
    except SelectionError as error:
        return error.column
    return 0


@given(st.text())
@quick
def test_any_text_is_read_or_refused_at_a_column_of_it(text):
    assert 0 <= column_of(text) <= len(text)


TOKENS = [
    "|",
    "&",
    "-",
    "~",
    "(",
    ")",
    "{",
    "}",
    "[",
    "]",
    ".",
    ",",
    ":",
    " ",
    "\n",
    "0",
    "12",
    "-1",
    "q",
    "layers",
    "_x",
    "é",
    "param(",
    "'*.a[0'",
    '"',
]


@given(st.lists(st.sampled_from(TOKENS)).map("".join))
@quick
def test_any_row_of_tokens_is_read_or_refused_at_a_column_of_it(text):
    assert 0 <= column_of(text) <= len(text)
