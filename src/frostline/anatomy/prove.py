"""Roles proved, not believed: what a tiny model's own numbers say about its blocks, against what its names said.

For every block: does a branch mix tokens (does its output at t depend on its input before t), which norm's output is a
branch's input and which norm takes a branch's output, and how the block adds its branches to the residual stream. A
disagreement with the anatomy is an `AnatomyError` with both sides. Read `prove` first; `block_capture.py` watches a
block, `block_measures.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.anatomy import families
from frostline.anatomy.block_capture import capture, kind_of, shared_names
from frostline.anatomy.block_measures import BlockProof, measure_block
from frostline.anatomy.read import read_anatomy
from frostline.anatomy.shrink import tiny_config
from frostline.anatomy.slice_proof import SliceProof, prove_slices
from frostline.errors import AnatomyError, first_line
from frostline.older import mend

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 4096}
"""A model of at most these sizes is probed as it is."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The proof of one architecture, made on a tiny model with its flags."""

    model_type: str
    blocks: tuple[BlockProof, ...]
    disagreements: tuple[str, ...] = ()
    """Where structure and measurement differ, both sides named."""
    exceptions: tuple[str, ...] = field(default=())
    """Differences that are known and true of the architecture (an RWKV channel mix does look at the token before)."""
    slices: SliceProof | None = None
    """What was measured below the tensors; None where only `prove_model` ran."""


TRUE_EXCEPTIONS = {("rwkv", "ffn"): "its channel mix looks at the token before (token shift)"}


def prove(config: Any, *, seed: int = 0) -> Proof:
    """Build a tiny model with the flags of `config` and prove its anatomy. Raises `AnatomyError`.

    The error says why no tiny model could be built or run, or lists every disagreement with both sides.
    """
    model = tiny_model(config, seed=seed)
    proof = prove_model(model)
    slices = prove_slices(model, read_anatomy(model), seed=seed)
    wrong = (*proof.disagreements, *slices.disagreements)
    if wrong:
        raise AnatomyError(f"{proof.model_type}: structure and measurement disagree:\n  " + "\n  ".join(wrong))
    return replace(proof, slices=slices)


def tiny_model(config: Any, *, seed: int = 0) -> nn.Module:
    """A model in fp32 with the flags of `config`, small enough to probe. Raises `AnatomyError`."""
    try:
        small = deepcopy(config) if _is_small(config) else tiny_config(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    except Exception as error:  # configuration classes and constructors raise anything
        raise AnatomyError(
            f"{config.model_type}: no tiny model can be built to prove it on: {first_line(error)}"
        ) from error
    assert isinstance(model, nn.Module)
    mend(model)
    return model


def _is_small(config: Any) -> bool:
    """Whether a model of `config` is small enough to probe as it is."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in SMALL]
    return all(isinstance(n, int) and n <= most for n, most in zip(sizes, SMALL.values(), strict=True))


def prove_model(model: nn.Module, *, seed: int = 0) -> Proof:
    """Prove the anatomy of a model small enough to run; its norms' weights are changed at random."""
    anatomy = read_anatomy(model)
    model.eval()
    _randomise_vectors(model, seed)
    blocks = tuple(measure_block(layer, trace) for layer, trace in enumerate(capture(model, anatomy, seed)))
    found = [d for block in blocks for d in _disagreements(block)]
    for layer in range(anatomy.n_layers):
        found += [f"layers[{layer}].{n}: two norms have this name" for n in shared_names(model, anatomy, layer)]
    known = [f"{d} — {reason}" for d in found if (reason := _known(anatomy.model_type, d))]
    return Proof(
        model_type=anatomy.model_type,
        blocks=blocks,
        disagreements=tuple(d for d in found if not _known(anatomy.model_type, d)),
        exceptions=tuple(known),
    )


def _known(model_type: str, disagreement: str) -> str | None:
    return next(
        (r for (t, part), r in TRUE_EXCEPTIONS.items() if t == model_type and f".{part}:" in disagreement), None
    )


def _randomise_vectors(model: nn.Module, seed: int) -> None:
    """Give one-dimensional parameters distinct values: all-ones norms and zero biases would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 and p.numel() > 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))


def _disagreements(block: BlockProof) -> Iterator[str]:
    at = f"layers[{block.layer}]"
    for branch, mixes in block.mixes_tokens.items():
        should = kind_of(branch) in families.MIXERS
        if mixes != should:
            said = "mixes tokens" if should else "treats every token alone"
            was = "mixes tokens" if mixes else "treats every token alone"
            yield f"{at}.{branch}: its name says it {said}, measured: it {was}"
    for norm, branches in block.feeds.items():
        expected = _fed_by_name(norm, block)
        if expected is not None and set(map(kind_of, branches)) != expected:
            yield f"{at}.{norm}: its name says it feeds {_listed(expected)}, measured: it feeds {_listed(branches)}"
    for norm, branch in block.follows.items():
        if not norm.startswith(f"{kind_of(branch)}_post") and not norm.startswith("mixer_post"):
            yield f"{at}.{norm}: by its name it does not follow {branch}, measured: its input is {branch}'s output"


def _fed_by_name(norm: str, block: BlockProof) -> set[str] | None:
    """The kinds of branches that a norm's name says it feeds; None when its name says nothing."""
    stem = kind_of(norm)
    mixers = {kind_of(b) for b in block.mixes_tokens} & set(families.MIXERS)
    if stem == "shared_norm":
        return {*mixers, "ffn"}
    if stem == "mixer_norm":
        return mixers
    if stem.endswith("_post_norm"):
        return set()
    target = stem.removesuffix("_norm")
    return {target} if target in (*families.MIXERS, "ffn") else None


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
