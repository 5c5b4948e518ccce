"""A conversation → its text, and which characters of it the assistant is to learn.

Where a template has marks (`{% generation %}`), they say it. Most have none; then each assistant's turn is located in
one of two ways, and each way is checked on the very conversation:

- `prefix`: the conversation up to the turn, with what the template writes to prompt for it, must be how the
  conversation with the turn begins, and that must be how the whole begins. What lies between is the turn.
- `content`: where that does not hold (a template that ends the last turn in another way, or drops earlier reasoning),
  the turn is exchanged for two others. What stays the same before and after, whatever the turn says, must be there in
  the original too; what lies between is the turn, and the control token that follows it ends it.

Where neither can be shown, the conversation is an error with its place. Read `spoken` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from frostline.data.files import RowError
from frostline.data.messages import Conversation
from frostline.data.templates import Job, Rendering, Template, render

Method = Literal["marks", "prefix", "content", "all"]
LossOn = Literal["assistant", "last", "all"]
STAND_INS = ("Frost7StandIn8Line", "Line8StandIn7Frost")
"""Two texts without a common beginning or end, which no template changes."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """What is learnt, in characters, in order."""
    methods: tuple[Method, ...]
    """How each span was found."""


def spoken(conversation: Conversation, template: Template, *, loss_on: LossOn, control: Sequence[str]) -> Spoken:
    """A conversation as the template writes it. Raises `RowError` with the conversation's place.

    `control`: the tokenizer's special and added tokens; one of them ends a turn.
    """
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant" and conversation.learns[i]]
    if loss_on == "last":
        turns = [i for i in turns if i == _last_of_assistant(conversation)]
    if loss_on != "all" and not turns:
        roles = ", ".join(dict.fromkeys(repr(m["role"]) for m in conversation.messages))
        raise RowError(
            f"{conversation.source}: nothing to learn: no turn of the assistant counts in the loss (the roles: {roles})"
        )
    try:
        whole, made, text = _rendered(conversation, template, turns)
    except TemplateRefusedError:
        if (other := _with_arguments_as_text(conversation)) is None:
            raise
        conversation = other
        whole, made, text = _rendered(conversation, template, turns)
    if loss_on == "all":
        return Spoken(text, ((0, len(text)),), ("all",))
    if template.has_marks:
        return Spoken(text, _marked(whole, conversation, turns), tuple("marks" for _ in turns))
    found = [_turn(conversation, template, made[2 * k : 2 * k + 2], i, text, control) for k, i in enumerate(turns)]
    return Spoken(text, tuple(span for span, _ in found), tuple(method for _, method in found))


def _last_of_assistant(conversation: Conversation) -> int:
    return max((i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"), default=-1)


def _rendered(
    conversation: Conversation, template: Template, turns: Sequence[int]
) -> tuple[Rendering, list[Rendering], str]:
    """The whole, and for each turn what comes before it, prompt included, and with it."""
    messages, tools = conversation.messages, conversation.tools
    jobs = [Job(messages, tools)]
    if not template.has_marks:
        for i in turns:
            jobs += [Job(messages[:i], tools, prompt=True), Job(messages[: i + 1], tools)]
    whole, *made = render(template, jobs, where=conversation.source)
    if whole.text is None:
        raise TemplateRefusedError(f"{conversation.source}: the chat template refuses this conversation: {whole.error}")
    return whole, made, whole.text


class TemplateRefusedError(RowError):
    """A template raised an error for a conversation."""


def _with_arguments_as_text(conversation: Conversation) -> Conversation | None:
    """Tool calls with their arguments as JSON text, which some templates join to other text; None without calls."""
    if not any("tool_calls" in m for m in conversation.messages):
        return None
    messages = []
    for message in conversation.messages:
        calls = [
            {**c, "function": {**c["function"], "arguments": _as_text(c["function"]["arguments"])}}
            for c in message.get("tool_calls", ())
        ]
        messages.append({**message, "tool_calls": calls} if calls else message)
    return replace(conversation, messages=tuple(messages))


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _marked(whole: Rendering, conversation: Conversation, turns: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The template's own spans, of the turns that are learnt."""
    speaks = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if list(turns) == speaks and len(whole.spans) > len(speaks):
        return whole.spans  # several in a turn, as for what is said and for a call
    if len(whole.spans) != len(speaks):
        raise RowError(
            f"{conversation.source}: the chat template marks {len(whole.spans)} turns of the assistant, but there are "
            f"{len(speaks)}"
        )
    return tuple(span for span, i in zip(whole.spans, speaks, strict=True) if i in turns)


