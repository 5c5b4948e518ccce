"""Tiny models of the families that gradient routes are tested on, and what the routes are held against.

The table says by hand where each family's branches and norms lie and how its block adds them up, so nothing here asks
the code under test. `replayed` is the reference: a plain model in which hooks put recorded constants where a gradient
is to stop. All in float64, and exactly so: `Wide` widens what models compute in fp32 whatever their dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from frostline.anatomy import Anatomy, find_blocks, read_anatomy
from frostline.engine.place import confirmed_wirings
from frostline.engine.routes import Points, placed
from frostline.schedule import Route

VOCABULARY = 96
N_LAYERS = 3
Gradients = dict[str, torch.Tensor | None]
Layout = Literal["two skips", "one skip", "loose ffn", "norm of the sum"]

S = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
H = S | {"head_dim": 8}
ALL_HEADS = S | {"num_key_value_heads": 4}
NEOX = {k: v for k, v in S.items() if k != "num_key_value_heads"}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
G1 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64, **NO_DROPOUT}
G = G1 | ENDS
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, **ENDS}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of block, as its source code says it is."""

    of: str
    config: dict[str, Any]
    attn: str = "self_attn"
    ffn: str | None = "mlp"
    before_ffn: str | None = "post_attention_layernorm"
    """Reads the stream for the FFN alone; None: the FFN reads it itself, or through attention's norm."""
    after: dict[str, str] = field(default_factory=dict)
    """Branch → the norm between it and the sum."""
    adds: tuple[str, ...] = ()
    """Branches whose module adds its second argument to its output."""
    scale: float = 1.0
    """What a branch is multiplied with before it is added."""
    layout: Layout = "two skips"

    @property
    def has_experts(self) -> bool:
        return any("experts" in name for name in self.config)


