"""Heads, neurons, experts, q, k and v of every decoder type: measured; and every measurement can fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import all_types
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from versions import OTHERWISE, TRANSFORMERS, WRITTEN_FOR, skip_unknown

from frostline.anatomy import Anatomy, Component, Slice, module_of, read_anatomy, take
from frostline.anatomy.component import Cut
from frostline.anatomy.read import find_blocks
from frostline.anatomy.shrink import tiny_config
from frostline.anatomy.slice_capture import Product, Watch, find_branches, run, scaled, touched
from frostline.anatomy.slice_checks import OTHER_ROLES, TRUE_EXCEPTIONS
from frostline.anatomy.slice_proof import SliceProof, prepare_to_measure, prove_slices
from frostline.selection import select

pytestmark = pytest.mark.filterwarnings("ignore")  # what models of 136 architectures warn about is not ours

FOUR_LAYERS = {"num_hidden_layers": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba with attention": ("bamba", {"attn_layer_indices": [1]}),
    "cohere with norms of q and k": ("cohere", {"use_qk_norm": True}),
    "cohere with groups": ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2}),
    "llama with groups": ("llama", {"num_key_value_heads": 2}),
    "olmo2 with groups": ("olmo2", {"num_key_value_heads": 2}),
    "phi3 with groups": ("phi3", {"num_key_value_heads": 2}),
    "qwen2 with groups": ("qwen2", {"num_key_value_heads": 2}),
    "stablelm with groups": ("stablelm", {"num_key_value_heads": 2}),
    "gemma4 with keys as values": ("gemma4_text", {**FOUR_LAYERS, "attention_k_eq_v": True,
        "num_global_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "deepseek_v2 with q in one matrix": ("deepseek_v2", {"q_lora_rank": None, **all_types.DEFAULTS["deepseek_v2"]}),
    "deepseek_v3 with q in one matrix": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v4 with short windows": (
        "deepseek_v4", {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}}
    ),
    "falcon with groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with biases": ("falcon", {"alibi": True, "bias": True}),
    "gemma3n without a threshold": ("gemma3n_text", {**FOUR_LAYERS, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt_bigcode with all heads": ("gpt_bigcode", {"multi_query": False}),
    "granitemoehybrid with attention": (
        "granitemoehybrid", {**FOUR_LAYERS, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4}
    ),
    "hunyuan_v1_moe with experts": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "kimi_linear with attention": (
        "kimi_linear", {**FOUR_LAYERS, "layer_types": ["linear_attention", "full_attention"] * 2}
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama4 with dense layers": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "mpt with biases": ("mpt", {"no_bias": False}),
    "phi with norms of q and k": ("phi", {"qk_layernorm": True}),
    "stablelm with norms of q and k": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
}  # fmt: skip
"""Configurations whose tensors are laid out otherwise than by a type's default one."""


def make(model_type: str, **fields: Any) -> Any:
    skip_unknown(model_type)
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type](**fields)) if fields else all_types.small_config(model_type)
    return AutoModelForCausalLM.from_config(config)


@lru_cache(maxsize=200)
def proof_of(name: str) -> tuple[Anatomy, SliceProof]:
    """The proof of a type or of a variant."""
    model_type, fields = VARIANTS.get(name, (name, {}))
    model = make(model_type, **fields)
    anatomy = read_anatomy(model)
    return anatomy, prove_slices(model, anatomy)


def below_layer(name: str) -> str:
    return name.partition(".")[2]


def expected(anatomy: Anatomy) -> set[str]:
    """What there is to measure, layers not told apart."""
    steps = (
        re.match(r"layers\[\d+\]\.(((?:linear_)?attn(?:\[\d+\])?)\.|(ffn\.experts)\[)", c.name)
        for c in anatomy.components
    )
    cuts = {below_layer(c.name) for c in anatomy.cuts if c.name.startswith("layers[")}
    return cuts | {step[2] or step[3] for step in steps if step}


def check(anatomy: Anatomy, proof: SliceProof) -> None:
    assert proof.disagreements == ()
    assert proof.unmeasured == ()
    measured = {below_layer(name) for name in proof.measured}
    assert {name for name in measured if not name.endswith(".gate")} == expected(anatomy)


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=OTHERWISE.get(t, ())) for t in all_types.DECODERS])
def test_slices_agree_with_what_a_tiny_model_does(model_type: str) -> None:
    check(*proof_of(model_type))


