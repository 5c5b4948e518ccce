"""Whatever stands in a file or a conversation: examples come of it, or an error that names the place (X12)."""

from __future__ import annotations

import gzip
import json

import chats
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.data import read_examples
from frostline.errors import DataError
from frostline.recipe import DataSpec

COLUMNS = (
    "text prompt completion messages conversations tools input_ids labels loss_mask attention_mask instruction output"
)
FIELDS = "role content from value tool_calls function name arguments weight train type input other"
KEYS = st.sampled_from(f"{COLUMNS} {FIELDS}".split())
scalars = st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=6)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call"])
some = {"content": anything, "value": anything, "tool_calls": anything}
messages = st.lists(st.fixed_dictionaries({"role": roles, "from": roles}, optional=some), max_size=4)
lists = {"messages": messages, "conversations": messages, "tools": anything}
rows = st.dictionaries(KEYS, anything, max_size=4) | st.fixed_dictionaries({}, optional=lists)
formats = st.sampled_from(["auto", "text", "prompt", "messages", "sharegpt", "alpaca", "tokens"])


def outcome(file, made, **fields):
    """What reading a file comes to: the error, or where its examples are from."""
    spec = DataSpec(train=(str(file),), **fields)
    try:
        examples = list(read_examples(spec, spec.train, made, n_vocabulary=len(made)))
    except DataError as error:
        return [str(error)]
    assert all(len(e.ids) == len(e.learns) and not e.learns[:1].any() and e.n_bytes >= 0 for e in examples)
    return [e.source for e in examples]


@given(st.lists(rows, max_size=3), formats)
@settings(deadline=None, max_examples=200)
def test_any_rows_are_examples_or_refused_with_their_line(tmp_path_factory, found, name):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text("\n".join(map(json.dumps, found)))
    assert all(said.startswith(f"{file}:") for said in outcome(file, chats.tokenizer("chatml"), format=name))


turns = st.lists(st.tuples(roles, st.text(max_size=8)).map(lambda t: {"role": t[0], "content": t[1]}), max_size=5)


@given(
    st.lists(turns, min_size=1, max_size=2),
    st.sampled_from(list(chats.EXPECTED)),
    st.sampled_from(["assistant", "last"]),
)
@settings(deadline=None, max_examples=200)
def test_any_conversation_is_masked_or_refused_with_its_line_in_every_family(tmp_path_factory, found, family, loss_on):
    file = tmp_path_factory.getbasetemp() / f"any-{family}.jsonl"
    file.write_text("\n".join(json.dumps({"messages": m}) for m in found))
    assert all(said.startswith(f"{file}:") for said in outcome(file, chats.tokenizer(family), loss_on=loss_on))


@given(
    st.binary(max_size=200) | st.text(alphabet='{}[]":,\\ \r\n\tae0"\x00', max_size=60).map(str.encode),
    st.sampled_from(["json", "csv", "jsonl.gz", "txt.gz", "parquet", "jsonl.zst"]),
    st.sampled_from(["strict", "replace"]),
)
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_examples_or_refused_with_their_file(tmp_path_factory, content, suffix, errors):
    file = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") and len(content) % 2 else content)
    assert all(said.startswith(str(file)) for said in outcome(file, chats.tokenizer("phi"), undecodable=errors))
