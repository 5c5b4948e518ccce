"""Which dense architectures have a mixture-of-experts architecture that computes the same function.

A pair says only how the target's configuration is made: fields that both configurations share are copied, the rest
stands here. Tensors are matched by the parts of both anatomies (`fill.py`), and every upcycle measures whether the
function is preserved. Read `PAIRS` first; `target_config` makes a configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from frostline.errors import ModelError, did_you_mean
from frostline.model_source import quiet_transformers

LayerFields = Callable[[Sequence[int], int], dict[str, Any] | None]
"""(layers that get experts, number of layers) → configuration fields; None when the target cannot have these layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """How a mixture-of-experts configuration names what an upcycle sets."""

    experts: str
    """The field with the number of experts."""
    top_k: str = "num_experts_per_tok"
    """The field with the experts that each token visits."""
    width: str | None = None
    """The field with an expert's neurons, where that is not `intermediate_size`."""
    shared_width: str | None = None
    """The field with the neurons of the expert that every token visits, where the target always has one."""
    normalise: str | None = None
    """The flag that makes the weights of the chosen experts sum to 1; None where they always do."""
    layers: LayerFields | None = None
    """Which layers can have experts; None: all of them or none."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that must have a value for the function to be preserved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A dense model type and a mixture-of-experts type that can compute its function."""

    dense: str
    target: str
    fields: Callable[[Any], dict[str, Any]] = lambda _config: {}
    """The dense configuration → fields of the target's that this pair needs beside the target's own."""


def _without(layers: Sequence[int], n_layers: int) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(n_layers) if i not in set(layers)]}


def _in_a_row(layers: Sequence[int], n_layers: int) -> dict[str, Any] | None:
    first, last = min(layers), max(layers)
    if sorted(layers) != list(range(first, last + 1)) or last >= n_layers:
        return None
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}


TARGETS: dict[str, Target] = {
    "mixtral": Target(experts="num_local_experts"),
    "qwen2_moe": Target(
        experts="num_experts",
        width="moe_intermediate_size",
        shared_width="shared_expert_intermediate_size",
        normalise="norm_topk_prob",
        layers=_without,
    ),
    "qwen3_moe": Target(
        experts="num_experts", width="moe_intermediate_size", normalise="norm_topk_prob", layers=_without
    ),
    "qwen3_5_moe_text": Target(
        experts="num_experts", width="moe_intermediate_size", shared_width="shared_expert_intermediate_size"
    ),
    "granitemoe": Target(experts="num_local_experts"),
    "granitemoeshared": Target(experts="num_local_experts", fixed={"shared_intermediate_size": 0}),
    "flex_olmo": Target(experts="num_experts", normalise="norm_topk_prob"),
    "ernie4_5_moe": Target(
        experts="moe_num_experts",
        top_k="moe_k",
        width="moe_intermediate_size",
        layers=_in_a_row,
        fixed={"moe_num_shared_experts": 0},
    ),
    "cohere2_moe": Target(
        experts="num_experts", fixed={"num_shared_experts": 0, "expert_selection_fn": "softmax"}
    ),
}  # fmt: skip
"""Mixture-of-experts type → how its configuration is made."""


