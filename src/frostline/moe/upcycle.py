"""A dense model → a mixture of experts that computes the same function, as a folder that plain transformers loads.

Every expert starts as the dense FFN, the router as small random numbers (never zero: ties would send every token to
the same experts); `fill.py` copies. At the end the folder is loaded again and its function measured against the dense
model's (`upcycle_check.py`). Read `upcycle` first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from frostline.anatomy import read_anatomy
from frostline.errors import ModelError
from frostline.grouped import use_own_experts
from frostline.model import load_config, load_model, load_tokenizer
from frostline.model_source import quiet_transformers
from frostline.moe.fill import Init, Start, filled
from frostline.moe.pairs import find_pair, target_config
from frostline.moe.sites import find_sites
from frostline.moe.upcycle_check import check_change, measure_change
from frostline.storage import appearing_whole

Top1 = Literal["preserve", "switch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycled:
    """What an upcycle made, and what it measured."""

    out: str
    dense: str
    """The model type it came from."""
    target: str
    experts: int
    top_k: int
    init: Init
    top1: Top1 | None
    """None where each token visits more than one expert."""
    layers: tuple[int, ...]
    """Layers that have experts."""
    n_dense: int
    """Parameters before."""
    n_parameters: int
    """Parameters now."""
    n_active: int
    """Parameters now that one token meets."""
    change: float
    """‖Δlogits‖₂/‖logits‖₂ in fp32 between the dense model and the written folder, on seeded random tokens."""
    promised: bool
    """Whether the function had to be preserved: copies whose weights sum to 1."""
    ffn_factor: float
    """By what the output of an FFN was multiplied, were its experts equal: mean over tokens and layers."""
    tokenizer: bool
    """Whether a tokenizer was found and copied."""
    notes: tuple[str, ...]
    """What to know before training."""


def upcycle(
    source: str,
    out: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    init: Init = "copy",
    noise: float = 0.01,
    drop: float = 0.5,
    router_std: float = 0.02,
    top1: Top1 = "preserve",
    layers: Sequence[int] | None = None,
    target: str | None = None,
    seed: int = 0,
) -> Upcycled:
    """Write a mixture of experts made from the dense model `source` into the folder `out`.

    `init`: experts as copies; as copies plus normal `noise` (in standard deviations of each tensor); or with the share
    `drop` of each expert's neurons drawn anew from the mean and deviation of those that they replace (drop-upcycling,
    arXiv 2502.19261). `top1`, for `top_k` 1: `preserve` normalises the one weight to 1, `switch` leaves it, and the
    function changes. `layers`: which get experts (0-based), where the target has a choice. Raises `ModelError` for an
    unknown pair, a model that does not fit, an `out` that is not empty, and a function that changed where it must not.
    """
    _check_numbers(experts, top_k, noise, drop, router_std)
    folder = _empty(out)
    config = load_config(source)
    pair = find_pair(config.model_type, target)
    normalised = top_k > 1 or top1 == "preserve"
    made = target_config(config, pair, experts=experts, top_k=top_k, normalised=normalised, layers=layers)
    dense = load_model(source).eval()
    start = Start(init=init, noise=noise, drop=drop, router_std=router_std, seed=seed)
    model = filled(dense, made, pair, start).to(getattr(config, "dtype", None) or torch.float32)
    size = _size_of(model)
    with appearing_whole(folder) as temporary:
        tokenizer = _save(model, dense, source, temporary)
        del model  # the folder's own is loaded next
        change, factor = measure_change(dense, temporary, seed=seed)
        promised = init == "copy" and normalised
        check_change(change, promised, pair)
        result = Upcycled(
            out=str(out),
            dense=pair.dense,
            target=pair.target,
            experts=experts,
            top_k=top_k,
            init=init,
            top1=top1 if top_k == 1 else None,
            layers=size.layers,
            n_dense=sum(p.numel() for p in dense.parameters()),
            n_parameters=size.n_parameters,
            n_active=size.n_parameters - size.n_in_experts * (experts - top_k) // experts,
            change=change,
            promised=promised,
            ffn_factor=factor,
            tokenizer=tokenizer,
            notes=tuple(_notes(init, top_k, top1, tokenizer)),
        )
        (temporary / "upcycle.json").write_text(json.dumps(upcycled_to_json(result), indent=1, ensure_ascii=False))
    return result


def mixture_of(dense: nn.Module, *, experts: int, top_k: int, seed: int = 0) -> nn.Module:
    """A mixture of experts in memory, in fp32, that computes what the dense model computes: experts are copies, their
    weights sum to 1. Raises `ModelError` for an unknown pair and for parts without a partner."""
    config: Any = dense.config
    pair = find_pair(config.model_type, None)
    made = target_config(config, pair, experts=experts, top_k=top_k, normalised=True, layers=None)
    model = filled(dense, made, pair, Start(init="copy", noise=0.01, drop=0.5, router_std=0.02, seed=seed))
    use_own_experts(model)
    return model


def upcycled_to_json(result: Upcycled) -> dict[str, Any]:
    """The record as plain data; it stands in the folder as `upcycle.json`."""
    return {"schema": 1, **asdict(result), "layers": list(result.layers), "notes": list(result.notes)}


def _check_numbers(experts: int, top_k: int, noise: float, drop: float, router_std: float) -> None:
    if experts < 2:
        raise ModelError(f"a mixture needs at least 2 experts, not {experts}")
    if not 1 <= top_k <= experts:
        raise ModelError(f"top_k must be between 1 and the number of experts ({experts}), not {top_k}")
    if not router_std > 0:
        raise ModelError(
            f"router_std must be above 0, not {router_std}: with a zero router every logit ties, all tokens go to the "
            "same experts and the others never learn"
        )
    if not noise > 0 or not 0 < drop <= 1:
        raise ModelError(f"noise must be above 0 (found {noise}), and drop above 0 and at most 1 (found {drop})")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    n_parameters: int
    n_in_experts: int
    layers: tuple[int, ...]
    """Layers that have experts."""


def _size_of(model: nn.Module) -> _Size:
    anatomy = read_anatomy(model)
    experts = (c for c in anatomy.components if any(name == "experts" for name, _ in c.path))
    return _Size(
        n_parameters=anatomy.n_parameters,
        n_in_experts=sum(map(anatomy.n_own_elements, experts)),
        layers=tuple(s.layer for s in find_sites(model, anatomy)),
    )


def _empty(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{out} exists and is not empty; an upcycle never overwrites: name another folder")
    return folder


def _save(model: nn.Module, dense: nn.Module, source: str, folder: Path) -> bool:
    """Write the model, its generation settings and its tokenizer; returns whether there was a tokenizer."""
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:
        tokenizer = None
    with quiet_transformers():
        if getattr(dense, "generation_config", None) is not None:
            model.generation_config = dense.generation_config
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return tokenizer is not None


def _notes(init: Init, top_k: int, top1: Top1, tokenizer: bool) -> Iterator[str]:
    if top_k == 1 and top1 == "preserve":
        yield (
            "each token's one weight is always 1, so the router gets no gradient from the language-model loss: only a "
            "balancing loss moves it"
        )
    elif init == "copy" and top_k > 1:
        yield (
            "all experts are equal at first, so the router gets no gradient from the language-model loss until they "
            "differ: give it a balancing loss, and let the experts learn"
        )
    if not tokenizer:
        yield "no tokenizer was found beside the dense model, so the folder has none"
