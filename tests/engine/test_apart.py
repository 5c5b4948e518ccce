"""Rows of several documents: each document's logits and gradients are those it has alone, or the model is refused.

Held against models that transformers computes by its own attention, one document at a time.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from route_families import EACH, FAMILIES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from frostline.data import Batch, Documents
from frostline.engine import documents as attention
from frostline.engine import next_token_loss, step
from frostline.engine.apart import _make_branches_matter, keep_apart, padding_changes, why_not
from frostline.engine.documents import use_document_attention
from frostline.errors import ModelError

LENGTHS = ((9, 1, 14, 4), (17, 8))
ROW = 30

BY_MASK_ONLY = ("gemma2",)
"""Its scores are capped, which torch's attention cannot do."""
BY_CALLS_ONLY = ("opt",)
"""It counts positions from the mask when there is none for it to see."""
NOT_AT_ALL = ("falcon-parallel", "falcon-new", "falcon-sequential", "bloom", "mpt", "gpt1")
"""They take no positions, or bias scores by the distance in the row."""


def of_family(name: str):
    family = FAMILIES[name]
    return AutoConfig.for_model(family.of, **family.config)


def build(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _make_branches_matter(model)
    return model


def kinds_of(name: str):
    if name in NOT_AT_ALL:
        return ()
    return ("mask",) if name in BY_MASK_ONLY else ("calls",) if name in BY_CALLS_ONLY else ("calls", "mask")


def batches(n_vocabulary: int, kept_by="calls"):
    """The documents in packed rows; and each alone."""
    generator = torch.Generator().manual_seed(7)
    documents = Documents(LENGTHS, kept_by)
    ids = torch.randint(3, n_vocabulary, (2, ROW), generator=generator)
    labels = torch.full_like(ids, -100)
    alone = []
    for row in range(2):
        for start, end in documents.spans(row):
            labels[row, start:end] = torch.randint(3, n_vocabulary, (end - start,), generator=generator)
            alone.append(Batch(input_ids=ids[row : row + 1, start:end], labels=labels[row : row + 1, start:end]))
    return Batch(input_ids=ids, labels=labels, documents=documents), alone


def flat(alone, kept_by="calls"):
    """The documents in one row, nothing between them."""
    return Batch(
        input_ids=torch.cat([b.input_ids for b in alone], 1),
        labels=torch.cat([b.labels for b in alone], 1),
        documents=Documents((tuple(b.input_ids.shape[1] for b in alone),), kept_by),
    )


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("name", EACH)
def test_logits_of_a_document_among_others_are_those_of_it_alone(name):
    for kept_by in kinds_of(name):
        model = build(of_family(name))
        packed, alone = batches(model.config.vocab_size, kept_by)
        expected = [logits(model, b)[0] for b in alone]
        if kept_by == "calls":
            use_document_attention(model)
        in_rows, in_one = logits(model, packed), logits(model, flat(alone, kept_by))[0]
        spans = [(row, a, b) for row in range(2) for a, b in packed.documents.spans(row)]
        at = 0
        for (row, start, end), one in zip(spans, expected, strict=True):
            scale = one.abs().max()
            assert (in_rows[row, start:end] - one).abs().max() <= 1e-5 * scale, kept_by
            assert (in_one[at : at + end - start] - one).abs().max() <= 1e-5 * scale, kept_by
            at += end - start


@pytest.mark.parametrize("name", EACH)
def test_the_probe_finds_what_a_family_can_do_and_refuses_the_rest_with_what_it_measured(name):
    config = of_family(name)
    assert tuple(k for k in ("calls", "mask") if why_not(config, k) is None) == kinds_of(name)
    assert padding_changes(config) is None
    if kinds_of(name):
        assert keep_apart(config) == kinds_of(name)[0]
    else:
        with pytest.raises(ModelError, match=r"does not keep documents of one row apart.*logits differ by"):
            keep_apart(config)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "qwen3_next", "recurrent_gemma"])
def test_a_state_that_runs_along_the_row_is_refused(name):
    from all_types import small_config

    with pytest.raises(ModelError, match="does not keep documents of one row apart"):
        keep_apart(small_config(name))


