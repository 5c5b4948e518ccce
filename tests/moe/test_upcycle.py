"""Upcycling: the function stays what it was, the folder is a standard one, and what cannot be exact is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from dense import save_dense, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from frostline.anatomy import read_anatomy, take
from frostline.errors import ModelError
from frostline.moe import PAIRS, find_sites, upcycle
from frostline.moe.upcycle_check import TOLERANCE, measure_change


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("dense") / "llama")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expert(model, layer, j, part):
    """One matrix of one expert."""
    anatomy = read_anatomy(model)
    (piece,) = anatomy.component[f"layers[{layer}].ffn.experts[{j}].{part}"].slices
    return take(dict(model.named_parameters())[piece.tensor], piece)[0].detach()


# --- the function


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.dense}-{p.target}")
def test_every_pair_computes_the_dense_models_function(pair, tmp_path):
    if not {pair.dense, pair.target} <= set(CONFIG_MAPPING_NAMES):
        pytest.skip("this version of transformers lacks one of the two types")
    dense = save_dense(pair.dense, tmp_path / "dense")
    made = upcycle(str(dense), tmp_path / "moe", experts=4, target=pair.target, router_std=0.5)
    assert made.promised
    assert made.change <= TOLERANCE
    assert made.ffn_factor == pytest.approx(1, abs=1e-6)
    assert load(tmp_path / "moe").config.model_type == pair.target


def test_the_dense_side_computes_what_plain_transformers_computes(llama, tmp_path):
    upcycle(str(llama), tmp_path / "moe")
    ids = torch.arange(40).reshape(2, 20)
    dense, moe = load(llama), load(tmp_path / "moe")
    with torch.no_grad():
        before, after = dense(ids).logits, moe(ids).logits
    assert (after - before).norm() / before.norm() < 5e-6  # with whatever kernels are the default


def test_a_bf16_model_stays_bf16_and_keeps_its_function(tmp_path):
    dense = save_dense("llama", tmp_path / "dense", dtype=torch.bfloat16)
    made = upcycle(str(dense), tmp_path / "moe", experts=4)
    assert made.change <= TOLERANCE
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(tmp_path):
    dense = save_dense("llama", tmp_path / "dense", tie_word_embeddings=True)
    upcycle(str(dense), tmp_path / "moe", experts=2)
    model = load(tmp_path / "moe")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_experts_are_the_dense_ffn_and_the_router_is_small_and_never_zero(llama, tmp_path):
    upcycle(str(llama), tmp_path / "moe", experts=4, router_std=0.02)
    dense, moe = load(llama), load(tmp_path / "moe")
    for layer, block in enumerate(dense.model.layers):
        for j in range(4):
            assert torch.equal(expert(moe, layer, j, "gate"), block.mlp.gate_proj.weight)
            assert torch.equal(expert(moe, layer, j, "down"), block.mlp.down_proj.weight)
    routers = [s.router.weight for s in find_sites(moe, read_anatomy(moe))]
    assert all(0.015 < r.std() < 0.025 for r in routers)
    assert not torch.equal(routers[0], routers[1])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_another_router(llama, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(str(llama), tmp_path / name, experts=2, init="noise", seed=seed)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] != files[2]


def test_the_folder_has_the_tokenizer_and_the_record(llama, tmp_path):
    made = upcycle(str(llama), tmp_path / "moe", experts=4)
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("frost line") == AutoTokenizer.from_pretrained(llama)(
        "frost line"
    )
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert record["change"] == made.change
    assert made.tokenizer
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]  # nothing temporary is left


def test_parameters_are_counted_before_now_and_per_token(llama, tmp_path):
    made = upcycle(str(llama), tmp_path / "moe", experts=8, top_k=2)
    n_ffn = 3 * 3 * 32 * 48
    routers = 3 * 8 * 32
    assert made.n_parameters == made.n_dense + 7 * n_ffn + routers
    assert made.n_active == made.n_dense + n_ffn + routers


# --- other beginnings


def test_noise_makes_experts_differ_by_about_what_was_asked_and_promises_nothing(llama, tmp_path):
    made = upcycle(str(llama), tmp_path / "moe", experts=4, init="noise", noise=0.1)
    assert not made.promised
    assert 1e-4 < made.change < 1
    base, moe = load(llama).model.layers[0].mlp.up_proj.weight.detach(), load(tmp_path / "moe")
    for j in range(4):
        ratio = (expert(moe, 0, j, "up") - base).std() / base.std()
        assert ratio.item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(expert(moe, 0, 0, "up"), expert(moe, 0, 1, "up"))


def test_drop_draws_the_same_neurons_of_gate_up_and_down_anew_and_keeps_the_others(llama, tmp_path):
    upcycle(str(llama), tmp_path / "moe", experts=2, init="drop", drop=0.25)
    dense, moe = load(llama).model.layers[1].mlp, load(tmp_path / "moe")
    changed = []
    for j in range(2):
        rows = (expert(moe, 1, j, "gate") != dense.gate_proj.weight).all(1)
        assert rows.sum() == 12  # a quarter of 48
        assert torch.equal(rows, (expert(moe, 1, j, "up") != dense.up_proj.weight).any(1))
        assert torch.equal(rows, (expert(moe, 1, j, "down") != dense.down_proj.weight).any(0))
        changed.append(rows)
    assert not torch.equal(*changed)


def test_top_1_that_preserves_is_exact_and_says_who_moves_the_router(llama, tmp_path):
    made = upcycle(str(llama), tmp_path / "moe", experts=4, top_k=1)
    assert (made.top1, made.promised) == ("preserve", True)
    assert made.change <= TOLERANCE
    assert "no gradient from the language-model loss" in made.notes[0]


def test_top_1_as_in_switch_returns_the_factor_of_the_ffn(tmp_path):
    dense = save_dense("qwen3", tmp_path / "dense")
    made = upcycle(str(dense), tmp_path / "moe", experts=4, top_k=1, top1="switch")
    assert not made.promised
    assert 0.25 < made.ffn_factor < 0.35  # a near-uniform softmax over four
    assert made.change > 1e-2
    config = load(tmp_path / "moe").config
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (1, False)


def test_the_router_of_a_switch_learns_from_the_loss_and_that_of_preserve_does_not(tmp_path):
    dense = str(save_dense("qwen3", tmp_path / "dense"))
    norms = {}
    for top1 in ("preserve", "switch"):
        upcycle(dense, tmp_path / top1, experts=4, top_k=1, top1=top1)
        model = load(tmp_path / top1)
        ids = torch.arange(60).reshape(2, 30)
        model(ids, labels=ids).loss.backward()
        norms[top1] = find_sites(model, read_anatomy(model))[0].router.weight.grad.norm().item()
    assert norms["preserve"] < 1e-6 < 1e-4 < norms["switch"]


def test_experts_in_chosen_layers_only(tmp_path):
    dense = save_dense("qwen3", tmp_path / "dense")
    made = upcycle(str(dense), tmp_path / "moe", experts=4, layers=[1, 3])
    assert made.layers == (1, 3)
    assert made.change <= TOLERANCE
    found = read_anatomy(load(tmp_path / "moe"))
    assert {c.path[0][1] for c in found.components if "experts" in c.name} == {1, 3}


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 1}, "at least 2 experts"),
        ({"top_k": 9}, r"between 1 and the number of experts \(8\)"),
        ({"top_k": 0}, "between 1"),
        ({"router_std": 0.0}, "never learn"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"drop": 1.5}, "at most 1"),
        ({"target": "qwen3_moe"}, "'llama' into 'qwen3_moe'.*Known: llama → mixtral"),
        ({"layers": [0]}, "experts in every layer"),
        ({"layers": [7], "target": "qwen2_moe"}, "there are 3"),
        ({"layers": [], "target": "qwen2_moe"}, "there are 3"),
        ({"top_k": 1, "top1": "switch"}, "always normalises.*qwen2_moe"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(llama, tmp_path, settings, said):
    with pytest.raises(ModelError, match="(?s)" + said):
        upcycle(str(llama), tmp_path / "moe", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_partner_is_refused_with_the_known_pairs(tmp_path):
    dense = save_dense("gpt2", tmp_path / "dense")
    with pytest.raises(ModelError, match=r"(?s)a 'gpt2' model.*llama → mixtral, qwen2_moe"):
        upcycle(str(dense), tmp_path / "moe")


def test_a_folder_that_is_not_empty_is_never_overwritten(llama, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").touch()
    with pytest.raises(ModelError, match="never overwrites"):
        upcycle(str(llama), tmp_path / "moe")
    assert [p.name for p in (tmp_path / "moe").iterdir()] == ["precious"]


def test_a_bias_that_the_target_has_no_place_for_is_refused(tmp_path):
    dense = save_dense("llama", tmp_path / "dense", attention_bias=True)
    with pytest.raises(ModelError, match="a bias that only one of them has"):
        upcycle(str(dense), tmp_path / "moe", experts=2)


def test_windows_that_differ_by_layer_are_refused_where_the_target_has_none(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 2
    dense = save_dense("qwen3", tmp_path / "dense", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    with pytest.raises(ModelError, match="would change on long texts"):
        upcycle(str(dense), tmp_path / "moe", experts=2)


def test_a_function_that_changed_is_an_error_and_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["frostline.moe.upcycle"], "measure_change", lambda *_, **__: (2e-6, 1.0))
    with pytest.raises(ModelError, match=r"2\.00e-06, more than 1e-06"):
        upcycle(str(llama), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_the_measurement_sees_a_single_changed_number(llama, tmp_path):
    upcycle(str(llama), tmp_path / "moe", experts=2)
    dense = load(llama)
    with torch.no_grad():
        dense.model.layers[0].self_attn.o_proj.weight[0, 0] += 0.1
    assert measure_change(dense, tmp_path / "moe")[0] > 1e-5
