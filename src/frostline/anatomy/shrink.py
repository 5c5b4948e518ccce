"""A tiny configuration of the same architecture: every size small, every flag kept.

Roles are proved on a tiny model because they are a property of the configuration's flags, not of its sizes. Read
`tiny_config` first.
"""

from __future__ import annotations

import re
from typing import Any

N_LAYERS = 4

SIZES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"^attention_hidden_size$", 128),
        (r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim_model)$", 64),
        (r"(embedding_size|word_embed_proj_dim|backbone_hidden_size|lru_width)$", 64),
        (r"^(vocab_size|decoder_vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)$", 128),
        (r"^(intermediate_size_mlp|dense_intermediate_size|intermediate_size|ffn_dim|ffn_hidden_size)$", 96),
        (r"^(decoder_ffn_dim|encoder_ffn_dim|dff|dim_ff|d_inner|n_inner|feed_forward_size)$", 96),
        (r"^attention_head_dim$", 32),
        (r"^indexer_(n_heads|compress_ratio)$", 2),
        (r"^indexer_kv_heads$", 1),
        (r"^indexer_head_dim$", 16),
        (r"^indexer_budget$", 8),
        (r"(moe_intermediate_size|shared_intermediate_size|shared_experts?_intermediate_size)$", 32),
        (r"^(expert_ffn_hidden_size|moe_shared_expert_intermediate_size)$", 32),
        (r"^(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks)$", N_LAYERS),
        (r"^(num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads)$", 4),
        (r"^(attention_heads|swa_num_attention_heads|index_n_heads|linear_num_heads)$", 4),
        (r"^(num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups)$", 2),
        (r"^(head_dim|swa_head_dim|dim_head|d_head|attention_head_size|kv_channels|linear_head_dim)$", 16),
        (r"^(linear_key_head_dim|linear_value_head_dim|v_head_dim|index_head_dim|d_rel|d_kv)$", 16),
        (r"^(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)$", 8),
        (r"^qk_head_dim$", 16),
        (r"^q_lora_rank$", 24),
        (r"^kv_lora_rank$", 24),
        (r"^o_lora_rank$", 16),
        (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", 4),
        (r"^(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|top_k)$", 2),
        (r"^zero_expert_num$", 2),
        (r"^(n_group|num_expert_group|topk_group)$", 1),
        (r"^linear_num_key_heads$", 2),
        (r"^linear_num_value_heads$", 4),
        (r"^(mamba_n_heads|mamba_num_heads|n_mamba_heads)$", 4),
        (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 32),
        (r"^(mamba_d_state|state_size|ssm_state_size)$", 8),
        (r"^(mamba_dt_rank|time_step_rank)$", 4),
        (r"^mamba_d_ssm$", 128),
        (r"^(mamba_chunk_size|chunk_size)$", 8),
        (r"^(n_groups|mamba_n_groups)$", 1),
        (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)$", 256),
        (r"^(max_target_positions|max_source_positions)$", 256),
        (r"^(sliding_window|sliding_window_size|attention_window_size|window_size|local_attention)$", 8),
        (r"^attention_chunk_size$", 8),
        (r"^(hidden_size_per_layer_input|laurel_rank|index_topk|hc_lowrank|adapter_rank|gated_norm_rank)$", 8),
        (r"^router_hidden_size$", 16),
        (r"^first_k_dense_replace$", 1),
        (r"^global_attn_every_n_layers$", 2),
        (r"^num_kv_shared_layers$", 0),
        (r"^o_groups$", 2),
        (r"^original_max_position_embeddings$", 128),
    )
)
"""Field names of configurations → the tiny size; the first that matches counts."""

DEPTH = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers)$")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OF_THE_WHOLE = ("_name_or_path", "output_attentions")
"""Fields that `to_dict` gives parts of a configuration too; those of DBRX refuse them before transformers 5.20."""
PER_LAYER = re.compile(r"(layer_types|layers_block_type|layers_type|mlp_layer_types|block_types)$")
MAY_BE_DERIVED = ("num_key_value_heads", "head_dim", "intermediate_size")
"""Fields whose None means "derived from the full sizes": they are set all the same."""


def shrink_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with every known size made small; lists per layer are cut to the tiny depth."""
    depth = next((v for n, v in fields.items() if DEPTH.search(n) and isinstance(v, int)), None)
    small = {name: _shrunk(name, value, depth) for name, value in fields.items()}
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if "num_key_value_heads" in small and kv_heads in (None, heads):  # every query head has keys of its own
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "kv_lora_rank" in small and "qk_rope_head_dim" in small:  # latent attention: one KV head per query head
        small |= {n: v for n, v in (("num_key_value_heads", 4), ("head_dim", 8)) if n in small}
    if {"expand", "num_heads", "head_dim", "hidden_size"} <= set(small):  # Mamba-2: heads span the expanded width
        small["head_dim"] = small["expand"] * small["hidden_size"] // small["num_heads"]
    if {"mamba_d_ssm", "mamba_n_heads", "mamba_d_head"} <= set(small):
        small["mamba_d_head"] = small["mamba_d_ssm"] // small["mamba_n_heads"]
    if small.get("multi_query") is False and not small.get("new_decoder_architecture") and "num_kv_heads" in small:
        small["num_kv_heads"] = small["num_attention_heads"]  # Falcon: then every query head has keys of its own
    if "hybrid_layer_ids" in small and "layers_block_type" in small:
        small["hybrid_layer_ids"] = [i for i, kind in enumerate(small["layers_block_type"]) if kind == "hybrid"]
    if {"swa_head_dim", "qk_nope_head_dim"} <= set(small):  # one head width for latent and sliding-window layers
        small["head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def tiny_config(config: Any) -> Any:
    """A tiny configuration with the flags of `config`. Raises whatever the configuration class objects to."""
    fields = config.to_dict()
    small = shrink_fields(fields)
    for name in getattr(type(config), "sub_configs", {}):
        if isinstance(fields.get(name), dict):
            small[name] = {k: v for k, v in shrink_fields(fields[name]).items() if k not in OF_THE_WHOLE}
    for name in ("torch_dtype", "dtype"):
        small.pop(name, None)
    return type(config).from_dict(small)


def _shrunk(name: str, value: Any, depth: int | None) -> Any:
    if name in TOKENS:
        return TOKENS[name]
    if name == "attention_types":  # GPT-Neo: [[kinds], repeats]
        return [[kinds, N_LAYERS // len(kinds)] for kinds, _ in value[:1]]
    if name == "per_layer_config" and isinstance(value, dict):
        return {k: shrink_fields(v) for k, v in value.items() if int(k) < N_LAYERS}
    if isinstance(value, list) and (PER_LAYER.search(name) or len(value) == depth):
        return _shorter(value)
    if isinstance(value, bool) or not (isinstance(value, int) or (value is None and name in MAY_BE_DERIVED)):
        return value
    size = next((size for pattern, size in SIZES if pattern.search(name)), None)
    if size is None:
        return value
    return size if value is None else min(value, size)


def _shorter(kinds: list[Any]) -> list[Any]:
    """`N_LAYERS` of the entries per layer; kinds of layers so that each occurs, in order of first appearance."""
    distinct = list(dict.fromkeys(k for k in kinds if isinstance(k, str)))
    return (distinct * N_LAYERS)[:N_LAYERS] if distinct else kinds[:N_LAYERS]
