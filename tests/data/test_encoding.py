"""Tokens without places are the tokens of the tokenizer's own call, and the first one's end is what places say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from frostline.data import encoding
from frostline.data.encoding import encode_texts, only_calls_the_library

WORDS = [
    "The river froze over, slowly. " * 3,
    "café au lait, naïve Größe 東京 🧊❄️",
    "  two  spaces\tand\n\nlines\r\n",
    "A b C",
]


def byte_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return made


def metaspace_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        WORDS[:1], trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    )
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        WORDS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), *[(c, -3.0) for c in "the riv"], ("▁the", -2.0)], 0))
    made.normalizer = normalizers.Strip()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


KINDS: dict[str, tuple[Tokenizer, dict[str, Any]]] = {
    "bytes": (byte_bpe(), {"eos_token": "<|end|>"}),
    "bytes with a begin token": (byte_bpe(), {"bos_token": "<s>", "eos_token": "<|end|>"}),
    "metaspace": (metaspace_bpe(), {"unk_token": "<unk>"}),
    "wordpiece": (wordpiece(), {"unk_token": "[UNK]", "sep_token": "[SEP]"}),
    "unigram": (unigram(), {"unk_token": "<unk>", "eos_token": "</s>"}),
}
TOKENIZERS = {name: PreTrainedTokenizerFast(tokenizer_object=made, **more) for name, (made, more) in KINDS.items()}
TEXTS = st.lists(st.text(max_size=90) | st.text("Tthe riv\nÉé東🧊<|end>s/ ", max_size=120), min_size=1, max_size=6)


def by_its_own_call(texts: list[str], tokenizer: Any) -> list[tuple[list[int], int]]:
    """The reference: one text at a time, with places."""
    out = []
    for text in texts:
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        end = made["offset_mapping"][0][1] if made["input_ids"] and tokenizer.bos_token is None else 0
        begin, last = ([i] if i is not None else [] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        out.append(([*begin, *made["input_ids"], *last], end))
    return out


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=TEXTS)
@example(texts=["🧊" * 40, "x" * 40, "<|end|>" * 9, "", " ", "東" * 33 + "the", "ééééé" * 9])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_tokens_and_the_first_ones_end_are_those_of_the_tokenizers_own_call(kind, texts):
    tokenizer = TOKENIZERS[kind]
    assert only_calls_the_library(tokenizer)
    found = [(t.ids.tolist(), t.first_end) for t in encode_texts(texts, tokenizer)]
    assert found == by_its_own_call(texts, tokenizer)


def test_what_was_set_before_by_padding_or_cutting_does_not_stay():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(), eos_token="<|end|>", pad_token="<|end|>")
    texts = ["The river froze over", "<|end|>A"]
    expected = by_its_own_call(texts, tokenizer)
    tokenizer(texts, padding="max_length", truncation=True, max_length=3, split_special_tokens=False)
    assert [(t.ids.tolist(), t.first_end) for t in encode_texts(texts, tokenizer)] == expected


def test_a_tokenizer_with_a_call_of_its_own_is_called(monkeypatch):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **more):
            return super()._encode_plus([t.lower() for t in text], **more)

    tokenizer = Own(tokenizer_object=byte_bpe(), eos_token="<|end|>")
    assert not only_calls_the_library(tokenizer)
    (shout,), (calm,) = encode_texts(["THE RIVER"], tokenizer), encode_texts(["the river"], TOKENIZERS["bytes"])
    assert shout.ids.tolist() == calm.ids.tolist()
    monkeypatch.setattr(encoding, "only_calls_the_library", lambda _: True)
    assert encode_texts(["THE RIVER"], tokenizer)[0].ids.tolist() != calm.ids.tolist()  # so the check above can fail


@pytest.mark.parametrize("change", ["gone", "not called"])
def test_where_transformers_goes_another_way_its_own_call_is_made_with_equal_tokens(monkeypatch, change):
    """A version whose call has no such method, or one beside it."""
    tokenizer, texts = TOKENIZERS["bytes"], [*WORDS, "<|end|>", "", "x" * 40]
    expected = by_its_own_call(texts, tokenizer)
    assert only_calls_the_library(tokenizer)
    if change == "gone":
        monkeypatch.setattr(encoding, "INNER", "_encode_as_nobody_does_yet")
    else:
        honest = PreTrainedTokenizerBase.__call__
        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", lambda self, *a, **k: honest(self, *a, **k))
    assert not only_calls_the_library(tokenizer)
    assert [(t.ids.tolist(), t.first_end) for t in encode_texts(texts, tokenizer)] == expected


def test_no_texts_are_no_tokens():
    assert encode_texts([], TOKENIZERS["bytes"]) == []
