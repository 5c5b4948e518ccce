"""Every decoder-only text type of the installed transformers: a complete anatomy, and its roles proved."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

import all_types
import pytest
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from versions import skip_unknown

from frostline.anatomy import Anatomy, embedding_dropout, find_blocks, prove, prove_model, read_anatomy
from frostline.errors import AnatomyError
from frostline.selection import GROUPS, select

pytestmark = pytest.mark.filterwarnings("ignore")  # what models of 136 architectures warn about is not ours


def on_meta(model_type: str) -> nn.Module:
    config = all_types.small_config(model_type)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@lru_cache(maxsize=200)
def anatomy_of(model_type: str) -> Anatomy:
    return read_anatomy(on_meta(model_type))


def test_there_are_as_many_decoder_types_as_expected() -> None:
    assert len(all_types.DECODERS) >= 100


@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_every_parameter_and_buffer_belongs_to_exactly_one_part(model_type: str) -> None:
    model = on_meta(model_type)
    anatomy = read_anatomy(model)
    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    counted: dict[str, int] = dict.fromkeys(names, 0)
    for component in anatomy.components:
        for s in component.slices:
            counted[s.tensor] += s.n_elements
    assert counted == {n: t.numel() for n, t in names.items()}
    assert anatomy.n_parameters == sum(p.numel() for p in model.parameters())
    assert not {name for c in anatomy.components for name, _ in c.path} & set(GROUPS), "a part hides a group"
    assert all(c.slices for c in anatomy.components)


@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_names_agree_with_what_a_tiny_model_does(model_type: str) -> None:
    torch.manual_seed(0)
    proof = prove_model(all_types.small_model(model_type))
    assert not proof.disagreements
    kinds = {b.split("[")[0] for block in proof.blocks for b in block.mixes_tokens}
    assert kinds & {"attn", "linear_attn", "ssm", "conv"}, "no branch that mixes tokens was measured"


WITH_DROPOUT = ("codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "openai-gpt", "phi")


@pytest.mark.parametrize(
    "model_type",
    [t if t in WITH_DROPOUT else pytest.param(t, marks=pytest.mark.slow) for t in all_types.DECODERS],
)
def test_dropout_beside_the_blocks_is_the_embeddings(model_type: str) -> None:
    """Each is called before the first block; dropout elsewhere is in a block, or in a part with parameters."""
    model = all_types.small_model(model_type)
    found, calls = embedding_dropout(model), []
    blocks = [b for _, b in find_blocks(model)]
    parts = [
        m for m in model.modules() if any(True for _ in m.parameters()) and not any(b in m.modules() for b in blocks)
    ]
    inside = {m for part in [*parts, *blocks] for m in part.modules()}
    assert set(found) == {m for m in model.modules() if isinstance(m, _DropoutNd)} - inside
    assert bool(found) == (model_type in (*WITH_DROPOUT, "gpt-sw3"))
    if not found:
        return
    for m in found:
        m.register_forward_hook(lambda *_: calls.append("dropout"))
    blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    model(input_ids=torch.randint(3, 60, (2, 8)))
    assert calls == ["dropout"] * len(found) + ["block"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "opt", "gemma2", "deepseek_v3"])
def test_ffn_means_the_ffn_whatever_the_tensors_are_called(model_type: str) -> None:
    anatomy = anatomy_of(model_type)
    taken = {s.tensor for s in select(anatomy, "ffn").slices}
    expected = re.compile(r"\.(mlp|fc1|fc2)\.")
    assert taken == {t.name for t in anatomy.tensors if t.kind == "parameter" and expected.search(t.name)}
    attention = {s.tensor for s in select(anatomy, "attn").slices}
    assert attention == {
        t.name
        for t in anatomy.tensors
        if t.kind == "parameter" and re.search(r"\.(self_attn|attn|attention|self_attention)\.", t.name)
    }


TOPOLOGIES = {
    "llama": ("sequential", "pre-norm"),
    "gpt2": ("sequential", "pre-norm"),
    "gptj": ("parallel", "pre-norm"),
    "cohere": ("parallel", "pre-norm"),
    "gpt_neox": ("parallel", "pre-norm"),
    "gemma2": ("sequential", "sandwich"),
    "glm4": ("sequential", "sandwich"),
    "olmo2": ("sequential", "post-norm"),
    "openai-gpt": ("sequential", "norm of the sum"),
    "mamba": ("single branch", "pre-norm"),
}


@pytest.mark.parametrize("model_type", TOPOLOGIES)
def test_topology_is_measured(model_type: str) -> None:
    torch.manual_seed(0)
    block = prove_model(all_types.small_model(model_type)).blocks[1]
    assert (block.topology, block.placement) == TOPOLOGIES[model_type]


def test_topology_is_a_property_of_the_configuration_not_of_the_type() -> None:
    for flags, expected in (
        ({"use_parallel_residual": True}, "parallel"),
        ({"use_parallel_residual": False}, "sequential"),
    ):
        config = CONFIG_MAPPING["gpt_neox"](**flags)
        assert {b.topology for b in prove(config).blocks} == {expected}
    assert {b.topology for b in prove(CONFIG_MAPPING["stablelm"](use_parallel_residual=True)).blocks} == {"parallel"}


def test_the_residual_scale_is_measured() -> None:
    proof = prove(CONFIG_MAPPING["granite"](residual_multiplier=0.3))
    assert proof.blocks[0].residual_scale == {"stream": 1.0, "attn": 0.3, "ffn": 0.3}


def test_modules_that_hold_the_residual_are_found() -> None:
    assert prove(CONFIG_MAPPING["bloom"]()).blocks[0].residual_inside == {"attn": "residual", "ffn": "residual"}
    assert prove(CONFIG_MAPPING["mpt"]()).blocks[0].residual_inside == {"ffn": "residual"}
    assert prove(CONFIG_MAPPING["llama"]()).blocks[0].residual_inside == {}


def test_the_same_norm_name_means_what_it_feeds() -> None:
    llama, olmo2 = (prove(CONFIG_MAPPING[t]()) for t in ("llama", "olmo2"))
    assert llama.blocks[0].feeds["ffn_norm"] == ("ffn",)
    assert olmo2.blocks[0].follows == {"attn_post_norm": "attn", "ffn_post_norm": "ffn"}
    tensor = "post_attention_layernorm.weight"
    names = {
        t: next(c.name for c in anatomy_of(t).components if c.slices[0].tensor.endswith(tensor))
        for t in ("llama", "olmo2")
    }
    assert names == {"llama": "layers[0].ffn_norm", "olmo2": "layers[0].attn_post_norm"}


def test_layers_without_attention_or_ffn_are_counted_as_such() -> None:
    hybrid = anatomy_of("jamba")
    assert set(select(hybrid, "attn").layers) | set(select(hybrid, "ssm").layers) == set(range(hybrid.n_layers))
    assert not set(select(hybrid, "attn").layers) & set(select(hybrid, "ssm").layers)
    assert select(anatomy_of("mamba"), "mixer").n_elements == select(anatomy_of("mamba"), "ssm").n_elements


@pytest.mark.parametrize("model_type", sorted(t for t in all_types.OTHERS if t not in all_types.UNBUILDABLE))
def test_other_types_have_a_complete_anatomy_or_a_listed_reason_for_none(model_type: str) -> None:
    skip_unknown(model_type)
    model = on_meta(model_type)
    if model_type in all_types.REFUSED:
        with pytest.raises(AnatomyError, match=r"not understood|no list of blocks"):
            read_anatomy(model)
        return
    anatomy = read_anatomy(model)
    assert anatomy.n_parameters == sum(p.numel() for p in model.parameters())
    if model_type in all_types.COMPOSITES:
        other = {c.name for c in anatomy.components if c.path[0][0] == "other"}
        taken = {c.name for c, _ in select(anatomy, "all", ties="together").by_component()}
        assert not other & taken, "what is no part of the decoder must stay frozen by default"


NO_DEFAULT = ("dbrx", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")
"""Types of which transformers cannot build its own default configuration; tiny ones are tested above."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in all_types.DECODERS if t not in NO_DEFAULT])
def test_default_configurations_have_a_complete_anatomy(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**all_types.DEFAULTS.get(model_type, {})))
    anatomy = read_anatomy(model)
    assert anatomy.n_parameters == sum(p.numel() for p in model.parameters())