@pytest.mark.parametrize("name", VARIANTS)
def test_slices_agree_with_other_layouts_of_a_type_too(name: str) -> None:
    check(*proof_of(name))


def test_cross_attention_is_named_by_its_own_layout_has_no_heads_and_is_listed_as_not_measured() -> None:
    model = make("gpt2", add_cross_attention=True)
    anatomy = read_anatomy(model)
    slices = {c.name: str(c.slices[0]).rpartition("crossattention.")[2] for c in anatomy.components}
    assert slices["layers[0].cross_attn.q"] == "q_attn.weight[0:64, 0:64]"
    assert slices["layers[0].cross_attn.k"] == "c_attn.weight[0:64, 0:64]"
    assert slices["layers[0].cross_attn.v"] == "c_attn.weight[0:64, 64:128]"
    assert not any("cross_attn" in cut.name for cut in anatomy.cuts)
    assert any("layers[0].cross_attn" in line for line in prove_slices(model, anatomy).unmeasured)


def test_most_types_have_heads_neurons_and_experts() -> None:
    found = [expected(proof_of(t)[0]) for t in all_types.DECODERS]
    heads, experts, neurons = (sum(c in names for names in found) for c in ("attn.heads", "ffn.experts", "ffn.neurons"))
    newest = TRANSFORMERS >= WRITTEN_FOR  # with 136 types; 5.14 has 119
    assert heads >= (115 if newest else 105)
    assert experts >= (55 if newest else 42)
    assert neurons >= (90 if newest else 86)


@pytest.mark.parametrize(("model_type", "part"), [*OTHER_ROLES, *TRUE_EXCEPTIONS])
def test_every_exception_is_needed(model_type: str, part: str) -> None:
    names = [model_type, *(name for name, (of, _) in VARIANTS.items() if of == model_type)]
    found = [below_layer(sentence) for name in names for sentence in proof_of(name)[1].exceptions]
    assert any(sentence.startswith(part.removesuffix(".gate")) for sentence in found)


# ---- planted faults -------------------------------------------------------------------------------------------------


def planted(anatomy: Anatomy, model_type: str, **fields: Any) -> SliceProof:
    return prove_slices(make(model_type, **fields), anatomy)


def renamed(anatomy: Anatomy, change: Callable[[str], str]) -> Anatomy:
    """Components whose slices lie under other names; no cuts."""
    slices: dict[str, tuple[Slice, ...]] = {}
    for c in anatomy.components:
        slices[change(c.name)] = (*slices.get(change(c.name), ()), *c.slices)
    return replace(anatomy, components=tuple(Component(name=n, slices=s) for n, s in slices.items()), cuts=())


def swapped(anatomy: Anatomy, a: str, b: str) -> Anatomy:
    return renamed(anatomy, lambda name: re.sub(f"{a}|{b}", lambda m: b if re.fullmatch(a, m[0]) else a, name))


def with_cut(anatomy: Anatomy, name: str, change: Callable[[Cut], Cut]) -> Anatomy:
    return replace(anatomy, cuts=tuple(change(c) if c.name.endswith(name) else c for c in anatomy.cuts))


def rows_of(piece: Slice, *rows: range) -> Slice:
    return Slice(piece.tensor, (rows, *piece.index[1:]))


@pytest.mark.parametrize(("a", "b"), [("q", "k"), ("k", "v"), ("q", "o")])
def test_swapped_projections_are_found(a: str, b: str) -> None:
    anatomy = swapped(read_anatomy(make("llama")), rf"attn\.{a}".replace("\\", ""), f"attn.{b}")
    found = planted(anatomy, "llama").disagreements
    assert {below_layer(d).split(":")[0] for d in found} == {f"attn.{a}", f"attn.{b}"}
    assert "measured: " in found[0]


def test_q_k_and_v_one_after_another_are_no_groups() -> None:
    """GPT-NeoX packs head by head; thirds of the rows are wrong, as they were for GPT-BigCode."""
    anatomy = read_anatomy(make("gpt_neox"))
    thirds = {"q": range(64), "k": range(64, 128), "v": range(128, 192)}

    def wrong(c: Component) -> Component:
        rows = thirds.get(c.path[-1][0]) if len(c.path) == 3 and c.path[1][0] == "attn" else None
        return replace(c, slices=tuple(rows_of(s, rows) for s in c.slices)) if rows else c

    anatomy = replace(anatomy, components=tuple(map(wrong, anatomy.components)), cuts=())
    found = planted(anatomy, "gpt_neox").disagreements
    assert {below_layer(d).split(":")[0] for d in found} == {"attn.q", "attn.k", "attn.v"}
    assert "elements influence value" in "".join(found)