def _turn(
    conversation: Conversation,
    template: Template,
    made: Sequence[Rendering],
    at: int,
    text: str,
    control: Sequence[str],
) -> tuple[tuple[int, int], Method]:
    before, through = (r.text for r in made)
    own = None
    if before is not None and through is not None and through.startswith(before):
        end = _end_of(through, len(before), control)
        if text.startswith(through) and (end > len(before) or not conversation.messages[at].get("content")):
            return (len(before), end), "prefix"
        own = through[len(before) : end]
    span = _by_content(conversation, template, at, text, control)
    if span is None and own:
        span = _by_calls(conversation, template, at, text, own)
    if span is None:
        raise RowError(
            f"{conversation.source}: message {at}: it cannot be shown which part of the text this turn is, because the "
            "chat template writes the rest differently with it. Give a template with {% generation %} marks "
            "(`data.chat_template: FILE`), or `data.loss_on: last` or `all`"
        )
    if span[0] == span[1] and conversation.messages[at].get("content"):
        raise RowError(f"{conversation.source}: message {at}: the chat template leaves out what the assistant says")
    return span, "content"


def _end_of(text: str, start: int, control: Sequence[str]) -> int:
    """Without the white space that follows the control token at the end: the model has stopped by then."""
    stripped = text[start:].rstrip()
    return start + len(stripped) if any(stripped.endswith(c) for c in control) else len(text)


def _by_content(
    conversation: Conversation, template: Template, at: int, text: str, control: Sequence[str]
) -> tuple[int, int] | None:
    """Where the turn is, by exchanging it for other contents; None where the rest does not stay the same."""
    others: list[dict[str, Any]] = [{"role": "assistant", "content": other} for other in STAND_INS]
    found = _exchanged(conversation, template, at, text, others, once=True)
    if found is None:
        return None
    start, end = found
    ends = [c for c in control if text.startswith(c, end)]
    return start, end + max(map(len, ends), default=0)


def _by_calls(conversation: Conversation, template: Template, at: int, text: str, own: str) -> tuple[int, int] | None:
    """Where a turn with tool calls is, which a template may not let be exchanged for a plain one: the functions get
    other names, and around the names must stand just what the template writes for this turn at the end of its own
    conversation."""
    message = conversation.messages[at]
    others = [
        {**message, "tool_calls": [{**c, "function": {**c["function"], "name": other}} for c in message["tool_calls"]]}
        for other in STAND_INS
        if message.get("tool_calls")
    ]
    found = _exchanged(conversation, template, at, text, others) if others else None
    if found is None:
        return None
    places = [i for i in range(max(0, found[1] - len(own)), found[0] + 1) if text.startswith(own, i)]
    return (places[0], places[0] + len(own)) if len(places) == 1 else None


def _exchanged(
    conversation: Conversation,
    template: Template,
    at: int,
    text: str,
    others: Sequence[Mapping[str, Any]],
    *,
    once: bool = False,
) -> tuple[int, int] | None:
    """What of the text differs when a message says other things, if all that is around stays the same."""
    messages = conversation.messages
    jobs = [Job((*messages[:at], other, *messages[at + 1 :]), conversation.tools) for other in others]
    one, two = (r.text or "" for r in render(template, jobs, where=conversation.source))
    first, last = one.find(STAND_INS[0]), one.rfind(STAND_INS[0])
    if first < 0 or one.replace(*STAND_INS) != two or (once and first != last):
        return None
    before, after = one[:first], one[last + len(STAND_INS[0]) :]
    if not text.startswith(before) or not text.endswith(after) or len(text) < len(before) + len(after):
        return None
    return len(before), len(text) - len(after)


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokenizer's special and added tokens as text."""
    found = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    return tuple(dict.fromkeys(str(t) for t in found if str(t).strip()))
