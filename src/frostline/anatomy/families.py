"""What structure alone cannot tell: what the modules of a block are called in transformers.

Attribute and class names stand here; model types only where a name means the opposite of what it means elsewhere.
`read.py` uses the tables, `prove.py` measures whether they are right. Read `branch_kind` first.
"""

from __future__ import annotations

import re

NORM_CLASS = re.compile(r"norm(gated|1p)?$", re.IGNORECASE)
"""At the end only: a model may have a norm in its name (RoBERTa-PreLayerNorm)."""

CROSS_ATTENTION = re.compile(r"cross|encoder_attn")
"""Attributes of attention to another sequence."""

TOWERS = re.compile(r"vision|visual|image|audio|speech|embed_tokens_extend")
"""Attributes of the parts of a composite that are not its decoder."""

ATTENTION_CLASS = re.compile(r"Attention$|Attention(?=[A-Z_]|\d)|Attn|MLA$")

BRANCH_CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("residual", re.compile(r"HyperConnection|ResidualScal|GatedResidual|AttentionResidual|AltUp|Laurel")),
    ("container", re.compile(r"DecoderLayer$|AttentionBlock$|FFNBlock$")),
    (
        "linear_attn",
        re.compile(r"(?<!Kimi)Linear.*Attention|Lightning|Delta(Net|Attention|Rule)|RwkvSelfAttention|xLSTMLayer|KDA"),
    ),
    ("ssm", re.compile(r"Mamba|RecurrentBlock|SSM|Mixer$")),
    ("conv", re.compile(r"ShortConv")),
    ("attn", ATTENTION_CLASS),
    ("ffn", re.compile(r"MLP|Mlp|FeedForward|FFN|MoE|Moe$|Moe(?=[A-Z_])|MOE|Experts?$")),
)
"""Kind of branch → class names that are of that kind, in the order they are tried (a class of Mamba's own norm or of
an attention *layer* is caught before)."""

MIXERS = ("attn", "linear_attn", "ssm", "conv")
"""Branches that mix tokens."""

BLOCK_LINEARS: dict[str, str] = {"fc1": "ffn.up", "fc2": "ffn.down"}
"""Linear layers that stand directly in a block → their part (OPT, XGLM, BioGPT)."""

ATTENTION_PARTS: dict[str, str] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "c_proj": "o", "dense": "o",
    "Wq": "q", "Wk": "k", "Wv": "v", "q": "q", "k": "k", "v": "v", "project_q": "q", "project_k": "k",
    "project_v": "v", "attention_out": "o", "dense_bias": "o",
    "Wo": "o", "gate_proj": "gate", "g_proj": "gate",
    "c_attn": "qkv", "qkv_proj": "qkv", "query_key_value": "qkv", "Wqkv": "qkv", "q_attn": "q",
    "q_a_proj": "q.a", "q_a_layernorm": "q.a_norm", "q_a_norm": "q.a_norm", "q_b_proj": "q.b", "q_gate_proj": "q.b",
    "kv_a_proj_with_mqa": "kv.a", "kv_a_layernorm": "kv.a_norm", "kv_b_proj": "kv.b", "kv_proj": "kv",
    "o_a_proj": "o.a", "o_b_proj": "o.b", "v_proj_current": "v.current", "v_proj_delayed": "v.delayed",
    "k_sconv": "k.conv", "v_sconv": "v.conv", "q_l2_clip": "q.clip",
    "conv_qk_depthwise": "qk_depthwise", "conv_qk_grouped": "qk_grouped",
    "q_norm": "q_norm", "k_norm": "k_norm", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
    "query_layernorm": "q_norm", "key_layernorm": "k_norm", "attn_sub_norm": "o_norm",
}  # fmt: skip
"""Attribute of an attention module → part of `attn`; other attributes keep their own name."""

ATTENTION_EXPERT_PARTS: dict[str, str] = {
    "input_linear": "q", "output_linear": "o", "bias": "o", "router": "mixture_router"
}  # fmt: skip
"""Attribute of a mixture of attention heads (JetMoE) → part of `attn`."""

PACKED: dict[str, str] = {
    "c_attn": "consecutive", "qkv_proj": "consecutive", "Wqkv": "consecutive", "query_key_value": "grouped",
    "kv_a_proj_with_mqa": "latent kv", "kv_b_proj": "kv from latent",
    "q_proj": "query and gate", "q_gate_proj": "low-rank query and gate",
    "conv_qk_depthwise": "convolved query and key", "conv_qk_grouped": "convolved query and key",
}  # fmt: skip
"""Attribute of an attention projection → how its outputs may be packed (`layouts.py`); sizes that do not fit mean it
is not."""

PACKED_BY_TYPE: dict[tuple[str, str], str] = {
    ("codegen", "qkv_proj"): "four blocks",
    ("gpt_bigcode", "c_attn"): "grouped",
    ("jetmoe", "kv_proj"): "key and value",
    ("minimax", "qkv_proj"): "grouped",
}
"""(model type, attribute) → the same, where an attribute is packed otherwise than everywhere."""

