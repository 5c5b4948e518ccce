"""One forward pass of a tiny model, watched: what went into every block's branches and norms, and what came out.

The graph is kept, so that `block_measures.py` can differentiate afterwards. Read `capture` first; `part_modules` says
which modules are watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn

from frostline.anatomy import families
from frostline.anatomy.blocks import BlockReader
from frostline.anatomy.component import Anatomy, Component
from frostline.anatomy.modules import module_of
from frostline.anatomy.read import find_blocks
from frostline.errors import AnatomyError, first_line

N_TOKENS = 12


@dataclass(slots=True)
class Call:
    """One call of a module: the tensor that went in, the tensor that came out."""

    given: torch.Tensor
    returned: torch.Tensor
    others: dict[str, torch.Tensor]
    """Further floating-point tensors that went in, by argument, each as a tensor of its own in the graph."""


@dataclass(slots=True)
class Trace:
    """The calls inside one block, by part, in the order in which they were made."""

    block: Call | None = None
    parts: dict[str, Call] = field(default_factory=dict)


def capture(model: nn.Module, anatomy: Anatomy, seed: int) -> list[Trace]:
    """One forward pass with every block's parts watched. Raises `AnatomyError`."""
    traces = [Trace() for _ in range(anatomy.n_layers)]
    blocks = [m for _, m in find_blocks(model)]
    with _watching(model, anatomy, blocks, traces):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = torch.randint(3, vocabulary, (1, N_TOKENS), generator=generator)
        model.zero_grad(set_to_none=True)
        try:
            model(input_ids=ids, use_cache=False)
        except Exception as error:  # models raise anything when a tiny size does not suit them
            raise AnatomyError(
                f"{anatomy.model_type}: the tiny model does not run, so nothing is proved: {first_line(error)}"
            ) from error
    return traces


def part_modules(model: nn.Module, anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    """Branches and norms of one layer that are a module of their own, by the first step of their name."""
    blocks = find_blocks(model)
    reader = BlockReader("", blocks[layer][0], blocks[layer][1], anatomy.tensors, anatomy.model_type)
    out = reader.norm_modules()
    whole_blocks = {id(m) for _, m in blocks}
    for name in dict.fromkeys(_part_name(c) for c in _components(anatomy, layer)):
        if is_norm(name) or kind_of(name) in (*families.MIXERS, "ffn"):
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


def kind_of(part: str) -> str:
    """The name of a part of a block without its index: `ffn[1]` is an `ffn`."""
    return part.split("[")[0]


def is_norm(part: str) -> bool:
    """Whether a part of a block is a norm by its name."""
    return kind_of(part).endswith("norm")


def _components(anatomy: Anatomy, layer: int) -> Iterator[Component]:
    return (c for c in anatomy.components if c.path[0] == ("layers", layer))


def _part_name(component: Component) -> str:
    name, index = component.path[1]
    return name if index is None else f"{name}[{index}]"


@contextmanager
def _watching(model: nn.Module, anatomy: Anatomy, blocks: list[nn.Module], traces: list[Trace]) -> Iterator[None]:
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


def _recorder(trace: Trace, part: str | None) -> Any:
    """A forward hook that notes a call of `part`, or of the block."""

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        tensors = _given(module, args, kwargs)
        several = type(output) in (tuple, list)
        first = output[0] if several else output
        if not tensors or not isinstance(first, torch.Tensor):
            return None
        main = "hidden_states" if "hidden_states" in tensors else next(iter(tensors))
        given = tensors.pop(main)
        call = Call(given=given, returned=first, others=tensors)
        if part is None:
            trace.block = call  # of several calls the last one counts: earlier cycles may run without gradients
        else:
            trace.parts[part] = call
        # a copy goes on: some blocks add in place, which would change what was recorded
        return type(output)((first.clone(), *output[1:])) if several else first.clone()

    return record


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a call by the arguments' names."""
    names = [*signature(type(module).forward).parameters][1:]
    names += [f"#{i}" for i in range(len(names), len(args))]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {n: a for n, a in named.items() if _is_data(a)}
