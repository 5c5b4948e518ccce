"""Whoever loads what a run leaves gets, from its tokenizer alone, the texts that the run was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
from chats import said, system, user
from transformers import AutoTokenizer
from typer.testing import CliRunner

import frostline
from frostline import run as running
from frostline.cli import app
from frostline.model import load_model, save_model
from frostline.recipe import ScratchModel, recipe_from_dict

CONVERSATIONS = [
    [user("How cold is ice?"), said("Ice is cold."), user("Sure?"), said("Yes. é 東\n\nVery.")],
    [system("Be brief."), user("Where?"), said("North <|im_end|>\nof here.")],
    [user("Say nothing."), said("")],
    *([user(f"What of {w}?"), said(f"{w} {w}.")] for w in tiny.WORDS),
]
"""One with text that reads like a control token, and is taken for one, as transformers does."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has control tokens and no chat template."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = AutoTokenizer.from_pretrained(saved(chats.tokenizer("chatml"), folder.with_name("tokenizer")))
    tokenizer.chat_template = None
    save_model(load_model(ScratchModel(**tiny.config("llama", vocab_size=512)), seed=3), tokenizer, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return folder


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def trained(model: Any, folder: Path, template: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[list[int]]:
    """Runs in `folder/run`; the texts that its steps were made of, as tokens but the last, which is a label only."""
    rows, honest = folder / "rows.jsonl", running.batches_of
    rows.write_text("\n".join(json.dumps({"messages": c}) for c in CONVERSATIONS), encoding="utf-8")
    seen: list[list[int]] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        inner = honest(*args, **kwargs)

        def get(step: int, stage: Any) -> Any:
            batches = inner(step, stage)
            for batch in batches:
                for row, ids in enumerate(batch.input_ids.tolist()):
                    seen.extend(ids[a:b] for a, b in batch.documents.spans(row))
            return batches

        return get

    monkeypatch.setattr(running, "batches_of", noting)
    data = {"train": str(rows), "held_out": [str(rows)], "length": 256, "batch": 4}
    values = {
        "model": model,
        "data": {**data, "chat_template": str(chats.TEMPLATES / f"{template}.jinja")},
        "stages": [{"learn": "norm", "epochs": 2, "lr": 1e-2}],
        "device": "cpu",
        **more,
    }
    result = frostline.train(recipe_from_dict(values), out=folder / "run")
    assert result.audit.passed
    return seen


def check(folder: Path, seen: list[list[int]], template: str) -> None:
    """The tokenizer of a folder writes every text that was seen, and nothing else was seen."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == (chats.TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    written = set()
    for conversation in CONVERSATIONS:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.apply_chat_template(conversation)["input_ids"] == ids
        written.add(tuple(ids[:-1]))
        asked = tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(asked)
        assert text[len(asked) :].startswith(conversation[-1]["content"])
    assert {tuple(s) for s in seen} == written
    assert len(written) == len(CONVERSATIONS)


@pytest.mark.parametrize("template", ["chatml", "chatml_marked"])
def test_the_exported_and_the_applied_tokenizer_write_the_texts_that_were_trained_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    seen = trained(str(base), tmp_path, template, monkeypatch)
    run, cli = tmp_path / "run", CliRunner()
    for words in (
        ["export", str(run), str(tmp_path / "exported")],
        ["export", str(run), str(tmp_path / "delta.safetensors"), "--delta"],
        ["apply", str(base), str(tmp_path / "delta.safetensors"), str(tmp_path / "applied")],
    ):
        done = cli.invoke(app, words)
        assert done.exit_code == 0, done.output
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    for folder in ("exported", "applied"):
        check(tmp_path / folder, seen, template)


def test_a_tokenizer_trained_by_the_run_is_exported_with_the_template_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"train": "byte-bpe", "special_tokens": chats.CONTROL["chatml"]}
    seen = trained(tiny.config("llama"), tmp_path, "chatml", monkeypatch, tokenizer=own)
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    check(tmp_path / "exported", seen, "chatml")
