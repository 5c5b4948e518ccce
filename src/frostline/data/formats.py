"""What a row means: a text, a prompt and its completion, a conversation, or tokens made elsewhere.

A format is found by the names of the columns and the kind of what they hold, or given; every file is one format.
`shape` reads a row as its format and gives one of four shapes. No tokenizer and no chat template is needed here.
Read `detect` and `shape` first; `CHECKS` is the list of formats in the order in which they are tried.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from frostline.data.files import Row, RowError
from frostline.data.messages import Conversation, check_strings, conversation_of, sharegpt_message
from frostline.data.text import Document, as_document, proper
from frostline.errors import did_you_mean
from frostline.recipe import FormatName

FORMATS: tuple[str, ...] = tuple(f for f in get_args(FormatName) if f != "auto")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "tokens": ("input_ids",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Format → the columns it cannot do without."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("tools", "system"),
    "tokens": ("labels", "loss_mask", "completion_mask", "assistant_masks", "attention_mask"),
    "prompt": ("tools",),
    "alpaca": ("input",),
    "text": (),
}
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""What an instruction stands in where there is no chat template: the words of Stanford Alpaca."""
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
IGNORED = -100
"""The label that counts for nothing, by the convention of transformers."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and what is to be learnt as its continuation."""

    prompt: str
    completion: str
    source: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens made elsewhere."""

    ids: tuple[int, ...]
    learns: tuple[bool, ...]
    source: str


Shape = Document | Pair | Conversation | TokenRow


def detect(row: Row) -> tuple[str, tuple[str, ...]]:
    """The format of a file by its first row, and the formats that would fit too. Raises `RowError` when none does."""
    if row.is_text:
        return "text", ()
    fitting = [name for name, fits in CHECKS.items() if fits(row.values)]
    if not fitting:
        raise RowError(f"{row.source}: {_unknown(row.values)}")
    return fitting[0], tuple(fitting[1:])


def shape(row: Row, name: str) -> Shape:
    """A row read as a format. Raises `RowError` naming the place and what is wrong."""
    missing = [c for c in COLUMNS[name] if row.values.get(c) is None]
    if missing and not row.is_text:
        also = [n for n, fits in CHECKS.items() if fits(row.values)]
        hint = (
            f"; it looks like the format {also[0]}: give that as `data.format`, or split a file that holds several"
            if also
            else f". {_unknown(row.values)}"
        )
        raise RowError(f"{row.source}: no {_named(missing)} for the format {name}{hint}")
    return _SHAPES[name](row)


def unpacked(row: Row) -> Row:
    """The row with its lists of messages as lists: files without lists hold them as JSON, some datasets as columns."""
    values: dict[str, Any] = {c: _unpacked(row.values[c]) for c in ("messages", "conversations") if c in row.values}
    return Row({**row.values, **values}, row.source, row.is_text) if values else row


def _unpacked(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and ("role" in value or "from" in value):
        columns = list(value.values())
        if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return [dict(zip(value, fields, strict=True)) for fields in zip(*columns, strict=True)]
    return value


def with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under the names that formats know. Raises `RowError` for a column that is not there."""
    if not columns or row.is_text:
        return row
    for wanted in columns.values():
        if wanted not in row.values:
            near = did_you_mean(wanted, list(row.values))
            raise RowError(f"{row.source}: data.columns names '{wanted}', found {_named(row.values)}.{near}")
    values = {k: v for k, v in row.values.items() if k not in columns and k not in columns.values()}
    return Row({**values, **{known: row.values[own] for known, own in columns.items()}}, row.source)


OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "source", "user"),
    "completion": ("answer", "response", "output", "target", "reply", "assistant"),
    "text": ("body", "content", "document", "story", "code"),
    "messages": ("conversation", "chat", "dialog", "dialogue", "turns"),
}
"""Names that columns often have where a format has another one."""


def _unknown(values: Mapping[str, Any]) -> str:
    lines = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    found = f"found the columns {_named(values)}, which are none of the known formats ({lines})"
    if "chosen" in values and "rejected" in values:
        return f"{found}; preference pairs (chosen, rejected) are no training text"
    name, columns = max(
        ((n, _likely(n, values)) for n in COLUMNS), key=lambda pair: len(pair[1]) / len(COLUMNS[pair[0]])
    )
    if not columns:
        return f"{found}. Name them with `data.columns`, as in {{text: body}}"
    renamed = ", ".join(f"{known}: {own}" for known, own in columns.items())
    wrong = [c for c, own in columns.items() if c == own]
    if len(wrong) == len(COLUMNS[name]):
        return f"{found}; '{wrong[0]}' holds {type(values[wrong[0]]).__name__}, which is not what {name} has there"
    return f"{found}; the nearest is {name}: `data.columns: {{{renamed}}}`"