def test_a_leak_that_is_planted_is_found(monkeypatch):
    config = of_family("llama")
    assert why_not(config, "calls") is None
    monkeypatch.setattr(Documents, "spans", lambda self, row: [(0, sum(self.lengths[row]))])
    monkeypatch.setattr("frostline.engine.apart._spans", lambda: iter([(0, [(0, 11), (11, 12)]), (1, [(0, 17)])]))
    assert "logits differ by" in why_not(config, "calls")


def test_positions_that_run_on_are_found(monkeypatch):
    monkeypatch.setattr(Documents, "positions", lambda self, n: torch.arange(n).expand(len(self.lengths), n))
    assert "logits differ by" in why_not(of_family("gpt2"), "calls")


def test_a_wanted_way_is_not_replaced_by_another():
    with pytest.raises(ModelError, match="softcap"):
        keep_apart(of_family("gemma2"), "calls")
    assert keep_apart(of_family("gemma2")) == "mask"


@pytest.mark.parametrize("width", [4, 20])
def test_windows_are_those_of_transformers_inside_every_document(width):
    model = build(AutoConfig.for_model("mistral", **tiny.FAMILIES["mistral"], sliding_window=width))
    _, alone = batches(model.config.vocab_size)
    expected = torch.cat([logits(model, b)[0] for b in alone])
    use_document_attention(model)
    torch.testing.assert_close(logits(model, flat(alone))[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(  # without documents a row is one
        logits(model, alone[2])[0], expected[10:24], rtol=0, atol=1e-5 * expected.abs().max().item()
    )


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_are_the_sum_of_those_of_each_document(name):
    config = of_family(name)
    config._experts_implementation = "eager"
    packed, alone = batches(config.vocab_size)
    found = []
    for rows, calls in ((alone, False), ([packed], True), ([flat(alone)], True), (flat(alone).split(3), True)):
        model = build(config)
        if calls:
            use_document_attention(model)
        record = step(model, rows, next_token_loss, seed=0, device=torch.device("cpu"))
        found.append((record, {n: p.grad for n, p in model.named_parameters()}))
    (reference, expected), *others = found
    for record, gradients in others:
        assert record.n_targets == reference.n_targets
        assert abs(record.loss / reference.loss - 1) < 1e-5
        for n, g in gradients.items():
            assert (g - expected[n]).norm() <= 1e-5 * expected[n].norm() + 1e-9, n


def test_padded_rows_have_the_losses_of_their_documents():
    model = build(of_family("llama"))
    _, alone = batches(model.config.vocab_size)
    longest = max(b.input_ids.shape[1] for b in alone)
    ids, mask = torch.zeros(len(alone), longest, dtype=torch.long), torch.zeros(len(alone), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, b in enumerate(alone):
        n = b.input_ids.shape[1]
        ids[row, :n], labels[row, :n], mask[row, :n] = b.input_ids[0], b.labels[0], 1
    padded = Batch(input_ids=ids, labels=labels, attention_mask=mask)
    expected = sum(next_token_loss(model, b).item() for b in alone)
    assert next_token_loss(model, padded).item() == pytest.approx(expected, rel=1e-6)


def test_a_micro_batch_without_targets_changes_nothing():
    model = build(of_family("llama"))
    use_document_attention(model)
    batch, _ = batches(model.config.vocab_size)
    none = Batch(input_ids=batch.input_ids, labels=torch.full_like(batch.labels, -100), documents=batch.documents)
    both, one = [], []
    for rows, into in (([batch, none], both), ([batch], one)):
        model.zero_grad()
        record = step(model, rows, next_token_loss, seed=0, device=torch.device("cpu"))
        into += [record.loss, *(p.grad.clone() for p in model.parameters())]
    assert all(torch.isfinite(t).all() for t in both)
    assert all(torch.equal(a, b) for a, b in zip(both, one, strict=True))
    model.zero_grad()
    empty = step(model, [none], next_token_loss, seed=0, device=torch.device("cpu"))
    assert (empty.loss.item(), empty.n_targets) == (0.0, 0)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_model_with_document_attention_generates_as_before():
    model = build(of_family("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    use_document_attention(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), before)
    left = torch.tensor([[0, 0, 5, 6, 7, 8]])  # padded on the left
    mask = (left > 0).long()
    assert torch.equal(model.generate(left, attention_mask=mask, **settings)[:, 6:], before[:, 4:])


def test_the_saved_model_is_one_of_plain_transformers(tmp_path):
    model = build(of_family("llama"))
    use_document_attention(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