def test_a_packed_projection_that_is_one_part_is_named() -> None:
    anatomy = renamed(read_anatomy(make("gpt2")), lambda name: re.sub(r"attn\.[qkv]$", "attn.qkv", name))
    assert "query, key and value are packed and not told apart" in planted(anatomy, "gpt2").disagreements[0]


def test_a_part_of_the_query_with_another_name_is_found() -> None:
    anatomy = renamed(read_anatomy(make("llama")), lambda name: name.replace("attn.q", "attn.lost"))
    (found,) = planted(anatomy, "llama").disagreements
    assert "is no part of q, k, v or kv, measured: 4096 of 4096 elements influence query" in found


def test_softmax_attention_is_not_linear_attention() -> None:
    anatomy = renamed(read_anatomy(make("llama")), lambda name: name.replace(".attn.", ".linear_attn."))
    (found,) = planted(anatomy, "llama").disagreements
    assert found == "layers[0].linear_attn: its name says linear attention, measured: a softmax joins its tokens"


def test_attention_without_a_softmax_is_not_measured_and_says_so() -> None:
    anatomy = renamed(read_anatomy(make("minimax")), lambda name: name.replace("linear_attn.", "attn."))
    assert any("no softmax of a product of query and key" in why for why in planted(anatomy, "minimax").unmeasured)


def two_halves(cut: Cut) -> Cut:
    """Heads that take every chunk from two places in q."""
    (q, dim), *rest = cut.pieces
    return replace(cut, pieces=((rows_of(q, range(32)), dim), (rows_of(q, range(32, 64)), dim), *rest))


def test_heads_in_other_rows_are_found() -> None:
    anatomy = with_cut(read_anatomy(make("llama")), "attn.heads", two_halves)
    found = planted(anatomy, "llama").disagreements
    assert found
    assert all(d.startswith("layers[0].attn.heads[") and "q_proj" in d for d in found)


def test_another_number_of_heads_is_found() -> None:
    anatomy = with_cut(read_anatomy(make("gpt2")), "attn.heads", lambda cut: replace(cut, n=2))
    (found,) = planted(anatomy, "gpt2").disagreements
    assert found == "layers[0].attn.heads: its name says 2 heads, measured: [4]"


def test_key_heads_in_other_rows_are_found() -> None:
    def by_twos(cut: Cut) -> Cut:
        (k, dim), *rest = cut.pieces
        return replace(cut, pieces=((rows_of(k, range(16)), dim), (rows_of(k, range(16, 32)), dim), *rest))

    found = planted(with_cut(read_anatomy(make("llama")), "attn.kv_heads", by_twos), "llama").disagreements
    assert found
    assert all(d.startswith("layers[0].attn.kv_heads[") and "k_proj" in d for d in found)


def test_rows_of_a_head_that_no_member_holds_are_found() -> None:
    anatomy = read_anatomy(make("gpt2"))
    bias = "c_attn.bias"
    anatomy = replace(
        anatomy,
        cuts=tuple(
            replace(c, pieces=tuple(p for p in c.pieces if not p[0].tensor.endswith(bias))) for c in anatomy.cuts
        ),
    )
    found = planted(anatomy, "gpt2").disagreements
    assert {below_layer(d).split(":")[0] for d in found} >= {"attn.q", "attn.v"}
    assert "heads use different elements of it, and no member holds them" in found[0]


def interleaved(anatomy: Anatomy) -> Anatomy:
    """Gate and up of packed experts row by row, where they are one after the other."""
    swap = {range(96): range(0, 192, 2), range(96, 192): range(1, 192, 2)}

    def wrong(s: Slice) -> Slice:
        rows = swap.get(s.index[1][0]) if s.tensor.endswith("gate_up_proj") else None
        return Slice(s.tensor, (s.index[0], (rows,), s.index[2])) if rows else s

    return replace(
        anatomy,
        components=tuple(replace(c, slices=tuple(map(wrong, c.slices))) for c in anatomy.components),
        cuts=tuple(replace(c, pieces=tuple((wrong(s), dim) for s, dim in c.pieces)) for c in anatomy.cuts),
    )


def test_gate_and_up_rows_in_another_order_are_found() -> None:
    found = planted(interleaved(read_anatomy(make("mixtral"))), "mixtral").disagreements
    assert {below_layer(d).split(":")[0] for d in found} == {
        *(f"ffn.experts[{j}].neurons" for j in range(4)), "ffn"
    }  # fmt: skip


