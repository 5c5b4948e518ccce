"""Reading an anatomy: complete, and right about what each part does in the running model."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from frostline.anatomy import (
    Anatomy,
    Component,
    Slice,
    TensorInfo,
    anatomy_from_json,
    anatomy_of_parts,
    anatomy_to_json,
    check_partition,
    list_tensors,
    parse_path,
    read_anatomy,
    take,
    whole,
)
from frostline.errors import AnatomyError
from frostline.model import load_skeleton
from frostline.recipe import ScratchModel

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def grid(piece):
    return np.ix_(*([i for r in dim for i in r] for dim in piece.index))


@lru_cache
def skeleton(family):
    return load_skeleton(ScratchModel(**tiny.config(family)))


@lru_cache
def lively(family):
    """A tiny model whose every parameter is random and of a size that matters, norms and biases included."""
    model = tiny.model(family).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return model


def tensors_of(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


INPUT = torch.tensor([[5, 17, 300, 42, 9, 1]])


# --- complete -------------------------------------------------------------------------------------------------------


@every_family
def test_every_element_of_every_tensor_belongs_to_exactly_one_component(family):
    marks = {name: np.zeros(tuple(t.shape), dtype=int) for name, t in tensors_of(skeleton(family)).items()}
    for component in tiny.anatomy(family).components:
        for piece in component.slices:
            marks[piece.tensor][grid(piece)] += 1
    assert [name for name, mark in marks.items() if not (mark == 1).all()] == []


@every_family
def test_element_counts_equal_those_of_the_model(family):
    anatomy, model = tiny.anatomy(family), skeleton(family)
    expected = sum(p.numel() for p in model.parameters())
    assert anatomy.n_parameters == expected
    assert sum(anatomy.n_own_elements(c) for c in anatomy.components) == expected
    assert anatomy.n_layers == model.config.num_hidden_layers == 3


@every_family
def test_tensors_are_listed_with_shape_type_kind_and_whether_they_are_saved(family):
    model = skeleton(family)
    parameters, saved = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    listed = {t.name: t for t in tiny.anatomy(family).tensors}
    assert list(listed) == list(tensors_of(model))
    for name, tensor in tensors_of(model).items():
        info = listed[name]
        assert (info.shape, f"torch.{info.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert (info.kind == "parameter", info.persistent) == (name in parameters, name in saved)


@every_family
def test_the_anatomy_on_the_meta_device_is_that_of_the_real_model(family):
    assert read_anatomy(lively(family)) == tiny.anatomy(family)


# --- names ----------------------------------------------------------------------------------------------------------

DENSE = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
EXPERTS = [f"ffn.experts[{j}].{part}" for j in range(4) for part in ("gate", "up", "down")]
IN_A_BLOCK = {
    "llama": {"attn_norm", "ffn_norm", *DENSE},
    "qwen2": {"attn_norm", "ffn_norm", *DENSE},
    "qwen3": {"attn_norm", "ffn_norm", "attn.q_norm", "attn.k_norm", *DENSE},
    "mistral": {"attn_norm", "ffn_norm", *DENSE},
    "gemma": {"attn_norm", "ffn_norm", *DENSE},
    "gpt2": {"attn_norm", "ffn_norm", *DENSE} - {"ffn.gate"},
    "mixtral": {"attn_norm", "ffn_norm", *DENSE[:4], "ffn.router", *EXPERTS},
    "olmo2": {"attn_post_norm", "ffn_post_norm", "attn.q_norm", "attn.k_norm", *DENSE},
}


@every_family
def test_components_have_the_names_of_their_family(family):
    blocks = {f"layers[{i}].{name}" for i in range(3) for name in IN_A_BLOCK[family]}
    assert set(tiny.anatomy(family).component) == {"embed", "position", "final_norm", "head", *blocks}


def tensors_behind(family, component):
    return [str(s) for s in tiny.anatomy(family).component[component].slices]


def test_llama_components_are_whole_tensors():
    assert tensors_behind("llama", "embed") == ["model.embed_tokens.weight[0:320, 0:32]"]
    assert tensors_behind("llama", "layers[1].attn.k") == ["model.layers.1.self_attn.k_proj.weight[0:16, 0:32]"]
    assert tensors_behind("llama", "layers[2].ffn_norm") == ["model.layers.2.post_attention_layernorm.weight[0:32]"]
    assert tensors_behind("llama", "head") == ["lm_head.weight[0:320, 0:32]"]


def test_gpt2_query_key_and_value_are_columns_of_one_tensor_with_their_biases():
    at = "transformer.h.1.attn.c_attn"
    for part, columns in (("q", "0:32"), ("k", "32:64"), ("v", "64:96")):
        assert tensors_behind("gpt2", f"layers[1].attn.{part}") == [
            f"{at}.weight[0:32, {columns}]",
            f"{at}.bias[{columns}]",
        ]
    assert tensors_behind("gpt2", "position") == ["transformer.wpe.weight[0:128, 0:32]"]


def test_qwen2_biases_belong_to_query_key_and_value():
    for part in "qkv":
        names = [s.tensor for s in tiny.anatomy("qwen2").component[f"layers[0].attn.{part}"].slices]
        assert names == [f"model.layers.0.self_attn.{part}_proj.{kind}" for kind in ("weight", "bias")]


def test_mixtral_experts_are_boxes_of_packed_tensors():
    at = "model.layers.0.mlp.experts"
    assert tensors_behind("mixtral", "layers[0].ffn.experts[3].gate") == [f"{at}.gate_up_proj[3:4, 0:48, 0:32]"]
    assert tensors_behind("mixtral", "layers[0].ffn.experts[3].up") == [f"{at}.gate_up_proj[3:4, 48:96, 0:32]"]
    assert tensors_behind("mixtral", "layers[0].ffn.experts[3].down") == [f"{at}.down_proj[3:4, 0:32, 0:48]"]
    assert tensors_behind("mixtral", "layers[0].ffn.router") == ["model.layers.0.mlp.gate.weight[0:4, 0:32]"]


@every_family
def test_norms_and_only_norms_are_known_as_norms(family):
    anatomy = tiny.anatomy(family)
    modules = dict(skeleton(family).named_modules())
    for component in anatomy.components:
        kinds = {type(modules[s.tensor.rpartition(".")[0]]).__name__ for s in component.slices}
        assert component.is_norm == all("Norm" in kind for kind in kinds), component.name


@every_family
def test_biases_and_only_biases_are_known_as_biases(family):
    anatomy = tiny.anatomy(family)
    slices = [s for c in anatomy.components for s in c.slices]
    assert {s.tensor for s in slices if anatomy.is_bias(s)} == {n for n in anatomy.tensor if n.endswith(".bias")}


# --- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head", "embed"),
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("gemma", "lm_head.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_head_that_is_the_embedding_is_a_tie(family, head, embed):
    anatomy = tiny.anatomy(family)
    assert anatomy.ties == {head: embed}
    assert anatomy.tied_components == (("head", "embed"),)
    assert anatomy.storage_name(head) == anatomy.storage_name(embed) == embed
    assert anatomy.n_own_elements(anatomy.component["head"]) == 0


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmo2"])
def test_equal_shapes_are_no_tie(family):
    assert tiny.anatomy(family).ties == {}


class SharedEmbedding(nn.Module):
    """The same embedding module under two names."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.middle = nn.Linear(3, 3)
        self.again = self.words