def _likely(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    """A format's columns → the columns that are likely meant, as far as any are."""
    out = {}
    for column in COLUMNS[name]:
        near = difflib.get_close_matches(column, [str(v) for v in values], n=1, cutoff=0.75)
        other = [o for o in OTHER_NAMES.get(column, ()) if o in values]
        if column in values or near or other:
            out[column] = column if column in values else (near or other)[0]
    return out


def _named(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"'{n}'" for n in names) or "(none)"


def _is_dicts_with(value: Any, key: str) -> bool:
    return isinstance(value, list) and (not value or (isinstance(value[0], dict) and key in value[0]))


def _is_messages(values: Mapping[str, Any]) -> bool:
    return _is_dicts_with(values.get("messages"), "role")


def _is_sharegpt(values: Mapping[str, Any]) -> bool:
    found = values.get("conversations")
    return _is_dicts_with(found, "from") or _is_dicts_with(found, "role")


def _is_tokens(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("input_ids"), list)


def _is_prompt(values: Mapping[str, Any]) -> bool:
    return all(isinstance(values.get(c), (str, list)) for c in COLUMNS["prompt"])


def _is_alpaca(values: Mapping[str, Any]) -> bool:
    return all(isinstance(values.get(c), str) for c in COLUMNS["alpaca"])


def _is_text(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("text"), str)


CHECKS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "messages": _is_messages,
    "sharegpt": _is_sharegpt,
    "tokens": _is_tokens,
    "prompt": _is_prompt,
    "alpaca": _is_alpaca,
    "text": _is_text,
}


def _prompt(row: Row) -> Pair | Conversation:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise RowError(f"{row.source}: prompt and completion must both be strings or both be lists of messages")
        conversation = conversation_of([*prompt, *completion], _tools(row), row.source)
        asked = len(prompt)
        return Conversation(
            conversation.messages,
            tuple(learns and i >= asked for i, learns in enumerate(conversation.learns)),
            conversation.tools,
            conversation.source,
        )
    where = row.source
    return Pair(proper(prompt, f"{where}: 'prompt'"), proper(completion, f"{where}: 'completion'"), where)


def _messages(row: Row) -> Conversation:
    return conversation_of(row.values["messages"], _tools(row), row.source)


def _sharegpt(row: Row) -> Conversation:
    found = row.values["conversations"]
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise RowError(f"{row.source}: 'conversations' must be a list of objects with 'from' and 'value'")
    if found and "role" in found[0]:
        return conversation_of(found, _tools(row), row.source)
    messages = [sharegpt_message(m, f"{row.source}: message {i}") for i, m in enumerate(found)]
    system = row.values.get("system")
    if isinstance(system, str) and system:
        messages = [{"role": "system", "content": system}, *messages]
    return conversation_of(messages, _tools(row), row.source)


def _alpaca(row: Row) -> Conversation:
    parts = {c: proper(row.values.get(c) or "", f"{row.source}: '{c}'") for c in ("instruction", "input", "output")}
    asked = "\n\n".join(p for p in (parts["instruction"], parts["input"]) if p)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": parts["output"]}]
    prompt = (ALPACA_WITH_INPUT if parts["input"] else ALPACA).format(**parts)
    return replace(conversation_of(messages, (), row.source), plain=(prompt, parts["output"]))


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"{row.source}: 'tools' is not valid JSON: {error}") from None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RowError(f"{row.source}: 'tools' must be a list of objects")
    check_strings(tools, f"{row.source}: 'tools'")
    return tuple(tools)


def _tokens(row: Row) -> TokenRow:
    ids = _whole_numbers(row, "input_ids")
    learns = [True] * len(ids)
    given = [c for c in (*MASKS, "labels") if row.values.get(c) is not None]
    if len(given) > 1:
        raise RowError(f"{row.source}: {_named(given)} each say what counts in the loss; keep one")
    if given == ["labels"]:
        labels = _whole_numbers(row, "labels", like=ids)
        wrong = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORED)), None)
        if wrong is not None:
            raise RowError(
                f"{row.source}: labels[{wrong}] is {labels[wrong]}, input_ids[{wrong}] is {ids[wrong]}: a label must "
                f"be its own token or {IGNORED} (labels are not shifted beforehand)"
            )
        learns = [label != IGNORED for label in labels]
    elif given:
        learns = [bool(m) for m in _zeros_and_ones(row, given[0], like=ids)]
    if row.values.get("attention_mask") is not None:  # what is masked is padding, and goes
        real = _zeros_and_ones(row, "attention_mask", like=ids)
        pairs = [(i, t) for i, t, keep in zip(ids, learns, real, strict=True) if keep]
        ids, learns = [i for i, _ in pairs], [t for _, t in pairs]
    return TokenRow(tuple(ids), tuple(learns), row.source)


def _whole_numbers(row: Row, name: str, *, like: Sequence[int] | None = None) -> list[int]:
    found = row.values[name]
    if not isinstance(found, list) or not all(type(v) is int for v in found):
        raise RowError(f"{row.source}: '{name}' must be a list of whole numbers")
    if like is not None and len(found) != len(like):
        raise RowError(f"{row.source}: '{name}' has {len(found)} entries, 'input_ids' {len(like)}")
    return found


def _zeros_and_ones(row: Row, name: str, *, like: Sequence[int]) -> list[int]:
    found = row.values[name]
    numbers = (
        [int(v) for v in found] if isinstance(found, list) and all(type(v) in (int, bool) for v in found) else None
    )
    if numbers is None or any(v not in (0, 1) for v in numbers):
        raise RowError(f"{row.source}: '{name}' must be a list of 0 and 1")
    if len(numbers) != len(like):
        raise RowError(f"{row.source}: '{name}' has {len(numbers)} entries, 'input_ids' {len(like)}")
    return numbers


_SHAPES: Mapping[str, Callable[[Row], Shape]] = {
    "text": as_document,
    "prompt": _prompt,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "tokens": _tokens,
}
