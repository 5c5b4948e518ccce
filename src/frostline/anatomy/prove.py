"""Roles proved, not believed: what a tiny model's own numbers say about its blocks, against what its names said.

For every block: does a branch mix tokens (does its output at t depend on its input before t), which norm's output is a
branch's input and which norm takes a branch's output, and how the block adds its branches to the residual stream. A
disagreement with the anatomy is an `AnatomyError` with both sides. Read `prove` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.anatomy import families
from frostline.anatomy.blocks import BlockReader
from frostline.anatomy.component import Anatomy, Component
from frostline.anatomy.modules import module_of
from frostline.anatomy.read import find_blocks, read_anatomy
from frostline.anatomy.shrink import tiny_config
from frostline.anatomy.slice_proof import SliceProof, prove_slices
from frostline.errors import AnatomyError

N_TOKENS = 12
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 4096}
"""A model of at most these sizes is probed as it is."""
FIT = 1e-5
"""Relative residual below which a least-squares fit of a block's output counts as exact (fp32)."""

Topology = Literal["sequential", "parallel", "single branch", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockProof:
    """What was measured in one block."""

    layer: int
    mixes_tokens: dict[str, bool]
    """Branch → whether its output at a position depends on its input at earlier ones."""
    feeds: dict[str, tuple[str, ...]]
    """Norm → branches whose input is its output."""
    follows: dict[str, str]
    """Norm → branch whose output is its input."""
    topology: Topology
    """How the FFN's input relates to the mixer's output; `other` where neither form fits."""
    placement: str
    """Where the norms stand: `pre-norm`, `post-norm`, `sandwich`, or `unknown`."""
    residual_scale: dict[str, float]
    """`stream` and branches → the factors with which they add up to the block's output; empty where no fit is exact."""
    residual_inside: dict[str, str]
    """Branch whose module adds the residual itself (a stop at its output would cut the highway) → the argument that
    it adds."""
    order: tuple[str, ...]
    """Branches and norms in the order of their calls."""


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
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AnatomyError(f"{config.model_type}: no tiny model can be built to prove it on: {first}") from error
    assert isinstance(model, nn.Module)
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
    traces = _trace(model, anatomy, seed)
    blocks = tuple(_block_proof(layer, trace) for layer, trace in enumerate(traces))
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


@dataclass(slots=True)
class _Call:
    """One call of a module: the tensor that went in, the tensor that came out."""

    given: torch.Tensor
    returned: torch.Tensor
    others: dict[str, torch.Tensor]
    """Further floating-point tensors that went in, by argument, each as a tensor of its own in the graph."""


@dataclass(slots=True)
class _Trace:
    """The calls inside one block, by part."""

    block: _Call | None = None
    parts: dict[str, _Call] = field(default_factory=dict)


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


def part_modules(model: nn.Module, anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    """Branches and norms of one layer that are a module of their own, by the first step of their name."""
    blocks = find_blocks(model)
    reader = BlockReader("", blocks[layer][0], blocks[layer][1], anatomy.tensors, anatomy.model_type)
    out = reader.norm_modules()
    whole_blocks = {id(m) for _, m in blocks}
    for name in dict.fromkeys(_part_name(c) for c in _components(anatomy, layer)):
        if name.split("[")[0] in (*families.MIXERS, "ffn") or name.split("[")[0].endswith("norm"):
            module = module_of(model, anatomy, f"layers[{layer}].{name}")
            if id(module) not in whole_blocks and not isinstance(module, nn.ModuleList):
                out[name] = module
    return out


def shared_names(model: nn.Module, anatomy: Anatomy, layer: int) -> list[str]:
    """Norms of a layer whose one name stands for two modules: then one of them is named wrongly."""
    names = {_part_name(c) for c in _components(anatomy, layer)}
    blocks = {id(m) for _, m in find_blocks(model)}
    norms = sorted(n for n in names if n.endswith("norm"))
    return [n for n in norms if id(module_of(model, anatomy, f"layers[{layer}].{n}")) in blocks]


def _components(anatomy: Anatomy, layer: int) -> Iterator[Component]:
    return (c for c in anatomy.components if c.path[0] == ("layers", layer))


def _part_name(component: Component) -> str:
    name, index = component.path[1]
    return name if index is None else f"{name}[{index}]"


def _trace(model: nn.Module, anatomy: Anatomy, seed: int) -> list[_Trace]:
    """One forward pass with every block's parts watched; the graph is kept for the probes."""
    traces = [_Trace() for _ in range(anatomy.n_layers)]
    blocks = [m for _, m in find_blocks(model)]
    with _watching(model, anatomy, blocks, traces):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = torch.randint(3, vocabulary, (1, N_TOKENS), generator=generator)
        model.zero_grad(set_to_none=True)
        try:
            model(input_ids=ids, use_cache=False)
        except Exception as error:  # models raise anything when a tiny size does not suit them
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise AnatomyError(
                f"{anatomy.model_type}: the tiny model does not run, so nothing is proved: {first}"
            ) from error
    return traces


@contextmanager
def _watching(model: nn.Module, anatomy: Anatomy, blocks: list[nn.Module], traces: list[_Trace]) -> Iterator[None]:
    hooks = []
    for layer, (block, trace) in enumerate(zip(blocks, traces, strict=True)):
        for name, module in ((None, block), *part_modules(model, anatomy, layer).items()):
            hooks.append(module.register_forward_pre_hook(_separate, with_kwargs=True))
            hooks.append(module.register_forward_hook(_recorder(trace, name), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_data(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _separate(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every tensor that goes in becomes a node of its own, so that a gradient tells by which argument it came."""

    def own(value: Any) -> Any:
        return value.view_as(value) if _is_data(value) else value

    return tuple(map(own, args)), {k: own(v) for k, v in kwargs.items()}


def _recorder(trace: _Trace, part: str | None) -> Any:
    def record(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        names = [*signature(type(_module).forward).parameters][1:]
        names += [f"#{i}" for i in range(len(names), len(args))]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = {n: a for n, a in named.items() if _is_data(a)}
        several = type(output) in (tuple, list)
        first = output[0] if several else output
        if not tensors or not isinstance(first, torch.Tensor):
            return None
        main = "hidden_states" if "hidden_states" in tensors else next(iter(tensors))
        given = tensors.pop(main)
        call = _Call(given=given, returned=first, others=tensors)
        if part is None:
            trace.block = call  # of several calls the last one counts: earlier cycles may run without gradients
        else:
            trace.parts[part] = call
        # a copy goes on: some blocks add in place, which would change what was recorded
        return type(output)((first.clone(), *output[1:])) if several else first.clone()

    return record


def _block_proof(layer: int, trace: _Trace) -> BlockProof:
    branches = {n: c for n, c in trace.parts.items() if not n.split("[")[0].endswith("norm")}
    norms = {n: c for n, c in trace.parts.items() if n.split("[")[0].endswith("norm")}
    feeds = {
        n: f
        for n, c in norms.items()
        if (f := tuple(b for b, call in branches.items() if _same(c.returned, call.given)))
    }
    # a norm between two branches belongs to the one it feeds: the one before it held, or had, no residual
    follows = {
        n: b
        for n, c in norms.items()
        for b, call in branches.items()
        if n not in feeds and _same(c.given, call.returned)
    }
    contributions = {
        b: next((norms[n].returned for n, f in follows.items() if f == b), c.returned) for b, c in branches.items()
    }
    inside = {b: name for b, c in branches.items() if (name := _residual_argument(c)) is not None}
    return BlockProof(
        layer=layer,
        mixes_tokens={n: _mixes(c) for n, c in branches.items()},
        feeds=feeds,
        follows=follows,
        topology=_topology(trace, branches, norms, feeds, contributions),
        placement=_placement(trace, norms, feeds, follows),
        residual_scale={} if inside else _scales(trace, contributions),
        residual_inside=inside,
        order=tuple(trace.parts),
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values (a reshape between is allowed)."""
    return a.numel() == b.numel() and torch.equal(a.detach().reshape(-1), b.detach().reshape(-1))


def _mixes(call: _Call) -> bool:
    """Whether the output at the last position depends on any input before it, by one vector-Jacobian product."""
    if not call.returned.requires_grad:
        return False
    n_rows = call.returned.numel() // call.returned.shape[-1]  # some modules see the tokens as rows of a matrix
    inputs = [t for t in (call.given, *call.others.values()) if t.requires_grad and t.numel() % n_rows == 0]
    last = call.returned.reshape(n_rows, -1)[-1].float().sum()
    gradients = torch.autograd.grad(last, inputs, retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.reshape(n_rows, -1)[:-1].abs().max() > 0) for g in gradients)


def _residual_argument(call: _Call) -> str | None:
    """The argument that the module adds to its output as it is; None where it adds none."""
    if not call.returned.requires_grad:
        return None
    cotangent = torch.randn(call.returned.shape, generator=torch.Generator().manual_seed(1))
    for name, other in call.others.items():
        if other.requires_grad and other.shape == call.returned.shape:
            (gradient,) = torch.autograd.grad(call.returned, other, cotangent, retain_graph=True, allow_unused=True)
            if gradient is not None and torch.equal(gradient, cotangent):
                return name
    return None


def _combination(target: torch.Tensor, columns: list[torch.Tensor]) -> list[float] | None:
    """Factors with which `columns` add up to `target`, when they do so exactly."""
    if any(c.numel() != target.numel() for c in columns):
        return None
    wanted = target.detach().double().reshape(-1)
    matrix = torch.stack([c.detach().double().reshape(-1) for c in columns], dim=1)
    factors = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    error = torch.linalg.vector_norm(matrix @ factors - wanted) / torch.linalg.vector_norm(wanted)
    return [round(float(f), 4) for f in factors] if float(error) <= FIT else None


def _scales(trace: _Trace, contributions: dict[str, torch.Tensor]) -> dict[str, float]:
    if trace.block is None or not contributions:
        return {}
    factors = _combination(trace.block.returned, [trace.block.given, *contributions.values()])
    return dict(zip(("stream", *contributions), factors, strict=True)) if factors else {}


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    return a.numel() == b.numel() and bool(torch.linalg.vector_norm(a - b) <= FIT * torch.linalg.vector_norm(b))


def _topology(
    trace: _Trace,
    branches: dict[str, _Call],
    norms: dict[str, _Call],
    feeds: dict[str, tuple[str, ...]],
    contributions: dict[str, torch.Tensor],
) -> Topology:
    """Whether the FFN reads the stream that the mixer read, or one that the mixer was added to."""
    mixers = [b for b in branches if b.split("[")[0] in families.MIXERS]
    if len(branches) == 1:
        return "single branch"
    if not mixers or "ffn" not in branches or trace.block is None:
        return "other"
    before = next((norms[n].given for n, b in feeds.items() if "ffn" in b), branches["ffn"].given)
    if _close(before, trace.block.given):
        return "parallel"
    after_norm = next((norms[n].returned for n, b in feeds.items() if "ffn" in b), before)
    for target in (before, after_norm):
        factors = _combination(target, [trace.block.given, *(contributions[m] for m in mixers)])
        if factors and all(f != 0 for f in factors[1:]):
            return "sequential"
    return "other"


def _placement(
    trace: _Trace, norms: dict[str, _Call], feeds: dict[str, tuple[str, ...]], follows: dict[str, str]
) -> str:
    if trace.block is not None and any(_same(c.returned, trace.block.returned) for c in norms.values()):
        return "norm of the sum"
    return {
        (True, True): "sandwich", (True, False): "pre-norm", (False, True): "post-norm", (False, False): "unknown"
    }[bool(feeds), bool(follows)]  # fmt: skip


def _disagreements(block: BlockProof) -> Iterator[str]:
    at = f"layers[{block.layer}]"
    for branch, mixes in block.mixes_tokens.items():
        kind = branch.split("[")[0]
        should = kind in families.MIXERS
        if mixes != should:
            said = "mixes tokens" if should else "treats every token alone"
            was = "mixes tokens" if mixes else "treats every token alone"
            yield f"{at}.{branch}: its name says it {said}, measured: it {was}"
    for norm, branches in block.feeds.items():
        expected = _fed_by_name(norm, block)
        if expected is not None and {b.split("[")[0] for b in branches} != expected:
            yield f"{at}.{norm}: its name says it feeds {_listed(expected)}, measured: it feeds {_listed(branches)}"
    for norm, branch in block.follows.items():
        if not norm.startswith(f"{branch.split('[')[0]}_post") and not (norm.startswith("mixer_post")):
            yield f"{at}.{norm}: by its name it does not follow {branch}, measured: its input is {branch}'s output"


def _fed_by_name(norm: str, block: BlockProof) -> set[str] | None:
    """The kinds of branches that a norm's name says it feeds; None when its name says nothing."""
    stem = norm.split("[")[0]
    mixers = {k for b in block.mixes_tokens if (k := b.split("[")[0]) in families.MIXERS}
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