def _granite_of_llama(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention_multiplier": head_dim**-0.5, "logits_scaling": 1.0}


def _no_bias(_config: Any) -> dict[str, Any]:
    return {"qkv_bias": False}


PAIRS: tuple[Pair, ...] = (
    Pair(dense="llama", target="mixtral"),
    Pair(dense="llama", target="qwen2_moe", fields=_no_bias),
    Pair(dense="llama", target="granitemoe", fields=_granite_of_llama),
    Pair(dense="mistral", target="mixtral"),
    Pair(dense="ministral", target="mixtral"),
    Pair(dense="ministral3", target="mixtral"),
    Pair(dense="internlm3", target="mixtral"),
    Pair(dense="qwen2", target="qwen2_moe"),
    Pair(dense="seed_oss", target="qwen2_moe"),
    Pair(dense="qwen3", target="qwen3_moe"),
    Pair(dense="qwen3_5_text", target="qwen3_5_moe_text"),
    Pair(dense="granite", target="granitemoe"),
    Pair(dense="granite", target="granitemoeshared"),
    Pair(dense="olmo2", target="flex_olmo"),
    Pair(dense="ernie4_5", target="ernie4_5_moe"),
    Pair(dense="helium", target="ernie4_5_moe"),
    Pair(dense="cohere2", target="cohere2_moe"),
)
"""Every pair that the tests confirm; the first of a dense type is what `upcycle` takes when no target is named."""

_NEVER_COPIED = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")


def known_pairs() -> str:
    """The pairs for people: `llama → mixtral, qwen2_moe; …`."""
    by_dense: dict[str, list[str]] = {}
    for pair in PAIRS:
        by_dense.setdefault(pair.dense, []).append(pair.target)
    return "; ".join(f"{dense} → {', '.join(targets)}" for dense, targets in by_dense.items())


def find_pair(dense: str, target: str | None) -> Pair:
    """The pair for a dense model type, and a target type if one is named. Raises `ModelError` with the known pairs."""
    of_dense = [p for p in PAIRS if p.dense == dense]
    found = [p for p in of_dense if target in (None, p.target)]
    if found:
        return found[0]
    if dense in {p.target for p in PAIRS}:
        raise ModelError(
            f"a '{dense}' model is a mixture of experts already; `frostline upcycle` makes one of a dense model"
        )
    near = did_you_mean(target or dense, [p.target if of_dense else p.dense for p in of_dense or PAIRS])
    what = f"'{dense}' into '{target}'" if target else f"a '{dense}' model"
    raise ModelError(f"no exact way is known to upcycle {what}.{near}\n  Known: {known_pairs()}")


def target_config(
    config: Any, pair: Pair, *, experts: int, top_k: int, normalised: bool, layers: Sequence[int] | None
) -> Any:
    """The target's configuration with every field that both types have. Raises `ModelError` for what it cannot be."""
    target, make = TARGETS[pair.target], CONFIG_MAPPING[pair.target]
    _check_windows(config, pair, make)
    known = {f.name for f in dataclasses.fields(make)}
    shared = {n: v for n, v in config.to_dict().items() if n in known and n not in _NEVER_COPIED}
    own: dict[str, Any] = {target.experts: experts, target.top_k: top_k, "output_router_logits": False}
    own |= {n: config.intermediate_size for n in (target.width, target.shared_width) if n}
    own |= _layer_fields(target, pair, layers, config.num_hidden_layers)
    if target.normalise:
        own[target.normalise] = normalised
    elif not normalised:
        others = sorted({p.target for p in PAIRS if p.dense == pair.dense and TARGETS[p.target].normalise})
        hint = f"name another target: {', '.join(others)}" if others else "no target of this model leaves them"
        raise ModelError(f"'{pair.target}' always normalises the weights of the chosen experts; for top-1 {hint}")
    with quiet_transformers():
        return make(**shared | own | dict(target.fixed) | pair.fields(config))


def _layer_fields(target: Target, pair: Pair, layers: Sequence[int] | None, n_layers: int) -> dict[str, Any]:
    chosen = list(range(n_layers)) if layers is None else list(layers)
    outside = [i for i in chosen if not 0 <= i < n_layers]
    if outside or not chosen or len(set(chosen)) != len(chosen):
        raise ModelError(f"layers {chosen}: name each once; there are {n_layers}, 0 to {n_layers - 1}")
    if target.layers is None:
        if len(chosen) < n_layers:
            raise ModelError(f"'{pair.target}' has experts in every layer; leave the choice of layers out")
        return {}
    fields = target.layers(sorted(chosen), n_layers)
    if fields is None:
        raise ModelError(f"'{pair.target}' can only have experts in layers that follow one another, not {chosen}")
    return fields


def _check_windows(config: Any, pair: Pair, make: Any) -> None:
    """Attention windows that differ by layer must have a place in the target: a short test text would not show it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1 and "layer_types" not in {f.name for f in dataclasses.fields(make)}:
        raise ModelError(
            f"this {pair.dense} has layers of different kinds ({', '.join(sorted(kinds))}), and '{pair.target}' has no "
            "choice by layer, so the function would change on long texts"
        )