def test_a_module_used_twice_is_found_by_identity_as_a_tie():
    anatomy = anatomy_of_parts(SharedEmbedding(), {"embed": ["words"], "ffn": ["middle"], "head": ["again"]})
    assert anatomy.ties == {"again.weight": "words.weight"}
    assert anatomy.tied_components == (("head", "embed"),)
    assert anatomy.n_parameters == 7 * 3 + 3 * 3 + 3


def test_equal_values_in_other_tensors_are_no_tie():
    module = SharedEmbedding()
    module.again = nn.Embedding.from_pretrained(module.words.weight.detach().clone())
    assert [t.alias_of for t in list_tensors(module)] == [None] * 4


# --- what the parts do in the running model -------------------------------------------------------------------------


@every_family
def test_components_stand_in_the_order_of_the_forward_pass(family):
    model, anatomy = lively(family), tiny.anatomy(family)
    modules, seen, hooks = dict(model.named_modules()), [], []
    for component in anatomy.components:
        name = ".".join(component.name.split(".")[:2])  # parts of attn and of ffn have no order of their own
        for module in {modules[s.tensor.rpartition(".")[0]] for s in component.slices}:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)))
    with torch.no_grad():
        model(INPUT)
    for hook in hooks:
        hook.remove()
    listed = dict.fromkeys(".".join(c.name.split(".")[:2]) for c in anatomy.components)
    assert list(dict.fromkeys(seen)) == list(listed)


