"""Packed tensors, recomputed: what the slices give, against what the model's own modules return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_types import small_config, small_model
from transformers import AutoModelForCausalLM
from versions import OTHERWISE

from frostline.anatomy import module_of, read_anatomy, take
from frostline.anatomy.layouts import Packing, packing_of
from frostline.anatomy.slice_capture import Watch, attentions, find_branches, run

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
"""Importing GPT-BigCode says so in every version up to 5.22."""


def build(model_type: str, **flags: Any):
    """A tiny model with its configuration's flags, every parameter random."""
    config = small_config(model_type)
    for name, value in flags.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager") if flags else small_model(model_type)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval(), read_anatomy(model)


def joined(model, anatomy, part):
    """Weight (outputs, inputs) and bias of a part that is linear, its slices put together."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    pieces = [take(tensors[s.tensor], s).detach() for s in anatomy.component[part].slices]
    weight = next(p for p in pieces if p.dim() == 2)
    bias = next((p for p in pieces if p.dim() == 1), torch.zeros(()))
    transposed = type(model.get_submodule(anatomy.component[part].slices[0].tensor.rpartition(".")[0])).__name__
    return (weight.T if transposed == "Conv1D" else weight), bias


PACKED_ATTENTION = [
    ("gpt2", {}),
    ("openai-gpt", {}),
    ("gpt_bigcode", {}),
    ("gpt_bigcode", {"multi_query": False}),
    ("bloom", {}),
    ("gpt_neox", {}),
    ("gpt_neox_japanese", {}),
    ("falcon", {}),
    ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("codegen", {}),
    ("mpt", {}),
    ("dbrx", {}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("model_type", "flags"), PACKED_ATTENTION, ids=lambda v: str(v))
def test_queries_keys_and_values_computed_from_the_slices_are_the_models_own(model_type, flags):
    model, anatomy = build(model_type, **flags)
    branch = find_branches(model, {"attn": module_of(model, anatomy, "layers[0].attn")}, seed=0)["attn"]
    watch = Watch()
    run(branch, watch)
    (own,) = attentions(watch)
    given = next(v for v in (*branch.args, *branch.kwargs.values()) if torch.is_tensor(v) and v.is_floating_point())
    if "hidden_states" in branch.kwargs:
        given = branch.kwargs["hidden_states"]
    for name, theirs in (
        ("q", own.query),
        ("k", own.key if own.key.shape[-1] == own.query.shape[-1] else own.key.mT),
        ("v", own.value),
    ):
        weight, bias = joined(model, anatomy, f"layers[0].attn.{name}")
        computed = given.reshape(-1, given.shape[-1]) @ weight.T + bias
        width = theirs.shape[-1]
        heads = computed.reshape(len(computed), -1, width)[0]  # the first token: a rotation by 0 changes nothing
        theirs = theirs.detach().reshape(-1, *theirs.shape[-2:])[:, 0]
        heads = heads.repeat_interleave(len(theirs) // len(heads), dim=0)
        scale = float((theirs * heads).sum() / (heads * heads).sum())  # some models scale the query, not the scores
        assert torch.allclose(theirs, scale * heads, rtol=1e-4, atol=1e-5), name
        assert scale > 0


GATED = ["phi3", "glm", "glm4", "zamba2", "modernbert-decoder"]


@pytest.mark.parametrize("model_type", GATED)
def test_a_packed_gate_is_what_the_activation_sees_and_up_what_it_is_multiplied_with(model_type):
    model, anatomy = build(model_type)
    layer = next(c.path[0][1] for c in anatomy.components if c.name.endswith("ffn.gate"))
    module = module_of(model, anatomy, f"layers[{layer}].ffn")
    branch = find_branches(model, {"ffn": module}, seed=0)["ffn"]
    x = next(v for v in (*branch.args, *branch.kwargs.values()) if torch.is_tensor(v) and v.is_floating_point())
    parts = {name: joined(model, anatomy, f"layers[{layer}].ffn.{name}")[0] for name in ("gate", "up", "down")}
    activation = next(getattr(module, n) for n in ("activation_fn", "act_fn", "act") if hasattr(module, n))
    flat = x.reshape(-1, x.shape[-1])
    computed = (activation(flat @ parts["gate"].T) * (flat @ parts["up"].T)) @ parts["down"].T
    if model_type == "zamba2":  # its adapter adds to gate and up: not this projection's
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.mul_(0 if "adapter" in name else 1)
    assert torch.allclose(run(branch).detach(), computed, rtol=1e-4, atol=1e-5)


def swiglu_of_gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


EXPERTS = ["mixtral", "gpt_oss", "aria_text", "nemotron_h", "dbrx", "longcat_flash", "granitemoe", "llama4_text"]


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=OTHERWISE.get(t, ())) for t in EXPERTS])
def test_every_experts_output_computed_from_its_slices_is_the_models_own(model_type):
    model, anatomy = build(model_type)
    layer = next(c.path[0][1] for c in anatomy.components if ".experts[0].down" in c.name)
    module = model.get_submodule(
        anatomy.component[f"layers[{layer}].ffn.experts[0].down"].slices[0].tensor.rpartition(".")[0]
    )
    if model_type == "dbrx":
        module = module_of(model, anatomy, f"layers[{layer}].ffn").experts
    calls = []
    module.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    model(torch.arange(3, 27)[None], use_cache=False)
    args, returned = calls[0]
    hidden = args[0].detach().reshape(-1, args[0].shape[-1])
    activation = getattr(module, "act_fn", None) or getattr(getattr(module, "mlp", None), "activation_fn", None)
    combine = swiglu_of_gpt_oss if model_type == "gpt_oss" else (lambda gate, up: activation(gate) * up)
    n_experts = 1 + max(c.path[2][1] for c in anatomy.components if c.name.startswith(f"layers[{layer}].ffn.experts["))
    outputs = [
        expert_output(model, anatomy, f"layers[{layer}].ffn.experts[{j}]", combine, activation, hidden)
        for j in range(n_experts)
    ]
    if model_type == "llama4_text":  # every expert sees a row of inputs of its own
        rows = len(hidden) // n_experts
        expected = torch.cat([outputs[j][j * rows : (j + 1) * rows] for j in range(n_experts)])
    else:
        index, weights = args[1], args[2]
        outputs += [hidden] * (int(index.max()) + 1 - n_experts)  # identity experts
        expected = sum(
            torch.stack(outputs)[index[:, k], torch.arange(len(hidden))] * weights[:, k, None]
            for k in range(index.shape[1])
        )
    assert torch.allclose(returned.detach().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def expert_output(model, anatomy, name, combine, activation, hidden):
    """Gate, up, down by the field's formula, biases included, whichever way the expert is stored."""
    tensors = dict(model.named_parameters())

    def linear(part, x):
        weight, bias = None, 0.0
        for s in anatomy.component[f"{name}.{part}"].slices:
            values = take(tensors[s.tensor], s).detach()
            if s.tensor.endswith("bias"):
                bias = values.reshape(-1)
            else:
                weight = values.reshape([n for n in values.shape if n > 1])
        flat = part == "down" and anatomy.model_type == "dbrx"  # (inputs, outputs), and square in this size
        return x @ (weight.T if weight.shape[1] == x.shape[1] and not flat else weight) + bias

    up = linear("up", hidden)
    inner = combine(linear("gate", hidden), up) if f"{name}.gate" in anatomy.component else activation(up)
    return linear("down", inner)


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        (Packing(1, (("q", 4), ("k", 2))), {"q": [0, 1, 2, 3], "k": [4, 5]}),
        (Packing(2, (("q", 2), ("k", 1))), {"q": [0, 1, 3, 4], "k": [2, 5]}),
        (Packing(3, (("gate", 1), ("up", 1))), {"gate": [0, 2, 4], "up": [1, 3, 5]}),
    ],
)
def test_a_packing_lists_every_index_once(packing, expected):
    found = {part: [i for r in ranges for i in r] for part, ranges in packing.indices().items()}
    assert found == expected
    assert sorted(i for indices in found.values() for i in indices) == list(range(packing.n))


def test_sizes_that_do_not_fit_leave_the_tensor_one_part():
    attention = torch.nn.Module()
    attention.head_dim, attention.num_heads = 8, 4
    attention.o_proj = torch.nn.Linear(32, 32)
    assert packing_of("phi3", attention, "qkv_proj", "qkv", 64).widths == (("q", 32), ("k", 16), ("v", 16))
    assert packing_of("phi3", attention, "qkv_proj", "qkv", 65) is None
    assert packing_of("phi3", attention, "qkv_proj", "qkv", 80) is None  # three key heads for four query heads
    assert packing_of("llama", attention, "q_proj", "q", 32) is None
    attention.num_heads = 3
    assert packing_of("phi3", attention, "qkv_proj", "qkv", 64) is None
