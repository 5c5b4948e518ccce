"""Packed tensors: which rows of one matrix are the query's, the gate's, the fifth expert's.

A packed projection is `repeats` times the same row of parts, each with a width: all queries, keys and values one after
another (GPT-2, Phi-3), group by group (GPT-NeoX, BLOOM, Falcon), or in some other order. Sizes are read from the
module that uses the tensor, never from the configuration alone; where they do not fit, the answer is None and the
tensor stays one part. `slice_proof.py` measures whether the answers are right. Read `packing_of` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from frostline.anatomy import families
from frostline.anatomy.slices import Indices, Slice, compress

Axes = tuple[int | None, int | None]
"""Dimensions of a tensor along which a projection's outputs and its inputs lie."""


@dataclass(frozen=True, slots=True)
class Packing:
    """`repeats` × the parts of `widths`, one after another along one dimension."""

    repeats: int
    widths: tuple[tuple[str, int], ...]
    """(part, number of indices in each repeat)."""

    @property
    def n(self) -> int:
        """Indices altogether."""
        return self.repeats * sum(width for _, width in self.widths)

    def indices(self) -> dict[str, Indices]:
        """Part → its indices."""
        period = sum(width for _, width in self.widths)
        out: dict[str, Indices] = {}
        at = 0
        for part, width in self.widths:
            starts = range(at, self.repeats * period, period)
            out[part] = compress(i for start in starts for i in range(start, start + width))
            at += width
        return out


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """The sizes of an attention module."""

    n_heads: int
    qk_dim: int
    """Width of one query or key head."""
    v_dim: int
    """Width of one value head."""


def head_sizes(attention: nn.Module) -> HeadSizes | None:
    """Number and widths of the query heads of an attention module; None where it does not say."""
    inputs = _out_projection_inputs(attention)
    n_heads = _number(attention, "num_heads", "num_attention_heads", "n_heads", "n_head")
    qk_dim = _number(attention, "qk_head_dim", "head_dim", "head_size", "dim_head", "d_head", "depth")
    v_dim = _number(attention, "v_head_dim") or qk_dim
    if n_heads is None and inputs and v_dim and inputs % v_dim == 0:
        n_heads = inputs // v_dim
    if n_heads and v_dim is None and inputs and inputs % n_heads == 0:
        qk_dim = v_dim = inputs // n_heads
    if not (n_heads and qk_dim and v_dim) or (inputs and inputs != n_heads * v_dim):
        return None
    return HeadSizes(n_heads, qk_dim, v_dim)


