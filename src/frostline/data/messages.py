"""Conversations: messages as chat templates take them, brought to one form or refused with the message's index.

Contents become strings, arguments of tool calls objects, ShareGPT's roles those that templates know.
Read `conversation_of` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.data.files import RowError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them."""

    messages: tuple[Mapping[str, Any], ...]
    """Each with `role`, mostly with `content`; no value is None."""
    learns: tuple[bool, ...]
    """Whether a message may be learnt at all; False where an assistant's message says so (`weight: 0`)."""
    tools: tuple[Mapping[str, Any], ...]
    source: str
    plain: tuple[str, str] | None = None
    """Prompt and completion in its place where there is no chat template; None where it needs one."""


def conversation_of(messages: Any, tools: Sequence[Mapping[str, Any]], source: str) -> Conversation:
    """Messages brought to one form. Raises `RowError` naming the message (0-based)."""
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{source}: a conversation must be a list of at least one message")
    made = [_message(m, f"{source}: message {i}") for i, m in enumerate(messages)]
    return Conversation(tuple(m for m, _ in made), tuple(learns for _, learns in made), tuple(tools), source)


def _message(message: Any, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        found = ", ".join(map(repr, message)) if isinstance(message, dict) else type(message).__name__
        raise RowError(f"{where}: expected an object with a 'role', found {found}")
    kept = {k: v for k, v in message.items() if v is not None and k not in ("weight", "train")}
    if "content" in kept:
        kept["content"] = _content(kept["content"], where)
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"], where)
    if not kept.get("tool_calls") and "content" not in kept:
        raise RowError(f"{where}: has neither 'content' nor 'tool_calls'")
    check_strings(kept, where)
    return kept, _may_learn(message, where)


def _content(content: Any, where: str) -> str:
    """A string, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where}: 'content' must be a string or a list of parts, found {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"{where}: only text can be trained on, and a part of 'content' is {kind!r}")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is how templates take them."""
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise RowError(f"{where}: 'tool_calls' must be a list of objects")
    made = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: a tool call needs a function with a 'name'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments") and v is not None}
        made.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return made


def check_strings(value: Any, where: str) -> None:
    """Every string inside can be written as UTF-8. Raises `RowError`."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} holds half of a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where}: holds what JSON cannot: {error}") from None


def _may_learn(message: Mapping[str, Any], where: str) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"{where}: 'weight' must be 0 or 1, found {weight!r}")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}: 'train' must be true or false, found {train!r}")
    return weight != 0 and train is not False


def sharegpt_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message with `from` and `value` as one with `role` and `content`. Raises `RowError`."""
    role, value = message.get("from"), message.get("value")
    rest = {k: v for k, v in message.items() if k in ("weight", "train")}
    if role == "function_call":
        return {"role": "assistant", "tool_calls": [_call_in(value, where)], **rest}
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        known = ", ".join([*SHAREGPT_ROLES, "function_call"])
        raise RowError(f"{where}: 'from' is {role!r}; known are {known}")
    return {"role": SHAREGPT_ROLES[role], "content": value, **rest}


def _call_in(value: Any, where: str) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError(f"{where}: a function_call must be JSON with 'name' and 'arguments'")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
