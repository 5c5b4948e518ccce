"""Chat templates: what the assistant says is learnt and nothing else, in six families, whatever the conversation."""

from __future__ import annotations

import json

import chats
import pytest
from chats import CONVERSATIONS, EXPECTED, TEMPLATES, said, shown, system, tokenizer, user

from frostline.data import Tally, read_examples
from frostline.errors import DataError
from frostline.recipe import DataSpec

CASES = [(family, name) for family, found in EXPECTED.items() for name in found]


def examples(tmp_path, rows, made, *, tally=None, **fields):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    spec = DataSpec(train=(str(file),), **fields)
    return list(read_examples(spec, spec.train, made, n_vocabulary=len(made), tally=tally))


def refused(tmp_path, rows, made, **fields):
    with pytest.raises(DataError) as caught:
        examples(tmp_path, rows, made, **fields)
    return str(caught.value)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_the_assistant_says_is_learnt_up_to_the_token_that_ends_it(tmp_path, family, name):
    made = tokenizer(family)
    (example,) = examples(tmp_path, [CONVERSATIONS[name]], made)
    assert shown(example, made) == EXPECTED[family][name]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_text_is_what_the_tokenizers_own_chat_template_gives(family, name):
    made = tokenizer(family)
    expected = EXPECTED[family][name].replace("⟦", "").replace("⟧", "")
    conversation = CONVERSATIONS[name]
    messages = [{k: v for k, v in m.items() if v is not None} for m in conversation["messages"]]
    for m in messages if family != "deepseek" else ():
        for call in m.get("tool_calls", ()):
            m["tool_calls"] = [{**call, "function": {**call["function"], "arguments": {"of": "ice"}}}]
    own = made.apply_chat_template(messages, tools=conversation.get("tools"), tokenize=False, date_string="")
    assert own.replace(_today(), "26 Jul 2024") == expected


def _today():
    from datetime import datetime

    return datetime.now().strftime("%d %b %Y")


def test_loss_on_the_last_turn_and_on_everything(tmp_path):
    made = tokenizer("chatml")
    turns = EXPECTED["chatml"]["turns"]
    (last,) = examples(tmp_path, [CONVERSATIONS["turns"]], made, loss_on="last")
    assert shown(last, made) == turns.replace("⟦", "", 1).replace("⟧", "", 1)
    (everything,) = examples(tmp_path, [CONVERSATIONS["turns"]], made, loss_on="all")
    assert everything.learns.tolist() == [False] + [True] * (len(everything.ids) - 1)


def test_the_last_turn_is_the_assistants_last_even_where_the_user_has_the_last_word(tmp_path):
    made = tokenizer("chatml")
    messages = [user("a"), said("b"), user("c"), said("d"), user("e")]
    (example,) = examples(tmp_path, [{"messages": messages}], made, loss_on="last")
    assert shown(example, made).count("⟦") == 1
    assert "⟦d<|im_end|>⟧\n<|im_start|>user\ne" in shown(example, made)


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}])
def test_a_turn_can_say_that_it_is_not_learnt(tmp_path, key):
    made = tokenizer("chatml")
    messages = [user("a"), said("b", **key), user("c"), said("d")]
    (example,) = examples(tmp_path, [{"messages": messages}], made)
    assert "assistant\nb<|im_end|>" in shown(example, made)
    assert "⟦d<|im_end|>⟧" in shown(example, made)
    assert "nothing to learn" in refused(tmp_path, [{"messages": messages[:2]}], made)


@pytest.mark.parametrize("family", list(EXPECTED))
def test_bytes_are_those_of_what_is_learnt_without_control_tokens(tmp_path, family):
    made = tokenizer(family)
    (example,) = examples(tmp_path, [CONVERSATIONS["turns"]], made)
    assert example.n_bytes == len("Very. éNorth\nof here.".encode())


def test_marks_of_a_template_give_the_mask_that_transformers_gives(tmp_path):
    made = tokenizer("chatml")
    file = TEMPLATES / "chatml_marked.jinja"
    tally = Tally()
    rows = [CONVERSATIONS[n] for n in ("turns", "system", "empty")]
    found = examples(tmp_path, rows, made, chat_template=str(file), tally=tally)
    for example, row in zip(found, rows, strict=True):
        own = made.apply_chat_template(
            row["messages"],
            chat_template=file.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert example.ids.tolist() == own["input_ids"]
        assert example.learns.tolist() == [bool(m) for m in own["assistant_masks"]]
        assert example.learns.any()
    assert [t.methods for t in tally.files.values()] == [{"marks": 6}]


def test_templates_without_marks_give_the_same_mask_as_with_marks(tmp_path):
    made = tokenizer("chatml")
    rows = [CONVERSATIONS[n] for n in ("turns", "empty")]
    plain = examples(tmp_path, rows, made)
    marked = examples(tmp_path, rows, made, chat_template=str(TEMPLATES / "chatml_marked.jinja"))
    assert [p.learns.tolist() for p in plain] == [m.learns.tolist() for m in marked]
    assert [p.n_bytes for p in plain] == [m.n_bytes for m in marked]


def test_reasoning_that_a_template_drops_is_not_learnt_and_the_rest_of_that_turn_is(tmp_path):
    made = tokenizer("chatml")
    messages = [user("a"), said("<think>hm</think>\n\nb"), user("c"), said("<think>so</think>\n\nd")]
    template = str(TEMPLATES / "chatml_thinking.jinja")
    tally = Tally()
    (example,) = examples(tmp_path, [{"messages": messages}], made, chat_template=template, tally=tally)
    assert shown(example, made) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>so</think>\n\nd<|im_end|>⟧\n"
    )
    assert next(iter(tally.files.values())).methods == {"content": 1, "prefix": 1}