SANDWICH = {"attn": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"}
FAMILIES: dict[str, Family] = {
    "llama": Family(of="llama", config=S),
    "qwen2": Family(of="qwen2", config=S),
    "qwen3": Family(of="qwen3", config=H),
    "gpt2": Family(of="gpt2", config=G, attn="attn", before_ffn="ln_2"),
    "mixtral": Family(of="mixtral", config=S | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        of="qwen3_moe", config=H | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "deepseek_v3": Family(
        of="deepseek_v3",
        config=ALL_HEADS
        | LATENT
        | {"head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "gptj": Family(of="gptj", config=G | {"rotary_dim": 8}, attn="attn", before_ffn=None, layout="one skip"),
    "phi": Family(of="phi", config=S | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, before_ffn=None, layout="one skip"),
    "cohere": Family(of="cohere", config=S, before_ffn=None, layout="one skip"),
    "falcon-parallel": Family(
        of="falcon", config=FALCON | {"parallel_attn": True}, attn="self_attention", before_ffn=None, layout="one skip"
    ),
    "falcon-new": Family(
        of="falcon",
        config=FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        attn="self_attention",
        before_ffn="ln_mlp",
        layout="one skip",
    ),
    "falcon-sequential": Family(
        of="falcon",
        config=FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True},
        attn="self_attention",
    ),
    "neox-parallel": Family(of="gpt_neox", config=NEOX, attn="attention", layout="one skip"),
    "neox-sequential": Family(of="gpt_neox", config=NEOX | {"use_parallel_residual": False}, attn="attention"),
    "gemma2": Family(of="gemma2", config=H, before_ffn="pre_feedforward_layernorm", after=SANDWICH),
    "gemma3": Family(of="gemma3_text", config=H, before_ffn="pre_feedforward_layernorm", after=SANDWICH),
    "olmo2": Family(of="olmo2", config=S, before_ffn=None, after=SANDWICH),
    "granite": Family(of="granite", config=S | {"residual_multiplier": 0.22}, scale=0.22),
    "minicpm3": Family(
        of="minicpm3", config=ALL_HEADS | LATENT | {"scale_depth": 1.4}, scale=1.4 / math.sqrt(N_LAYERS)
    ),
    "bloom": Family(
        of="bloom",
        config={"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": N_LAYERS, "n_head": 4, **ENDS},
        attn="self_attention",
        adds=("attn", "ffn"),
    ),
    "mpt": Family(
        of="mpt",
        config={"vocab_size": VOCABULARY, "d_model": 32, "n_layers": N_LAYERS, "n_heads": 4, "max_seq_len": 64},
        attn="attn",
        ffn="ffn",
        before_ffn="norm_2",
        adds=("ffn",),
    ),
    "opt": Family(
        of="opt",
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "activation_function": "gelu",  # a ReLU has kinks, which finite differences find
        },
        ffn=None,
        layout="loose ffn",
    ),
    "gpt1": Family(of="openai-gpt", config=G1, attn="attn", before_ffn=None, layout="norm of the sum"),
}
"""24 families; `FEW` are one of each layout, for what every test run has time for."""
FEW = ("llama", "gpt2", "neox-parallel", "gemma2", "granite", "bloom", "mixtral", "opt")
EACH = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
"""All of them for `parametrize`, all but `FEW` slow."""
POINTS = {
    "two skips": ("attn.out", "ffn.out", "block.in", "attn.skip", "ffn.skip"),
    "one skip": ("attn.out", "ffn.out", "block.in", "block.skip"),
    "loose ffn": ("attn.out", "block.in", "attn.skip"),
    "norm of the sum": ("attn.out", "ffn.out", "block.in"),
}
"""Layout → every point that such a block is to have; all others are to be refused."""
EVERY_POINT = ("attn.out", "ffn.out", "block.in", "attn.skip", "ffn.skip", "block.skip")

IDS = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(5))


class Wide(TorchFunctionMode):
    """Inside, float32 in any call is float64; and experts are chosen once: `torch.topk` chooses again what it chose.

    A choice of experts is a step, which has no derivative: differences are taken with the choice held fixed.
    """

    def __init__(self, chosen: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.chosen = [] if chosen is None else list(chosen)
        self.replays, self._at = chosen is not None, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if func in (torch.topk, torch.Tensor.topk):
            if self.replays:
                indices = self.chosen[self._at]
                self._at += 1
                return type(out)((args[0].gather(-1, indices), indices))
            self.chosen.append(out[1])
        return out


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> nn.Module:
    """A tiny model with weights large enough for its branches to matter, in evaluation mode."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.of, **family.config, **fields)
    options = {"experts_implementation": "eager"} if family.has_experts else {}
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))
            elif p.std() < 0.05:
                p.mul_(4.0)
    return model.to(dtype).eval()


@cache
def wirings(name: str) -> Any:
    """The confirmed wirings of a family: read once."""
    return confirmed_wirings(build(name).config)


def with_points(model: nn.Module, name: str) -> Points:
    """The points of a model, placed as `place` does, its tiny model proved once per family."""
    return placed(model, read_anatomy(model), wirings(name))


def route(point: str, layers: tuple[int, ...] = (0, 1, 2), mode: Literal["stop", "remove"] = "stop") -> Route:
    """A route, in every layer by default."""
    return Route(point=point, mode=mode, layers=() if point == "embed.out" else layers)


def every_route(name: str) -> list[Route]:
    """Every route that a family is to accept, in all layers and in the middle one."""
    points = POINTS[FAMILIES[name].layout]
    stops = [route(p, layers) for p in points for layers in ((0, 1, 2), (1,))]
    removes = [route(p, layers, "remove") for p in points if p.endswith(".skip") for layers in ((0, 1, 2), (1,))]
    return [route("embed.out"), *stops, *removes]


def loss_of(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean next-token loss, logits)."""
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()), logits


def gradients(model: nn.Module, *, wide: bool = True) -> tuple[torch.Tensor, Gradients]:
    """(logits, gradient of every parameter)."""
    model.zero_grad(set_to_none=True)
    if wide:
        with Wide():
            loss, logits = loss_of(model)
    else:
        loss, logits = loss_of(model)
    loss.backward()
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return logits.detach(), found


def first(out: Any) -> torch.Tensor:
    """The tensor that a module gives."""
    tensor: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return tensor


def put(out: Any, tensor: torch.Tensor) -> Any:
    """The same output with another tensor."""
    return type(out)((tensor, *out[1:])) if isinstance(out, (tuple, list)) else tensor


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream that a module is given."""
    stream: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return stream


def with_stream(args: tuple[Any, ...], kwargs: dict[str, Any], stream: torch.Tensor) -> Any:
    """The arguments with another one."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": stream}
    return (stream, *args[1:]), kwargs


Constant = Callable[[Any, torch.Tensor], torch.Tensor]