@pytest.fixture
def watched(request):
    """The inputs and outputs of every module of a model in one forward pass, by module name."""
    model, inputs, outputs, hooks = lively(request.param), {}, {}, []
    for name, module in model.named_modules():

        def keep(_module, args, output, name=name):
            inputs[name] = args[0] if args and isinstance(args[0], torch.Tensor) else None
            outputs[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(INPUT)
    for hook in hooks:
        hook.remove()
    return tiny.anatomy(request.param), inputs, outputs


@pytest.mark.parametrize("watched", tiny.FAMILIES, indirect=True)
def test_a_norm_stands_before_or_after_the_part_that_its_name_says(watched):
    anatomy, inputs, outputs = watched

    def module(component):
        return anatomy.component[component].slices[0].tensor.rpartition(".")[0]

    pairs = [("final_norm", "head")]
    for i in range(3):
        have = {c.removeprefix(f"layers[{i}].") for c in anatomy.component if c.startswith(f"layers[{i}].")}
        first_of_ffn = "ffn.router" if "ffn.router" in have else "ffn.up"
        flows = {"attn_norm": ("attn_norm", "attn.q"), "ffn_norm": ("ffn_norm", first_of_ffn)}
        flows |= {"attn_post_norm": ("attn.o", "attn_post_norm"), "ffn_post_norm": ("ffn.down", "ffn_post_norm")}
        flows |= {"attn.q_norm": ("attn.q", "attn.q_norm"), "attn.k_norm": ("attn.k", "attn.k_norm")}
        pairs += [tuple(f"layers[{i}].{c}" for c in flow) for norm, flow in flows.items() if norm in have]
    for before, after in pairs:
        out, into = outputs[module(before)], inputs[module(after)]
        assert torch.equal(out.flatten(), into.flatten()), f"{before} → {after}"


@every_family
def test_without_its_query_key_or_value_slices_attention_gets_none(family, monkeypatch):
    attend, got = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, query, key, value, *args, **kwargs):
        got.append({"q": query, "k": key, "v": value})
        return attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    anatomy = tiny.anatomy(family)
    tensors = tensors_of(lively(family))
    for part in "qkv":
        pieces = anatomy.component[f"layers[0].attn.{part}"].slices
        before = [tensors[p.tensor].detach().clone() for p in pieces]
        got.clear()
        with torch.no_grad():
            for piece in pieces:
                take(tensors[piece.tensor], piece).zero_()
            lively(family)(INPUT)
            for piece, values in zip(pieces, before, strict=True):
                tensors[piece.tensor].copy_(values)
        assert {name: bool(t.any()) for name, t in got[0].items()} == {n: n != part for n in "qkv"}
        assert all(t.any() for t in got[1].values())


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_gpt2_attention_gets_the_product_with_the_columns_and_the_bias_of_the_part(part, monkeypatch):
    model, anatomy, got, hidden = lively("gpt2"), tiny.anatomy("gpt2"), [], []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *args, **kwargs):
        got.append({"q": query, "k": key, "v": value}[part])
        return attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    hooks = [
        b.attn.c_attn.register_forward_hook(lambda _m, args, _o: hidden.append(args[0])) for b in model.transformer.h
    ]
    with torch.no_grad():
        model(INPUT)
    for hook in hooks:
        hook.remove()
    for i in range(3):
        weight, bias = anatomy.component[f"layers[{i}].attn.{part}"].slices
        w, b = (tensors_of(model)[s.tensor].detach().numpy()[grid(s)] for s in (weight, bias))
        expected = hidden[i].numpy() @ w + b
        heads_together = got[i].transpose(1, 2).reshape(expected.shape)
        np.testing.assert_allclose(heads_together.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", range(4))
def test_a_mixtral_expert_is_computed_from_its_own_slices_alone(expert):
    model, anatomy = lively("mixtral"), tiny.anatomy("mixtral")
    experts = model.model.layers[1].mlp.experts
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        measured = experts(hidden, torch.full((5, 1), expert), torch.ones(5, 1))

    def weight(part):
        (piece,) = anatomy.component[f"layers[1].ffn.experts[{expert}].{part}"].slices
        return torch.from_numpy(tensors_of(model)[piece.tensor].detach().numpy()[grid(piece)][0])

    expected = (functional.silu(hidden @ weight("gate").T) * (hidden @ weight("up").T)) @ weight("down").T
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("watched", ["mixtral"], indirect=True)
def test_the_mixtral_router_scores_one_expert_per_row(watched):
    anatomy, inputs, outputs = watched
    (piece,) = anatomy.component["layers[2].ffn.router"].slices
    weight = tensors_of(lively("mixtral"))[piece.tensor].detach()
    hidden = inputs["model.layers.2.mlp.gate"].reshape(-1, 32)
    torch.testing.assert_close(outputs["model.layers.2.mlp.gate"], hidden @ weight.T)


# --- what is not understood -----------------------------------------------------------------------------------------


class Mystery(nn.Module):
    """A module that no table knows."""

    def __init__(self):
        super().__init__()
        self.secret = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize("where", ["model.layers.1", "model", ""], ids=["block", "decoder", "model"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_with_something_not_understood_is_refused_with_the_list_of_its_tensors(family, where):
    model = load_skeleton(ScratchModel(**tiny.config(family)))
    model.get_submodule(where).add_module("mystery", Mystery())
    path = f"{where}.mystery".removeprefix(".")
    with pytest.raises(AnatomyError) as caught:
        read_anatomy(model)
    assert str(caught.value).splitlines() == [
        f"{family}: 2 tensors are not understood:",
        f"  {path}.secret (2, 3)",
        f"  {path}.count ()",
    ]


def test_another_module_is_refused_with_the_way_to_name_its_parts():
    with pytest.raises(AnatomyError, match=r"Linear is not a causal language model .*anatomy_of_parts"):
        read_anatomy(nn.Linear(2, 2))


# --- parts named by hand --------------------------------------------------------------------------------------------


def two_layers():
    return nn.ModuleDict({"fc1": nn.Linear(2, 3), "fc10": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})


def test_parts_named_by_hand_are_an_anatomy_when_they_cover_the_module():
    anatomy = anatomy_of_parts(
        two_layers(), {"embed": ["fc1"], "layers[0].ffn": ["fc10.weight", "fc10.bias"], "n": ["norm"]}
    )
    assert [c.name for c in anatomy.components] == ["embed", "layers[0].ffn", "n"]
    assert anatomy.n_parameters == 2 * 3 + 3 + 3 * 4 + 4 + 2 * 4
    assert [s.tensor for s in anatomy.component["embed"].slices] == ["fc1.weight", "fc1.bias"]
    assert not anatomy.learnable(whole("norm.running_mean", (4,)))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"embed": ["fc1"], "ffn": ["fc10"]}, r"norm.running_var \(4,\): 4 of 4 elements belong to no component"),
        ({"embed": ["fc1"], "ffn": ["fc10", "fc1.bias"], "n": ["norm"]}, r"fc1.bias \(3,\): .* two components"),
        ({"embed": ["fc1", "fc1"], "ffn": ["fc10"], "n": ["norm"]}, r"fc1.weight \(3, 2\): .* two components"),
        ({"embed": ["fc1"], "ffn": ["fc100"], "n": ["norm"]}, "component ffn: the module has no 'fc100'"),
    ],
    ids=["missing", "overlapping", "twice in one part", "no such module"],
)
def test_parts_named_by_hand_that_do_not_partition_the_module_are_refused(parts, said):
    with pytest.raises(AnatomyError, match=said):
        anatomy_of_parts(two_layers(), parts)