def test_gate_and_up_in_place_of_each_other_are_found() -> None:
    anatomy = swapped(read_anatomy(make("llama")), "ffn.gate", "ffn.up")
    assert planted(anatomy, "llama").disagreements == (
        "layers[0].ffn: its names say the output is an affine function of up, measured: it is no affine one",
        "layers[0].ffn: its names say the output is no affine function of gate, measured: it is an affine one",
    )


def test_neurons_in_other_rows_are_found() -> None:
    def far_apart(cut: Cut) -> Cut:
        """Pairs of neurons: i and i + 128 in the first matrix, neighbours in its bias and in the second one."""
        (weight, dim), *rest = cut.pieces
        assert (cut.n, dim) == (256, 1)
        halves = (Slice(weight.tensor, (weight.index[0], (rows,))) for rows in (range(128), range(128, 256)))
        return replace(cut, n=128, pieces=(*((half, dim) for half in halves), *rest))

    found = planted(with_cut(read_anatomy(make("gpt2")), "ffn.neurons", far_apart), "gpt2").disagreements
    assert len(found) == 2
    assert all("layers[0].ffn.neurons: transformer.h.0.mlp.c_fc.weight" in d for d in found)


def test_rows_of_a_neuron_that_no_member_holds_are_found() -> None:
    def without_bias(cut: Cut) -> Cut:
        return replace(cut, pieces=tuple(p for p in cut.pieces if not p[0].tensor.endswith("bias")))

    (found,) = planted(with_cut(read_anatomy(make("gpt2")), "ffn.neurons", without_bias), "gpt2").disagreements
    assert "c_fc.bias[0:256]: single neurons use elements of it, and no member holds them" in found


@pytest.mark.parametrize("part", ["", r"\.down"])
def test_swapped_experts_are_found(part: str) -> None:
    def swap(name: str) -> str:
        return re.sub(rf"experts\[([01])\](?={part})", lambda m: f"experts[{1 - int(m[1])}]", name)

    found = planted(renamed(read_anatomy(make("mixtral")), swap), "mixtral").disagreements
    assert {below_layer(d).split(":")[0] for d in found} == {
        f"ffn.experts[{j}].{p}" for j in (0, 1) for p in (["down"] if part else ["gate", "up", "down"])
    }
    assert "matter to tokens that were not" in found[0]


def test_experts_that_are_one_part_are_named() -> None:
    anatomy = renamed(read_anatomy(make("mixtral")), lambda name: re.sub(r"experts\[\d\]\..*", "experts", name))
    assert "the experts are packed and not told apart" in planted(anatomy, "mixtral").disagreements[0]


def test_a_shared_expert_that_not_every_token_visits_is_found() -> None:
    anatomy = renamed(read_anatomy(make("mixtral")), lambda name: name.replace("experts[3]", "shared_expert"))
    found = planted(anatomy, "mixtral").disagreements
    assert "its name says every token visits it, measured: some do not" in found[0]


# ---- what else there is ---------------------------------------------------------------------------------------------


def test_a_fault_in_one_layer_is_found_there() -> None:
    anatomy = read_anatomy(make("llama"))
    change = {"layers[2].attn.k": "layers[2].attn.v", "layers[2].attn.v": "layers[2].attn.k"}
    found = planted(renamed(anatomy, lambda name: change.get(name, name)), "llama").disagreements
    assert {d.split(":")[0] for d in found} == set(change)


def test_a_model_that_does_not_run_is_not_measured_and_says_why() -> None:
    model = make("llama")
    anatomy = read_anatomy(model)
    model.model.layers[1].forward = None
    proof = prove_slices(model, anatomy)
    assert not proof.measured
    assert len(proof.unmeasured) == 1
    assert "llama: the tiny model does not run: " in proof.unmeasured[0]