NO_HEADS: dict[str, str] = {
    "doge": "the values of all heads make the mask of each",
    "diffllama": "the outputs of two heads are subtracted from each other before they reach their columns",
    "zaya": "queries and keys are added to each other",
    "inkling_text": "relative positions and convolutions belong to heads in tensors of their own",
    "inkling2_text": "relative positions and convolutions belong to heads in tensors of their own",
}
"""Model type → why its attention does not divide into heads by rows and columns."""

ATTENTION_HELPERS = ("indexer", "compressor")
"""Attributes of attention modules that choose or condense what is attended to: a part of their own in `attn`."""

EXPERT_TENSORS: dict[str, str] = {
    "gate_up_proj": "gate_up", "gate_up_proj_bias": "gate_up", "up_proj": "up", "up_proj_bias": "up",
    "down_proj": "down", "down_proj_bias": "down", "input_linear.weight": "gate_up", "output_linear.weight": "down",
}  # fmt: skip
"""Tensor that holds a part of every expert, by its name below the experts' module → the part."""

FFN_PARTS: dict[str, str] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "c_fc": "up", "c_proj": "down", "fc1": "up",
    "fc2": "down", "fc_in": "up", "fc_out": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    "w1": "gate", "w3": "up", "w2": "down", "proj_up_gate": "gate", "proj_up": "up", "proj_down": "down",
    "w_0": "gate", "w_1": "up", "w_out": "down", "gate_up_proj": "gate_up", "Wi": "gate_up", "Wo": "down",
    "input_linear": "gate_up", "output_linear": "down", "ffn_sub_norm": "down_norm",
}  # fmt: skip
"""Attribute of an FFN module → part of `ffn`; other attributes keep their own name."""

ROUTERS = ("gate", "router", "wg")
"""Attributes of a mixture-of-experts module that hold the router."""

EXPERTS = ("experts",)
"""Attributes of a mixture-of-experts module that hold the experts."""

ROUTER_BUFFERS = ("e_score_correction_bias", "expert_bias")
"""Tensors directly in a mixture-of-experts module that belong to the router's choice."""

SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
"""Attributes of a mixture-of-experts module or block that hold the expert every token visits."""

LINEAR_ATTENTION_PARTS = {
    n: r
    for n, r in ATTENTION_PARTS.items()
    if n in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q", "k", "v", "qkv_proj")
}
"""Attribute of a linear-attention module → part of `linear_attn`."""

RESERVED: dict[str, str] = {
    "norm": "inner_norm",
    "bias": "own_bias",
    "all": "all_",
    "mixer": "mixer_",
}
"""Own names that would hide a group or a part of the field's → what they are called instead."""

MASKS = ("bias", "masked_bias", "causal_mask", "mask")
"""Buffers with these names hold a causal mask."""

ADAPTERS = re.compile(r"\.(lora_\w+|ia3_\w+|adapter_\w+|modules_to_save|prompt_encoder|trainable_tokens_\w+)\.")
"""Tensors that PEFT puts beside the base weights."""

RESIDUAL_ATTRIBUTES = re.compile(
    r"^(altup|hc_|hyper_connection|per_layer|embed_tokens_per_layer|final_input|input_hidden_states|normalizer|embed_scale)"
)
"""Attributes of a decoder, outside its blocks, that act on the residual stream."""

PRE_MIXER = ("input_layernorm", "ln_1", "ln1", "attention_layernorm", "self_attn_layer_norm", "operator_norm",
             "temporal_pre_norm", "norm_mlstm", "norm_1", "layernorm1", "layernorm_before_attention", "norm",
             "attn_norm")  # fmt: skip
PRE_FFN = ("ln_2", "ln2", "feedforward_layernorm", "final_layer_norm", "ffn_norm", "channel_pre_norm", "norm_ffn",
           "norm_2", "layernorm2", "pre_ff_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "mlp_norm",
           "layernorm_before_ffn")  # fmt: skip
POST_MIXER = ("post_self_attn_layernorm", "post_operator_norm", "post_norm1")
POST_FFN = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm", "post_norm2")
AMBIGUOUS = ("post_attention_layernorm",)
"""Before the FFN in most models; after attention where the block has another norm for the place before the FFN, or has
norms after its branches and none for the place after attention."""

NORMS_BY_TYPE: dict[tuple[str, str], str] = {
    ("openai-gpt", "ln_1"): "ffn_norm",
    ("openai-gpt", "ln_2"): "block_norm",
}
"""(model type, attribute) → name, where an attribute means something else than everywhere: the norm of a sum that both
the next branch and the residual stream go on from."""


def branch_kind(class_name: str) -> str | None:
    """What a block's child of that class is: a kind in `BRANCH_CLASSES`, or None."""
    return next((kind for kind, pattern in BRANCH_CLASSES if pattern.search(class_name)), None)


def norm_role(name: str, siblings: set[str]) -> str | None:
    """`pre_mixer`, `pre_ffn`, `post_mixer` or `post_ffn` for a block's norm; None when the table does not know it."""
    if name in AMBIGUOUS:
        if siblings & {*PRE_FFN} or (siblings & {*POST_FFN} and not siblings & {*POST_MIXER}):
            return "post_mixer"
        return "pre_ffn"
    roles = {"pre_mixer": PRE_MIXER, "pre_ffn": PRE_FFN, "post_mixer": POST_MIXER, "post_ffn": POST_FFN}
    return next((r for r, names in roles.items() if name in names), None)