def test_a_part_whose_name_is_no_component_name_is_refused_at_once():
    with pytest.raises(AnatomyError, match="'a part' is no component name"):
        anatomy_of_parts(nn.Linear(2, 2), {"a part": ["weight", "bias"]})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("head", (("head", None),)),
        ("layers[13].attn.q", (("layers", 13), ("attn", None), ("q", None))),
        ("layers[0].ffn.experts[7].down", (("layers", 0), ("ffn", None), ("experts", 7), ("down", None))),
    ],
)
def test_a_component_name_is_read_as_steps(name, path):
    assert parse_path(name) == path


@pytest.mark.parametrize("name", ["", "a b", "layers[]", "layers[-1]", "a..b", ".a", "a.", "layers[0]x", "3"])
def test_what_is_no_component_name_is_refused(name):
    with pytest.raises(AnatomyError, match="is no component name"):
        parse_path(name)


# --- the proof itself can fail --------------------------------------------------------------------------------------


@pytest.fixture
def gpt2_parts():
    anatomy = tiny.anatomy("gpt2")
    return list(anatomy.components), anatomy.tensors


def replaced(components, name, *slices):
    return tuple(dataclasses.replace(c, slices=slices) if c.name == name else c for c in components)


def test_a_partition_without_faults_passes(gpt2_parts):
    components, tensors = gpt2_parts
    check_partition(tuple(components), tensors)