@contextmanager
def replayed(model: nn.Module, name: str, *routes: Route) -> Iterator[list[torch.Tensor]]:
    """Inside, a plain model computes with constants where the routes stop, recorded at its weights on entry.

    Gives the experts that were chosen then.
    """
    family, recorded, hooks = FAMILIES[name], {}, []

    def constant(key: Any, tensor: torch.Tensor) -> torch.Tensor:
        return recorded.setdefault(key, tensor.detach().clone()).clone()  # a copy: Falcon adds in place

    for r in sorted(routes, key=lambda r: r.point.endswith(".skip")):  # a constant output first, then its correction
        if r.point == "embed.out":
            embed = model.get_input_embeddings()  # type: ignore[operator]
            hooks.append(embed.register_forward_hook(lambda _m, _a, o: constant("embed", o)))
        for layer in r.layers:
            block = find_blocks(model)[layer][1]
            hooks += _hooks(family, block, layer, r, constant)
    try:
        with torch.no_grad(), Wide() as choice:
            loss_of(model)
        yield choice.chosen
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(family: Family, block: nn.Module, layer: int, r: Route, constant: Constant) -> list[Any]:
    part, what = r.point.split(".")
    if what == "in":

        def enter(_m: nn.Module, a: Any, k: Any) -> Any:
            return with_stream(a, k, constant((layer, r.point), stream_of(a, k)))

        return [block.register_forward_pre_hook(enter, with_kwargs=True)]
    if what == "out":

        def leave(_m: nn.Module, a: Any, out: Any) -> Any:
            if part in family.adds:
                return put(out, constant((layer, r.point), first(out) - a[1]) + a[1])
            return put(out, constant((layer, r.point), first(out)))

        return [_module(family, block, part).register_forward_hook(leave)]
    stream: list[torch.Tensor] = []
    branch = "attn" if part == "block" else part  # one branch carries the correction of what they share
    after = family.after.get(branch)
    last = block.get_submodule(after) if after else _module(family, block, branch)
    reader = block if branch == "attn" else block.get_submodule(family.before_ffn or family.ffn or "")

    def read(_m: nn.Module, a: Any, k: Any) -> None:
        stream[:] = [stream_of(a, k)]

    def correct(_m: nn.Module, _a: Any, out: Any) -> Any:
        """Branch · scale + stream becomes branch · scale + what the skip is to carry."""
        (x,) = stream
        carried = constant((layer, r.point), x) if r.mode == "stop" else torch.zeros_like(x)
        return put(out, first(out) + (carried - x) / family.scale)

    return [reader.register_forward_pre_hook(read, with_kwargs=True), last.register_forward_hook(correct)]


def _module(family: Family, block: nn.Module, branch: str) -> nn.Module:
    return block.get_submodule(family.attn if branch == "attn" else family.ffn or "")


def plain_copy(model: nn.Module, name: str) -> nn.Module:
    """A model of the same weights that has no points."""
    dtype = next(model.parameters()).dtype
    plain = build(name, dtype=dtype)
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    return plain


def relative_difference(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """‖a − b‖ over the larger norm; infinite where only one of them is there."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    size = max(a.norm().item(), b.norm().item())
    return 0.0 if size == 0 else (a - b).norm().item() / size


def differing(found: Gradients, wanted: Gradients, *, tolerance: float = 0.0) -> list[str]:
    """Names of gradients that are not the wanted ones: bitwise, or relative to the largest norm of them all."""
    assert found.keys() == wanted.keys()
    largest = max((g.norm().item() for g in wanted.values() if g is not None), default=0.0)
    out = []
    for name, a in found.items():
        b = wanted[name]
        if a is None or b is None:
            same = a is b
        elif tolerance == 0:
            same = torch.equal(a, b)
        else:
            same = (a - b).norm().item() <= tolerance * max(b.norm().item(), 1e-3 * largest)
        out += [] if same else [name]
    return out


def groups_of(anatomy: Anatomy) -> dict[str, list[str]]:
    """Kind of component (`attn`, `ffn`, `attn_norm`, `embed`, …) → its parameters, in all layers."""
    out: dict[str, dict[str, None]] = {}
    for component in anatomy.components:
        step = component.path[1][0] if component.path[0][0] == "layers" else component.path[0][0]
        for piece in component.slices:
            out.setdefault(step, {})[anatomy.ties.get(piece.tensor, piece.tensor)] = None
    return {group: list(names) for group, names in out.items()}


def worst_direction(
    plain: nn.Module, found: Gradients, choice: list[torch.Tensor], *, n_directions: int, step: float
) -> tuple[str, float]:
    """The kind of component whose directional derivatives differ most from five-point differences, and by how much.

    Relative to the derivative, or to 1 % of the norm of the kind's gradient where that is more.
    """
    generator, parameters = torch.Generator().manual_seed(3), dict(plain.named_parameters())
    worst = ("", 0.0)
    for group, tensors in groups_of(read_anatomy(plain)).items():
        names = [n for n in tensors if n in parameters]
        norm = math.sqrt(sum(g.norm().item() ** 2 for n in names if (g := found[n]) is not None))
        kept = {n: parameters[n].detach().clone() for n in names}
        for _ in range(n_directions if names else 0):
            ways = {n: torch.randn(kept[n].shape, generator=generator, dtype=torch.float64) for n in names}
            length = math.sqrt(sum(w.norm().item() ** 2 for w in ways.values()))
            said = sum((g * ways[n]).sum().item() for n in names if (g := found[n]) is not None) / length
            values = {}
            with torch.no_grad():
                for k in (-2, -1, 1, 2):
                    for n in names:
                        parameters[n].copy_(kept[n] + k * step / length * ways[n])
                    with Wide(choice):
                        values[k] = loss_of(plain)[0].item()
            measured = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
            error = abs(measured - said) / max(abs(measured), abs(said), 1e-2 * norm, 1e-6)
            worst = max(worst, (group, error), key=lambda w: w[1])
        with torch.no_grad():
            for n in names:
                parameters[n].copy_(kept[n])
    return worst