@pytest.mark.parametrize("family", ["chatml", "phi", "llama3"])
def test_a_conversation_may_begin_with_the_assistant_and_have_two_turns_of_it_in_a_row(tmp_path, family):
    made = tokenizer(family)
    messages = [said("first"), user("a"), said("b"), said("c")]
    (example,) = examples(tmp_path, [{"messages": messages}], made)
    learnt = "".join(part.partition("⟧")[0] for part in shown(example, made).split("⟦")[1:])
    for token in chats.CONTROL[family]:
        learnt = learnt.replace(token, " ")
    assert learnt.split() == ["first", "b", "c"]


class WithoutPlaces:
    """A tokenizer that does not tell where its tokens stand in the text, as slow ones do not."""

    is_fast = False

    def __init__(self, made):
        self._made = made

    def __getattr__(self, name):
        return getattr(self._made, name)

    def __len__(self):
        return len(self._made)

    def __call__(self, text, *, return_offsets_mapping=False, **settings):
        assert not return_offsets_mapping
        return self._made(text, **settings)


@pytest.mark.parametrize("family", list(EXPECTED))
def test_a_tokenizer_without_places_gives_the_same_mask(tmp_path, family):
    made = tokenizer(family)
    rows = [CONVERSATIONS[n] for n in EXPECTED[family]]
    slow = examples(tmp_path, rows, WithoutPlaces(made))
    fast = examples(tmp_path, rows, made)
    assert [s.learns.tolist() for s in slow] == [f.learns.tolist() for f in fast]
    assert [s.n_bytes for s in slow] == [f.n_bytes for f in fast]


# --- refused --------------------------------------------------------------------------------------------------------


def test_an_example_without_a_learning_token_is_an_error_with_its_line_never_a_mask_of_zeros(tmp_path):
    good = {"messages": [user("a"), said("b")]}
    found = refused(tmp_path, [good, good, {"messages": [user("a")]}], tokenizer("chatml"))
    assert "chats.jsonl:3: nothing to learn" in found
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert "chats.jsonl:1: message 1: " in refused(tmp_path, [good], tokenizer("chatml"), chat_template=str(silent))


def test_dropping_what_cannot_be_used_is_counted_with_reasons(tmp_path):
    good = {"messages": [user("a"), said("b")]}
    rows = [good, {"messages": [user("a")]}, {"text": "x"}, {"messages": [{"role": "user"}]}, good]
    tally = Tally()
    found = examples(tmp_path, rows, tokenizer("gemma"), invalid="drop", tally=tally)
    assert [e.source.rpartition(":")[2] for e in found] == ["1", "5"]
    (file,) = tally.files.values()
    assert (file.rows, file.dropped) == (5, 3)
    assert [r.partition(".jsonl:")[2][0] for r in sorted(file.reasons)] == ["2", "3", "4"]


def test_a_template_that_refuses_a_conversation_is_quoted_with_the_place(tmp_path):
    rows = [{"messages": [user("a"), said("b")]}, {"messages": [user("a"), user("b"), said("c")]}]
    found = refused(tmp_path, rows, tokenizer("gemma"))
    assert "chats.jsonl:2: the chat template refuses this conversation" in found
    assert "turns must alternate" in found


def test_a_turn_that_cannot_be_told_from_the_rest_is_refused(tmp_path):
    twice = tmp_path / "twice.jinja"
    twice.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}.")
    rows = [{"messages": [user("a"), said("b"), user("c"), said("d")]}]
    found = refused(tmp_path, rows, tokenizer("chatml"), chat_template=str(twice))
    assert "chats.jsonl:1: message 3: it cannot be shown which part of the text this turn is" in found
    assert "{% generation %}" in found


def test_a_tokenizer_without_a_chat_template_is_refused_with_what_to_do(tmp_path):
    from frostline.data import Document, train_byte_bpe

    bare = train_byte_bpe([Document("abc " * 50, "x")], n_vocabulary=260)
    found = refused(tmp_path, [{"messages": [user("a"), said("b")]}], bare)
    assert "the tokenizer has no chat template" in found
    assert "data.chat_template" in found


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path):
    rows = [{"messages": [user("a"), said("b")]}]
    assert "none.jinja" in refused(tmp_path, rows, tokenizer("chatml"), chat_template=str(tmp_path / "none.jinja"))


def test_variables_reach_the_template(tmp_path):
    file = tmp_path / "mood.jinja"
    file.write_text("{{ mood }}:{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    rows = [{"messages": [system("s"), user("a"), said("b")]}]
    made = tokenizer("chatml")
    (example,) = examples(tmp_path, rows, made, chat_template=str(file), template_args={"mood": "calm"})
    assert shown(example, made) == "calm:<system>s<user>a⟦<assistant>b⟧"


def test_a_template_may_mark_several_stretches_of_a_turn_but_no_turn_less_than_once(tmp_path):
    made = tokenizer("chatml")
    file = tmp_path / "twice.jinja"
    each = "{% generation %}{{ m.content }}{% endgeneration %}|{% generation %}<|im_end|>{% endgeneration %}"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + each
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    rows = [{"messages": [user("a"), said("b"), user("c"), said("d")]}]
    (example,) = examples(tmp_path, rows, made, chat_template=str(file))
    assert shown(example, made) == "a⟦b⟧|⟦<|im_end|>⟧c⟦d⟧|⟦<|im_end|>⟧"
    some = each.partition("|")[0]
    file.write_text(
        "{% for m in messages %}{% if m.content == 'b' %}" + some + "{% endif %}{{ m.content }}{% endfor %}"
    )
    found = refused(tmp_path, rows, made, chat_template=str(file))
    assert "the chat template marks 1 turns of the assistant, but there are 2" in found
