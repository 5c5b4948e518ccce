"""Causal attention in bf16 made of matrix products, for compiled blocks on a CPU: faster there than torch's own kernel.

torch's kernel multiplies in small pieces, in bf16 hardly faster than in fp32. Here a product is over many heads at a
time, scores stay in fp32, and query, key and value are all that is kept for the backward pass, which computes the
scores again. `with_product_attention` exchanges the calls in the graph of a compiled block; nothing else knows of it,
and the proof of every stage holds the block against torch's own attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, library
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

SCORES = 1 << 20
"""Scores that are computed at a time, 4 MiB; more only where `QUERIES` of one group of heads have more."""
QUERIES = 128
"""Queries of one head that are computed at a time."""


def with_product_attention(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph`, as dynamo gives it to a backend, with every causal attention in bf16 on a CPU exchanged that has neither
    mask nor dropout; as it is where the processor has no bf16 instructions."""
    if not has_bf16_products():
        return graph
    for node in graph.graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention):
        if (given := _taken(node)) is not None:
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(torch.ops.frostline.causal_attention.default, given)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def has_bf16_products() -> bool:
    """Whether the processor multiplies bf16 numbers by instructions of its own."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _taken(node: fx.Node) -> tuple[Any, ...] | None:
    """(query, key, value, scale) of a call that is exchanged; None for every other."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("attn_mask") is not None or given.get("dropout_p") or given.get("is_causal") is not True:
        return None
    parts: list[Any] = [given[name] for name in names[:3]]
    query, key, value = (part.meta["example_value"] for part in parts)
    alike = query.ndim == 4 and query.shape[2] == key.shape[2] == value.shape[2] and query.shape[1] % key.shape[1] == 0
    if not alike or query.device.type != "cpu" or not all(_narrow(t) for t in (query, key, value)):
        return None
    scale = given.get("scale")
    return (*parts, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def _narrow(tensor: torch.Tensor) -> bool:
    """Whether attention gets it in bf16: as it is, or because of autocast."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return tensor.dtype == torch.bfloat16 or (cast and tensor.dtype == torch.float32)


# inductor's cache knows an operation by its name: what changes shape, layout or order of results needs a new one
@library.custom_op("frostline::causal_attention", mutates_args=())
def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention in which a token sees itself and what is before it.

    (rows, heads, length, width), (rows, key/value heads, length, width), (rows, key/value heads, length, width of
    values) → (rows, heads, length, width of values).
    """
    queries, keys, values = _by_group(query, key, value)
    out = queries.new_empty(*queries.shape[:3], values.shape[-1])
    with _wide_products(query.dtype):
        for heads, span in _pieces(queries):
            seen = slice(0, span.stop)
            shares = _shares(queries[heads, :, span], keys[heads, seen], scale, span)
            mixed = torch.bmm(shares.to(values.dtype), values[heads, seen])
            out[heads, :, span] = mixed.unflatten(1, (queries.shape[1], -1))
    return out.view(*query.shape[:3], -1)


@library.custom_op("frostline::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their shapes, from that of the output."""
    queries, keys, values = _by_group(query, key, value)
    gradients, narrow = gradient.reshape(*queries.shape[:3], -1), query.dtype
    of_query = torch.empty_like(queries, memory_format=torch.contiguous_format)
    of_key, of_value = (torch.zeros(t.shape) for t in (keys, values))
    with _wide_products(narrow):
        for heads, span in _pieces(queries):
            seen = slice(0, span.stop)
            asking, given = queries[heads, :, span], gradients[heads, :, span].flatten(1, 2)
            shares = _shares(asking, keys[heads, seen], scale, span)
            of_value[heads, seen] += torch.bmm(shares.to(narrow).transpose(1, 2), given)
            wanted = torch.bmm(given.float(), values[heads, seen].float().transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(wanted, shares, -1, torch.float32).to(narrow)
            of_key[heads, seen] += torch.bmm(scores.transpose(1, 2), asking.flatten(1, 2))
            found = torch.bmm(scores, keys[heads, seen]).mul_(scale)
            of_query[heads, :, span] = found.unflatten(1, (queries.shape[1], -1))
    return (
        of_query.view(query.shape),
        of_key.mul_(scale).to(key.dtype).view(key.shape),
        of_value.to(value.dtype).view(value.shape),
    )


def _shares(queries: torch.Tensor, keys: torch.Tensor, scale: float, span: slice) -> torch.Tensor:
    """What each query of `span` gives to each key up to its end: (groups, queries of their heads, keys), fp32."""
    asking, given = queries.flatten(1, 2).float(), keys.float().transpose(1, 2)
    scores = torch.baddbmm(asking.new_zeros(1, 1, 1), asking, given, beta=0, alpha=scale)
    n = span.stop - span.start
    later = torch.full((n, n), -math.inf).triu(1)
    scores.unflatten(1, (-1, n))[..., span.start :] += later
    return torch.softmax(scores, -1)


def _by_group(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query as (groups, heads, length, width), key and value as (groups, length, width): a group has one key."""
    rows, n_keys, length, _ = key.shape
    return (
        query.reshape(rows * n_keys, query.shape[1] // n_keys, length, -1),
        key.reshape(rows * n_keys, length, -1),
        value.reshape(rows * n_keys, length, -1),
    )


def _pieces(queries: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """(groups, positions of their queries) that are computed at a time."""
    n_groups, n_heads, length, _ = queries.shape
    at_once = max(1, SCORES // (min(QUERIES, length) * length * n_heads))
    for group in range(0, n_groups, at_once):
        for start in range(0, length, QUERIES):
            yield slice(group, group + at_once), slice(start, min(start + QUERIES, length))


@contextmanager
def _wide_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, fp32 products of what was bf16 may be computed by bf16 instructions: every factor is a bf16 number, so
    that they lose nothing by it."""
    if dtype != torch.bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@causal_attention.register_fake
def _empty_output(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, _scale: float) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@causal_attention_backward.register_fake
def _empty_gradients(
    _gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _scale: float
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*causal_attention_backward(gradient, *ctx.saved_tensors, ctx.scale), None)


causal_attention.register_autograd(_backward, setup_context=_keep)
causal_attention.register_autocast("cpu", torch.bfloat16)


@register_flop_formula([torch.ops.frostline.causal_attention])
def _flops(query: torch.Size, _key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Of two products, as torch counts its own attention: above the diagonal too."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * length * (width + value[-1])


@register_flop_formula([torch.ops.frostline.causal_attention_backward])
def _flops_backward(
    _gradient: torch.Size, query: torch.Size, _key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    rows, heads, length, width = query
    return 2 * rows * heads * length * length * (3 * width + 2 * value[-1])