def packing_of(model_type: str, module: nn.Module, attribute: str, name: str, n: int) -> Packing | None:
    """How `n` outputs of `module`'s projection `attribute` are divided into parts; None when they are one part.

    `name`: the part that the projection is as a whole. The parts are named as steps below the branch: `q`, `k.b`.
    """
    if name == "gate_up":
        return Packing(1, (("gate", n // 2), ("up", n // 2))) if n % 2 == 0 else None
    kind = families.PACKED_BY_TYPE.get((model_type, attribute)) or families.PACKED.get(attribute)
    if kind is None:
        return None
    sizes = head_sizes(module)
    packing = _PACKINGS[kind](sizes, module, n) if sizes else None
    return packing if packing and packing.n == n else None


def _consecutive(sizes: HeadSizes, _: nn.Module, n: int) -> Packing | None:
    d, n_kv = sizes.qk_dim, _n_kv_heads(sizes, n)
    return Packing(1, (("q", sizes.n_heads * d), ("k", n_kv * d), ("v", n_kv * d))) if n_kv else None


def _grouped(sizes: HeadSizes, _: nn.Module, n: int) -> Packing | None:
    d, n_kv = sizes.qk_dim, _n_kv_heads(sizes, n)
    return Packing(n_kv, (("q", sizes.n_heads // n_kv * d), ("k", d), ("v", d))) if n_kv else None


def _four_blocks(sizes: HeadSizes, _: nn.Module, __: int) -> Packing | None:
    """CodeGen was trained on four devices: four blocks of queries, values, keys."""
    width, rest = divmod(sizes.n_heads * sizes.qk_dim, 4)
    return Packing(4, (("q", width), ("v", width), ("k", width))) if not rest else None


def _latent_kv(_: HeadSizes, module: nn.Module, __: int) -> Packing | None:
    latent, rope = _number(module, "kv_lora_rank"), _number(module, "qk_rope_head_dim")
    return Packing(1, (("kv.a", latent), ("k.rope", rope))) if latent and rope else None


def _kv_from_latent(sizes: HeadSizes, module: nn.Module, _: int) -> Packing | None:
    nope = _number(module, "qk_nope_head_dim")
    return Packing(sizes.n_heads, (("k.b", nope), ("v.b", sizes.v_dim))) if nope else None


def _query_and_gate(sizes: HeadSizes, _: nn.Module, __: int) -> Packing | None:
    return Packing(sizes.n_heads, (("q", sizes.qk_dim), ("gate", sizes.v_dim)))


def _low_rank_query_and_gate(sizes: HeadSizes, _: nn.Module, __: int) -> Packing | None:
    return Packing(sizes.n_heads, (("q.b", sizes.qk_dim), ("gate", sizes.v_dim)))


def _convolved_query_and_key(sizes: HeadSizes, _: nn.Module, n: int) -> Packing | None:
    width = sizes.n_heads * sizes.qk_dim
    return Packing(1, (("q.conv", width), ("k.conv", n - width))) if n > width else None


def _key_and_value(_: HeadSizes, __: nn.Module, n: int) -> Packing | None:
    return Packing(1, (("k", n // 2), ("v", n // 2))) if n % 2 == 0 else None


_PACKINGS: dict[str, Callable[[HeadSizes, nn.Module, int], Packing | None]] = {
    "consecutive": _consecutive,
    "grouped": _grouped,
    "four blocks": _four_blocks,
    "latent kv": _latent_kv,
    "kv from latent": _kv_from_latent,
    "query and gate": _query_and_gate,
    "low-rank query and gate": _low_rank_query_and_gate,
    "key and value": _key_and_value,
    "convolved query and key": _convolved_query_and_key,
}


def _n_kv_heads(sizes: HeadSizes, n: int) -> int | None:
    """Key/value heads that `n` packed rows leave beside the queries; None when that is no whole number of groups."""
    n_kv, rest = divmod(n - sizes.n_heads * sizes.qk_dim, 2 * sizes.qk_dim)
    return n_kv if rest == 0 and n_kv > 0 and sizes.n_heads % n_kv == 0 else None


def projection_axes(module: nn.Module, shape: tuple[int, ...]) -> Axes:
    """Output and input dimension of a tensor that `module` holds itself: GPT-2's `Conv1D` is (inputs, outputs)."""
    if len(shape) != 2:
        return (0 if shape else None, None)
    return (1, 0) if type(module).__name__ == "Conv1D" else (0, 1)


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor that holds the same part of every expert."""

    packing: Packing
    """How an expert's outputs are divided."""
    axes: Axes
    flat: bool = False
    """Whether dimension 0 holds the experts' neurons one after another (DBRX) instead of the experts."""


def expert_tensors(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ExpertTensor] | None:
    """How each tensor of a packed experts module is laid out; None when that is not known.

    `shapes`: the tensors' names below the module → shapes.
    """
    if set(shapes) == {"mlp.w1", "mlp.v1", "mlp.w2"}:
        width, rest = divmod(shapes["mlp.w1"][0], int(_number(module, "num_experts") or 0) or 1)
        axes: dict[str, Axes] = {"gate": (0, 1), "up": (0, 1), "down": (1, 0)}
        parts = {"mlp.w1": "gate", "mlp.v1": "up", "mlp.w2": "down"}
        flat = {n: ExpertTensor(Packing(1, ((p, width),)), axes[p], flat=True) for n, p in parts.items()}
        return flat if rest == 0 else None
    parts = {n: families.EXPERT_TENSORS.get(n, "") for n in shapes}
    down = next((shapes[n] for n, p in parts.items() if p == "down" and len(shapes[n]) == 3), None)
    first = next((shapes[n] for n, p in parts.items() if p in ("gate_up", "up") and len(shapes[n]) == 3), None)
    if "" in parts.values() or down is None or first is None:
        return None
    transposed = _is_transposed(module, first, down, n_parts=2 if "gate_up" in parts.values() else 1)
    if transposed is None:
        return None
    interleaved = getattr(module, "is_concatenated", True) is False
    return {n: _expert_tensor(p, shapes[n], transposed=transposed, interleaved=interleaved) for n, p in parts.items()}


def _is_transposed(module: nn.Module, first: tuple[int, ...], down: tuple[int, ...], *, n_parts: int) -> bool | None:
    """Whether a packed expert is (inputs, outputs); None when its shapes do not fit together."""
    plain = first[1:] == (n_parts * down[2], down[1])
    other = first[1:] == (down[2], n_parts * down[1])
    if plain and other:  # without a gate the shapes alone do not tell
        return bool(getattr(module, "is_transposed", False))
    return other if plain or other else None


def _expert_tensor(part: str, shape: tuple[int, ...], *, transposed: bool, interleaved: bool) -> ExpertTensor:
    axes: Axes = (1, None) if len(shape) == 2 else ((2, 1) if transposed else (1, 2))
    n = shape[axes[0] or 0]
    if part != "gate_up":
        return ExpertTensor(Packing(1, ((part, n),)), axes)
    half = n // 2
    return ExpertTensor(
        Packing(half, (("gate", 1), ("up", 1))) if interleaved else Packing(1, (("gate", half), ("up", half))), axes
    )


def expert_slices(
    tensors: Mapping[str, ExpertTensor], shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> Iterator[tuple[int | None, str, Slice]]:
    """(expert, part, slice) of every expert; expert None for rows that belong to no expert.

    `names`: a tensor's name below the module → its name in the model. Experts that own no rows of the down projection
    (LongCat's identity experts) have rows of the first one allocated that nothing reads.
    """
    n_experts = min(len(range(0, shapes[n][0], t.packing.n if t.flat else 1)) for n, t in tensors.items())
    indices = {n: t.packing.indices() for n, t in tensors.items()}
    for j in range(n_experts):
        for n, t in tensors.items():
            for part, along in indices[n].items():
                rows = compress(range(j * t.packing.n, (j + 1) * t.packing.n)) if t.flat else compress((j,))
                yield j, part, _box(names[n], shapes[n], {0: rows} if t.flat else {0: rows, t.axes[0] or 0: along})
    for n, t in tensors.items():
        if not t.flat and shapes[n][0] > n_experts:
            yield None, "unused", _box(names[n], shapes[n], {0: (range(n_experts, shapes[n][0]),)})


def _box(name: str, shape: tuple[int, ...], along: Mapping[int, Indices]) -> Slice:
    return Slice(name, tuple(along.get(d, (range(size),)) for d, size in enumerate(shape)))


def _out_projection_inputs(attention: nn.Module) -> int | None:
    """Inputs of the projection that joins the heads."""
    for name, child in attention.named_children():
        weight = getattr(child, "weight", None)
        if families.ATTENTION_PARTS.get(name) == "o" and weight is not None and weight.dim() == 2:
            return int(weight.shape[projection_axes(child, tuple(weight.shape))[1] or 0])
    return None


def _number(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is a positive whole number."""
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