def test_proving_leaves_no_hooks_and_no_scaled_weights_behind() -> None:
    model = make("mixtral")
    anatomy = read_anatomy(model)
    prove_slices(model, anatomy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    other = make("mixtral")
    prove_slices(other, replace(anatomy, cuts=()))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_scaling_touches_its_slices_only() -> None:
    model = make("llama")
    anatomy = read_anatomy(model)
    name = "layers[0].ffn"
    branch = find_branches(model, {name: module_of(model, anatomy, name)}, 0)[name]
    (piece,) = anatomy.component[f"{name}.up"].slices
    before = branch.parameters[piece.tensor].detach().clone()
    with scaled([rows_of(piece, range(3, 5), range(9, 10))], 0.0, branch):
        changed = (branch.parameters[piece.tensor] != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 4, 9]
    assert torch.equal(branch.parameters[piece.tensor], before)


def test_minimax_packs_its_linear_attention_head_by_head() -> None:
    model = make("minimax")
    anatomy = read_anatomy(model)
    name = next(c.name for c in anatomy.components if c.name.endswith("linear_attn.q")).removesuffix(".q")
    branch = find_branches(model, {name: module_of(model, anatomy, name)}, 0)[name]
    watch = Watch()
    run(branch, watch)
    scores, context = [e for e in watch.events if isinstance(e, Product)][:2]
    for part, tensor in {"q": scores.first, "k": scores.second, "v": context.second}.items():
        (piece,) = anatomy.component[f"{name}.{part}"].slices
        elements = touched(tensor, [piece.tensor], branch)[piece.tensor]
        rows = elements.any(1).nonzero().flatten().tolist()
        assert rows == [i for r in piece.index[0] for i in r]


def test_attention_that_calls_the_fused_function_is_measured_too() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(1, -1, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            return nn.functional.scaled_dot_product_attention(q, k, value=v).transpose(1, 2).flatten(2)

    from frostline.anatomy.slice_capture import Branch, attentions

    module = Fused()
    parameters = dict(module.named_parameters())
    branch = Branch(module=module, args=(torch.randn(1, 5, 8),), kwargs={}, n_rows=5, parameters=parameters)
    watch = Watch()
    run(branch, watch)
    (attention,) = attentions(watch)
    assert attention.n_heads == 2
    for name in "qkv":
        tensor = {"q": attention.query, "k": attention.key, "v": attention.value}[name]
        assert {n for n, e in touched(tensor, parameters, branch).items() if e.any()} == {
            f"{name}.weight",
            f"{name}.bias",
        }


# ---- whole branches -------------------------------------------------------------------------------------------------

QUIET = {
    ("gemma3n_text", "up"): "its sparse activation leaves most neurons out",
    ("gemma3n_text", "down"): "its sparse activation leaves most neurons out",
    ("longcat_flash", "unused"): "rows of identity experts, which nothing reads",
    ("longcat_flash", "gate"): "its first FFN stands before its second attention",
    ("longcat_flash", "up"): "its first FFN stands before its second attention",
    ("longcat_flash", "down"): "its first FFN stands before its second attention",
}
"""(model type, part) → why its elements change nothing here, or attention too."""


@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_the_elements_of_the_last_ffn_change_the_blocks_output_and_no_mixers(model_type: str) -> None:
    model = make(model_type)
    anatomy = read_anatomy(model)
    layers = [c.path[0][1] for c in anatomy.components if c.path[0][0] == "layers" and c.path[1][0] == "ffn"]
    if not layers:
        return  # a model of state-space mixers only
    prepare_to_measure(model, anatomy, 0)
    at, block = f"layers[{layers[-1]}]", find_blocks(model)[layers[-1]][1]
    mixers = {
        c.path[1] for c in anatomy.components if c.name.startswith(at) and c.path[1][0] in ("attn", "linear_attn")
    }
    modules = [module_of(model, anatomy, f"{at}.{n}" + (f"[{i}]" if i is not None else "")) for n, i in mixers]
    returned: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_hook(
            lambda _, __, out: returned.append(out[0] if isinstance(out, (tuple, list)) else out)
        )
    branch = find_branches(model, {at: block}, 0)[at]
    returned.clear()
    output = run(branch)
    parts = [(c, s) for c, found in select(anatomy, f"{at}.ffn", ties="together").by_component() for s in found]
    parts = [(c, s) for c, s in parts if c.name.startswith(at) and branch.parameters[s.tensor].requires_grad]
    names = {s.tensor for _, s in parts}
    reaches_block = touched(output, names, branch)
    reaches_mixer = [touched(out, names, branch) for out in returned]
    wrong = set()
    for component, s in parts:
        unchosen = component.path[-1][0] == "router"  # rows of experts that no token here was sent to
        reaches = unchosen or bool(take(reaches_block[s.tensor], s).all())
        honest = reaches and not any(take(m[s.tensor], s).any() for m in reaches_mixer)
        wrong |= set() if honest else {(model_type, component.path[-1][0])}
    assert wrong <= set(QUIET), wrong
    assert {key for key in QUIET if key[0] == model_type} <= wrong, "an exception that is none"
