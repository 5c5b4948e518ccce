"""Every causal model type of the installed transformers, in a tiny size; and which are not decoder-only text models."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from frostline.anatomy.shrink import shrink_fields, tiny_config

ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
)  # fmt: skip
"""Encoders with a language-model head."""

DECODER_HALVES = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
    "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
)  # fmt: skip
"""The decoder of an encoder-decoder model."""

COMPOSITES = (
    "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4",
    "mllama", "moshi", "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
)  # fmt: skip
"""Several models in one: vision, audio and text."""

DRAFTS = ("gemma4_assistant", "gemma4_unified_assistant", "blt")
"""Draft heads of another model, and a model on bytes with patches."""

OTHERS = {*ENCODERS, *DECODER_HALVES, *COMPOSITES, *DRAFTS}
DECODERS = tuple(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in OTHERS)
"""Every decoder-only text type, those of a newer transformers included."""

REFUSED = {
    **dict.fromkeys(
        (t for t in ENCODERS if t not in ("reformer", "xlm", "xlnet")),
        "BERT-style blocks: the FFN is two modules, the second with norm and residual inside",
    ),
    "xlm": "attention, FFN and norms stand in parallel lists, not in blocks",
    "git": "BERT-style blocks in a composite",
    "blt": "cross-attention between byte and patch models",
    "prophetnet": "encoder blocks beside the decoder's are not told apart",
}
"""Type outside `DECODERS` → why its anatomy is refused."""

UNBUILDABLE = {
    "dots3_note": "its sub-configuration differs by layer, in sizes that must agree",
    "gemma3n": "needs the timm package",
    "gemma4_assistant": "a draft head whose configuration is checked against its main model's",
    "gemma4_unified_assistant": "a draft head whose configuration is checked against its main model's",
    "musicgen": "transformers cannot build it from its own configuration",
    "musicgen_melody": "transformers cannot build it from its own configuration",
    "qwen4_exp": "its default configuration lacks sizes that its model reads",
    "reformer": "its default configuration is an encoder's",
}
"""Type outside `DECODERS` → why no tiny model of it is built here."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "num_dense_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "shared_expert_intermediate_size": 32,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "zamba": {"use_mamba_kernels": False},  # 5.14 does not run without kernels otherwise; later it says nothing
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip
"""Fields that a type's default configuration needs so that it can be built at all, or shows its kinds in few layers."""


def small_config(model_type: str) -> Any:
    """A tiny configuration of a type, from its default one."""
    if model_type == "dbrx":  # its default attention configuration lacks a field that its model reads
        config = CONFIG_MAPPING["dbrx"]()
        config.attn_config.rope_theta, config.attn_config.clip_qkv = 1e4, 8
        small = tiny_config(config)
        small.attn_config.rope_theta = 1e4
        return small
    if model_type == "dots3_note_text":  # its layers differ in sizes that must agree with each other
        make = CONFIG_MAPPING[model_type]
        defaults = {f.name: f.default for f in dataclasses.fields(make) if f.default is not dataclasses.MISSING}
        known = {n: v for n, v in shrink_fields(defaults).items() if isinstance(v, int) and v != defaults[n]}
        return make(**known | {"num_key_value_heads": 4, "head_dim": 16})
    return tiny_config(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})))


def small_model(model_type: str) -> Any:
    """A tiny model of a type on the device that is the default."""
    return AutoModelForCausalLM.from_config(small_config(model_type))