def test_a_missing_slice_is_found_and_counted(gpt2_parts):
    components, tensors = gpt2_parts
    weight, _bias = tiny.anatomy("gpt2").component["layers[1].attn.k"].slices
    with pytest.raises(AnatomyError, match=r"h.1.attn.c_attn.bias \(96,\): 32 of 96 elements belong to no component"):
        check_partition(replaced(components, "layers[1].attn.k", weight), tensors)


def test_an_overlap_is_found_even_when_the_counts_add_up(gpt2_parts):
    components, tensors = gpt2_parts
    weight, bias = tiny.anatomy("gpt2").component["layers[1].attn.k"].slices
    one_too_low = Slice(bias.tensor, ((range(31, 63),),))
    with pytest.raises(AnatomyError, match=r"h.1.attn.c_attn.bias \(96,\): some elements belong to two components"):
        check_partition(replaced(components, "layers[1].attn.k", weight, one_too_low), tensors)


def test_an_overlap_beyond_the_whole_is_found(gpt2_parts):
    components, tensors = gpt2_parts
    twice = Component(name="again", slices=(whole("transformer.ln_f.bias", (32,)),))
    with pytest.raises(AnatomyError, match=r"ln_f.bias \(32,\): some elements belong to two components"):
        check_partition((*components, twice), tensors)


def test_a_slice_out_of_bounds_is_found_even_when_the_counts_add_up(gpt2_parts):
    components, tensors = gpt2_parts
    weight, bias = tiny.anatomy("gpt2").component["layers[1].attn.v"].slices
    beyond = Slice(bias.tensor, ((range(65, 97),),))
    with pytest.raises(AnatomyError, match=r"h.1.attn.c_attn.bias"):
        check_partition(replaced(components, "layers[1].attn.v", weight, beyond), tensors)


def test_a_slice_of_an_unknown_tensor_is_found(gpt2_parts):
    components, tensors = gpt2_parts
    ghost = Component(name="ghost", slices=(whole("nowhere", (2,)),))
    with pytest.raises(AnatomyError, match="component ghost names a tensor the model does not have: nowhere"):
        check_partition((*components, ghost), tensors)


def test_an_unnamed_tensor_is_found(gpt2_parts):
    components, tensors = gpt2_parts
    extra = TensorInfo(name="scale", shape=(), dtype="float32", kind="buffer")
    with pytest.raises(AnatomyError, match=r"scale \(\): 1 of 1 elements belong to no component"):
        check_partition(tuple(components), (*tensors, extra))


def test_a_slice_of_another_number_of_dimensions_is_found():
    flat = Component(name="a", slices=(whole("w", (4,)),))
    with pytest.raises(AnatomyError, match="w"):
        check_partition((flat,), (TensorInfo(name="w", shape=(2, 2), dtype="float32", kind="parameter"),))


def test_two_components_of_one_name_are_found():
    twins = tuple(Component(name="a", slices=(whole(tensor, (2,)),)) for tensor in "vw")
    tensors = tuple(TensorInfo(name=t, shape=(2,), dtype="float32", kind="parameter") for t in "vw")
    with pytest.raises(AnatomyError, match="a"):
        check_partition(twins, tensors)


def test_an_anatomy_that_is_no_partition_cannot_exist(gpt2_parts):
    components, tensors = gpt2_parts
    with pytest.raises(AnatomyError, match="do not partition the model"):
        Anatomy(model_type="gpt2", components=tuple(components[1:]), tensors=tensors)


# --- as plain data --------------------------------------------------------------------------------------------------


@every_family
def test_an_anatomy_survives_json(family):
    anatomy = tiny.anatomy(family)
    assert anatomy_from_json(json.loads(json.dumps(anatomy_to_json(anatomy)))) == anatomy


def test_an_anatomy_in_json_states_its_counts_and_ties():
    data = anatomy_to_json(tiny.anatomy("gpt2"))
    assert data["n_parameters"] == sum(c["n_elements"] for c in data["components"]) == 52_512
    assert data["ties"] == [{"component": "head", "tied_to": "embed"}]


def test_json_that_is_no_partition_is_refused():
    data = anatomy_to_json(tiny.anatomy("llama"))
    with pytest.raises(AnatomyError, match="do not partition"):
        anatomy_from_json(data | {"components": data["components"][:-1]})
