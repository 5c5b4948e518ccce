"""Conversations, chat templates of six families, and what of their text the assistant learns, written by hand.

The templates in `templates/` are our own wording of well-known formats. In `EXPECTED` stands, per family and
conversation, the whole text with what is learnt between ⟦ and ⟧.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from frostline.data import Document
from frostline.data.tokens import train_byte_bpe

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [
        "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi": [
        "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|tool_call|>",
        "<|/tool_call|>", "<|tool_response|>",
    ],
    "deepseek": [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
        "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ],
}  # fmt: skip
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>", "deepseek": "<｜begin▁of▁sentence｜>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<eos>", "phi": "<|endoftext|>"} | {
    "deepseek": "<｜end▁of▁sentence｜>"
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TOOL = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "depth", "arguments": '{"of": "ice"}'}}],
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "turns": {"messages": [user("Cold?"), said("Very. é"), user("Where?"), said("North\nof here.")]},
    "system": {"messages": [system("Be brief."), user("Cold?"), said("Yes."), user("Why?"), said("Ice.")]},
    "empty": {"messages": [user("Say nothing."), said(""), user("Now?"), said("No.")]},
    "tool": {
        "messages": [
            user("How deep?"),
            CALL,
            {"role": "tool", "content": "3 m"},
            said("Three."),
            user("Sure?"),
            said("Yes."),
        ],
        "tools": [TOOL],
    },
}
_TOOL_JSON = '{"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}'
_CHATML_TOOLS = f"<|im_start|>system\nYou may call these functions:\n<tools>\n{_TOOL_JSON}\n</tools><|im_end|>\n"
_LLAMA_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
_LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
_LLAMA_SAID = "<|start_header_id|>assistant<|end_header_id|>\n\n"

EXPECTED: dict[str, dict[str, str]] = {
    "chatml": {
        "turns": "<|im_start|>user\nCold?<|im_end|>\n<|im_start|>assistant\n⟦Very. é<|im_end|>⟧\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n⟦North\nof here.<|im_end|>⟧\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCold?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Ice.<|im_end|>⟧\n",
        "empty": "<|im_start|>user\nSay nothing.<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
        "<|im_start|>user\nNow?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
        "tool": _CHATML_TOOLS + "<|im_start|>user\nHow deep?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "depth", "arguments": {"of": "ice"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n3 m\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Three.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n",
    },
    "llama3": {
        "turns": f"<|begin_of_text|>{_LLAMA_USER}Cold?<|eot_id|>{_LLAMA_SAID}⟦Very. é<|eot_id|>⟧"
        f"{_LLAMA_USER}Where?<|eot_id|>{_LLAMA_SAID}⟦North\nof here.<|eot_id|>⟧",
        "system": f"<|begin_of_text|>{_LLAMA_SYSTEM}Today: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        f"{_LLAMA_USER}Cold?<|eot_id|>{_LLAMA_SAID}⟦Yes.<|eot_id|>⟧"
        f"{_LLAMA_USER}Why?<|eot_id|>{_LLAMA_SAID}⟦Ice.<|eot_id|>⟧",
        "empty": f"<|begin_of_text|>{_LLAMA_USER}Say nothing.<|eot_id|>{_LLAMA_SAID}⟦<|eot_id|>⟧"
        f"{_LLAMA_USER}Now?<|eot_id|>{_LLAMA_SAID}⟦No.<|eot_id|>⟧",
        "tool": f"<|begin_of_text|>{_LLAMA_SYSTEM}Environment: ipython\nToday: 26 Jul 2024\n\n<|eot_id|>"
        f"{_LLAMA_USER}The functions:\n{_TOOL_JSON}\n\nHow deep?<|eot_id|>"
        f'{_LLAMA_SAID}⟦{{"name": "depth", "parameters": {{"of": "ice"}}}}<|eot_id|>⟧'
        f"<|start_header_id|>ipython<|end_header_id|>\n\n3 m<|eot_id|>{_LLAMA_SAID}⟦Three.<|eot_id|>⟧"
        f"{_LLAMA_USER}Sure?<|eot_id|>{_LLAMA_SAID}⟦Yes.<|eot_id|>⟧",
    },
    "mistral": {
        "turns": "<s>[INST]Cold?[/INST]⟦Very. é</s>⟧[INST]Where?[/INST]⟦North\nof here.</s>⟧",
        # this family's system text stands with the last message only when that is the user's; here it is not
        "system": "<s>[INST]Cold?[/INST]⟦Yes.</s>⟧[INST]Why?[/INST]⟦Ice.</s>⟧",
        "empty": "<s>[INST]Say nothing.[/INST]⟦</s>⟧[INST]Now?[/INST]⟦No.</s>⟧",
        "tool": '<s>[INST]How deep?[/INST]⟦[TOOL_CALLS][{"name": "depth", "arguments": {"of": "ice"}}]</s>⟧'
        "[TOOL_RESULTS]3 m[/TOOL_RESULTS]⟦Three.</s>⟧"
        f"[AVAILABLE_TOOLS][{_TOOL_JSON}][/AVAILABLE_TOOLS][INST]Sure?[/INST]⟦Yes.</s>⟧",
    },
    "gemma": {
        "turns": "<bos><start_of_turn>user\nCold?<end_of_turn>\n<start_of_turn>model\n⟦Very. é<end_of_turn>⟧\n"
        "<start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n⟦North\nof here.<end_of_turn>⟧\n",
        "system": "<bos><start_of_turn>user\nBe brief.\n\nCold?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Yes.<end_of_turn>⟧\n<start_of_turn>user\nWhy?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Ice.<end_of_turn>⟧\n",
        "empty": "<bos><start_of_turn>user\nSay nothing.<end_of_turn>\n<start_of_turn>model\n⟦<end_of_turn>⟧\n"
        "<start_of_turn>user\nNow?<end_of_turn>\n<start_of_turn>model\n⟦No.<end_of_turn>⟧\n",
    },
    "phi": {
        "turns": "<|user|>Cold?<|end|><|assistant|>⟦Very. é<|end|>⟧"
        "<|user|>Where?<|end|><|assistant|>⟦North\nof here.<|end|><|endoftext|>⟧",
        "system": "<|system|>Be brief.<|end|><|user|>Cold?<|end|><|assistant|>⟦Yes.<|end|>⟧"
        "<|user|>Why?<|end|><|assistant|>⟦Ice.<|end|><|endoftext|>⟧",
        "empty": "<|user|>Say nothing.<|end|><|assistant|>⟦<|end|>⟧"
        "<|user|>Now?<|end|><|assistant|>⟦No.<|end|><|endoftext|>⟧",
        "tool": "<|user|>How deep?<|end|><|assistant|>"
        '⟦<|tool_call|>[{"name": "depth", "arguments": {"of": "ice"}}]<|/tool_call|><|end|>⟧'
        "<|tool_response|>3 m<|end|><|assistant|>⟦Three.<|end|>⟧"
        "<|user|>Sure?<|end|><|assistant|>⟦Yes.<|end|><|endoftext|>⟧",
    },
    "deepseek": {
        "turns": "<｜begin▁of▁sentence｜><｜User｜>Cold?<｜Assistant｜>⟦Very. é<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Where?<｜Assistant｜>⟦North\nof here.<｜end▁of▁sentence｜>⟧",
        "system": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Cold?<｜Assistant｜>⟦Yes.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Why?<｜Assistant｜>⟦Ice.<｜end▁of▁sentence｜>⟧",
        "empty": "<｜begin▁of▁sentence｜><｜User｜>Say nothing.<｜Assistant｜>⟦<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Now?<｜Assistant｜>⟦No.<｜end▁of▁sentence｜>⟧",
        "tool": "<｜begin▁of▁sentence｜><｜User｜>How deep?<｜Assistant｜>"
        '⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>depth\n```json\n{"of": "ice"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3 m<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦Three.<｜end▁of▁sentence｜>⟧<｜User｜>Sure?<｜Assistant｜>⟦Yes.<｜end▁of▁sentence｜>⟧",
    },
}


@lru_cache
def tokenizer(family: str) -> Any:
    """A small byte-level tokenizer with a family's control tokens and chat template."""
    made = train_byte_bpe([Document("the cold river runs under the frost line. " * 20, "here")], n_vocabulary=280)
    made.add_special_tokens({"additional_special_tokens": CONTROL[family]})
    made.bos_token = BOS.get(family)
    made.eos_token = EOS[family]
    made.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return made


def shown(example: Any, made: Any) -> str:
    """An example's text with what it learns between ⟦ and ⟧."""
    out, learning = "", False
    start = 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.learns[end] != example.learns[start]:
            text = made.decode(example.ids[start:end], clean_up_tokenization_spaces=False)
            learning = bool(example.learns[start])
            out += f"⟦{text}⟧" if learning else text
            start = end
    return out
