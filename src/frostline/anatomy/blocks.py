"""Reading one block: its norms by what they feed, its branches by what they are, and every tensor inside them.

A branch is found by its module's class; a tensor inside a branch gets the field's name where `families` knows its
attribute, and keeps its attribute's name where not. Packed projections and packed experts are cut into slices where
`layouts` knows how; where it does not, the packed tensor is one part (`attn.qkv`). Read `BlockReader.read` first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from frostline.anatomy import families
from frostline.anatomy.component import TensorInfo
from frostline.anatomy.layouts import (
    Axes,
    Packing,
    expert_slices,
    expert_tensors,
    head_sizes,
    packing_of,
    projection_axes,
)
from frostline.anatomy.slices import Slice, whole

Named = tuple[str, tuple[Slice, ...]]
"""A component name and slices for it; several may name the same component."""


class BlockReader:
    """Reads one block of a model."""

    def __init__(self, at: str, name: str, block: nn.Module, tensors: Sequence[TensorInfo], model_type: str) -> None:
        self.at, self.name, self.root, self.model_type = at, name, block, model_type
        self.tensors = [t for t in tensors if t.name.startswith(name + ".")]
        self.shapes = {t.name: t.shape for t in self.tensors}
        self.axes: dict[str, Axes] = {}
        """Expert tensor → the dimensions of its outputs and inputs; filled by `read`."""
        self.n_heads: dict[str, int] = {}
        """Attention branch (`layers[3].attn`) → number of query heads; filled by `read`."""

    def read(self) -> Iterator[Named]:
        """Every part of the block, in the order of the forward pass."""
        found = [(f"{self.at}.{role}", slices) for role, slices in self.children(self.root, self.name)]
        order = {b: i for i, b in enumerate(_block_order())}
        yield from sorted(found, key=lambda named: order.get(re.sub(r"\[.*", "", named[0].split(".")[1]), len(order)))

    def kinds(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        """(attribute, kind) of the branches in a block, containers opened."""
        for name, child in module.named_children():
            kind = self.kind(child)
            if kind == "container":
                yield from self.kinds(child)
            elif kind is not None:
                yield name, kind

    def kind(self, module: nn.Module) -> str | None:
        """`norm`, `container`, a kind of branch, or None."""
        name = type(module).__name__
        if is_norm(module):
            return "norm"
        if isinstance(module, nn.ModuleList) or (families.NORM_CLASS.search(name) and _holds_attention(module)):
            return "container"
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            return None
        return families.branch_kind(name)

    def children(self, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """(role, slices) of everything in a block or container."""
        siblings = {n for n, _ in module.named_children()}
        for name in self.direct(module):
            yield f"residual.{name}", self.slices(f"{path}.{name}")
        several = isinstance(module, nn.ModuleList) and len(module) > 1
        for name, child in module.named_children():
            here = f"{path}.{name}"
            kind = self.kind(child)
            index = f"[{name}]" if several else ""
            if kind == "norm":
                attribute = path.rpartition(".")[2] if name.isdigit() else name
                if families.CROSS_ATTENTION.search(attribute):
                    yield "cross_attn_norm", self.inside(here)
                    continue
                yield self.norm(attribute, siblings, self.mixer_of(module)) + index, self.inside(here)
            elif kind == "container":
                yield from self.children(child, here)
            elif kind == "residual" or name in ("linear", "per_layer_input_gate", "per_layer_projection"):
                yield f"residual.{name}", self.inside(here)
            elif name in families.SHARED_EXPERTS:
                yield from self.shared("ffn.shared_expert", child, here)
            elif name in families.EXPERTS:
                yield from self.experts("ffn", child, here)
            elif name == "router":
                yield "ffn.router", self.inside(here)
            elif name in families.BLOCK_LINEARS:
                yield families.BLOCK_LINEARS[name], self.inside(here)
            elif kind == "attn" and families.CROSS_ATTENTION.search(name):
                yield from self.branch("cross_attn", kind, child, here)
            elif kind == "conv" and name != "conv":
                yield f"conv.{name}", self.inside(here)
            elif kind is not None:
                yield from self.branch(kind + index, kind, child, here)
            elif name in ("ffn", "mlp") and isinstance(child, nn.Sequential):
                yield from self.sequential_ffn(child, here)

    def mixer_of(self, module: nn.Module) -> str:
        """The kind of mixer in a block or container; `mixer` for several kinds; the block's where it has none."""
        kinds = {k for _, k in self.kinds(module) if k in families.MIXERS}
        if not kinds and module is not self.root:
            return self.mixer_of(self.root)
        return "mixer" if len(kinds) > 1 else next(iter(kinds), "mixer")

    def norm(self, name: str, siblings: set[str], mixer: str) -> str:
        """A norm's name by what it feeds or follows; its own name where the table does not know it."""
        if (self.model_type, name) in families.NORMS_BY_TYPE:
            return families.NORMS_BY_TYPE[self.model_type, name]
        role = families.norm_role(name, siblings)
        kinds = {k for _, k in self.kinds(self.root)}
        if role == "pre_mixer" and "ffn" in kinds:
            if not kinds & {*families.MIXERS}:
                return "ffn_norm"
            alone = not any(families.norm_role(n, siblings) for n in siblings if n != name)
            if alone and self.mixer_and_ffn_are_siblings():
                return "shared_norm"
        names = {"pre_mixer": f"{mixer}_norm", "post_mixer": f"{mixer}_post_norm",
                 "pre_ffn": "ffn_norm", "post_ffn": "ffn_post_norm"}  # fmt: skip
        return names.get(role or "", name if name.endswith("norm") else f"{name}_norm")

    def norm_modules(self) -> dict[str, nn.Module]:
        """Norms directly in the block by the name they have or would have: some have no parameters."""
        siblings = {n for n, _ in self.root.named_children()}
        return {
            self.norm(name, siblings, self.mixer_of(self.root)): child
            for name, child in self.root.named_children()
            if is_norm(child) and not isinstance(child, nn.ModuleList)
        }

    def mixer_and_ffn_are_siblings(self) -> bool:
        """Whether the block itself holds both, not containers inside it."""
        kinds = [self.kind(c) for c in self.root.children()]
        return any(k in families.MIXERS for k in kinds) and "ffn" in kinds

    def branch(self, role: str, kind: str, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Everything inside a branch."""
        if kind == "attn":
            self.find_heads(role, module)
            yield from self.named_parts(role, module, path, families.ATTENTION_PARTS)
        elif kind == "ffn" and any(n in families.EXPERTS or n in families.ROUTERS for n, _ in module.named_children()):
            yield from self.moe(role, module, path)
        elif kind == "ffn":
            yield from self.named_parts(role, module, path, families.FFN_PARTS)
        elif kind == "linear_attn":
            yield from self.named_parts(role, module, path, families.LINEAR_ATTENTION_PARTS)
        else:
            yield from self.named_parts(role, module, path, {})

    def find_heads(self, role: str, module: nn.Module) -> None:
        """Note the number of query heads of an attention branch, where it or a module it wraps says so."""
        inner = next((m for m in (module, *module.children()) if head_sizes(m)), None)
        sizes = head_sizes(inner) if inner is not None else None
        # attention to another sequence is not measured, so it has no heads
        if sizes and role.split("[")[0] == "attn" and self.model_type not in families.NO_HEADS:
            self.n_heads[f"{self.at}.{role}"] = sizes.n_heads

    def named_parts(
        self, role: str, module: nn.Module, path: str, names: dict[str, str]
    ) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Children and direct tensors of a branch, by the field's name or their own; wrappers are opened."""
        for name in self.direct(module):
            tensor = f"{path}.{name}"
            mask = name in families.MASKS and name in dict(module.named_buffers(recurse=False))
            yield f"{role}.{'mask' if mask else names.get(name) or _own_name(name)}", self.slices(tensor)
        for name, child in module.named_children():
            here = f"{path}.{name}"
            if not self.has_tensors(here):
                continue
            known = names.get(name)
            if known == "k" and role.startswith("attn") and _one_projection_for_both(module):
                known = "kv"
            if name == "experts" and names is families.ATTENTION_PARTS:
                yield from self.named_parts(role, child, here, families.ATTENTION_EXPERT_PARTS)
            elif name in families.ATTENTION_HELPERS:
                yield from self.named_parts(f"{role}.{name}", child, here, {})
            elif known in (None, "qkv") and any(n in names for n, _ in child.named_children()):
                yield from self.named_parts(role, child, here, names)  # a wrapper such as GPT-Neo's `attn.attention`
            elif known is None:
                yield f"{role}.{_own_name(name)}", self.inside(here)
            else:
                yield from self.projection(role, known, module, name, here)

    def projection(
        self, role: str, name: str, module: nn.Module, attribute: str, path: str
    ) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """A projection of a branch: one part, or several where it is packed."""
        tensors = [t for t in self.tensors if t.name.startswith(path + ".")]
        weight = next((t for t in tensors if t.name.endswith("weight") and not families.ADAPTERS.search(t.name)), None)
        n = weight.shape[self.out_dim(weight)] if weight and weight.shape else 0
        if role.startswith("cross_attn") and name == "qkv" and hasattr(module, "q_attn"):
            packing: Packing | None = Packing(1, (("k", n // 2), ("v", n // 2)))  # GPT-2's, beside a query of its own
        else:
            packing = packing_of(self.model_type, module, attribute, name, n)
        if packing is None:
            yield f"{role}.{name}", self.inside(path)
            return
        for tensor in tensors:
            dim = self.out_dim(tensor)
            if dim >= len(tensor.shape) or tensor.shape[dim] != n:
                yield f"{role}.{name}", self.slices(tensor.name)  # an adapter's, or the scales of a quantised weight
                continue
            for part, indices in packing.indices().items():
                index = tuple(indices if d == dim else (range(size),) for d, size in enumerate(tensor.shape))
                yield f"{role}.{part}", (Slice(tensor.name, index),)

    def out_dim(self, tensor: TensorInfo) -> int:
        """The dimension of a projection's outputs."""
        holder = self.root.get_submodule(tensor.name[len(self.name) + 1 :].rpartition(".")[0])
        return projection_axes(holder, tensor.shape)[0] or 0

    def moe(self, role: str, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Router, experts and shared expert of a mixture of experts."""
        for name in self.direct(module):
            target = "router" if name in families.ROUTER_BUFFERS else _own_name(name)
            yield f"{role}.{target}", self.slices(f"{path}.{name}")
        parallel = [n for n, child in module.named_children() if type(child).__name__.endswith("ParallelExperts")]
        if parallel:
            yield from self.packed_experts(role, module, path, parallel)
        for name, child in module.named_children():
            here = f"{path}.{name}"
            if not self.has_tensors(here) or name in parallel:
                continue
            if name in families.ROUTERS:
                yield f"{role}.router", self.inside(here)
            elif name in families.EXPERTS:
                yield from self.experts(role, child, here)
            elif name in families.SHARED_EXPERTS:
                yield from self.shared(f"{role}.shared_expert", child, here)
            else:
                yield from self.projection(role, families.FFN_PARTS.get(name, _own_name(name)), module, name, here)

    def sequential_ffn(self, module: nn.Sequential, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """A bare sequence of a linear layer, a nonlinearity and a linear layer."""
        linear = [n for n, child in module.named_children() if isinstance(child, nn.Linear)]
        if len(linear) == 2:
            yield "ffn.up", self.inside(f"{path}.{linear[0]}")
            yield "ffn.down", self.inside(f"{path}.{linear[1]}")

    def shared(self, role: str, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """The parts of a shared expert."""
        yield from self.named_parts(role, module, path, families.FFN_PARTS)

    def experts(self, role: str, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Single experts: of a module list, or of packed tensors whose layout is known; else `experts` as a whole."""
        if isinstance(module, nn.ModuleList):
            for j, expert in enumerate(module):
                yield from self.named_parts(f"{role}.experts[{j}]", expert, f"{path}.{j}", families.FFN_PARTS)
            return
        yield from self.packed_experts(role, module, path, ("",))

    def packed_experts(
        self, role: str, module: nn.Module, path: str, below: Sequence[str]
    ) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Experts in tensors that hold all of them, in the children `below` of a module (`""` for all)."""
        inside = tuple(f"{path}.{name}." if name else f"{path}." for name in below)
        names = {t.name[len(path) + 1 :]: t.name for t in self.tensors if t.name.startswith(inside)}
        shapes = {own: self.shapes[name] for own, name in names.items()}
        layout = expert_tensors(module, shapes)
        if layout is None:
            yield f"{role}.experts", tuple(whole(name, self.shapes[name]) for name in names.values())
            return
        self.axes |= {names[own]: tensor.axes for own, tensor in layout.items()}
        for j, part, piece in expert_slices(layout, shapes, names):
            yield f"{role}.{part}" if j is None else f"{role}.experts[{j}].{part}", (piece,)

    @staticmethod
    def direct(module: nn.Module) -> list[str]:
        """Names of the parameters and buffers that a module holds itself."""
        return [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]

    def inside(self, path: str) -> tuple[Slice, ...]:
        """Every tensor below `path`, whole."""
        return tuple(whole(t.name, t.shape) for t in self.tensors if t.name.startswith(path + "."))

    def slices(self, tensor: str) -> tuple[Slice, ...]:
        """One tensor, whole."""
        return (whole(tensor, self.shapes[tensor]),)

    def has_tensors(self, path: str) -> bool:
        """Whether any tensor lies below `path`."""
        return any(name.startswith(path + ".") for name in self.shapes)


def _one_projection_for_both(attention: nn.Module) -> bool:
    """Whether keys are values too: a key projection and no value projection (Gemma 4)."""
    names = dict(attention.named_children())
    return "k_proj" in names and not any(name.startswith(("v_proj", "kv_")) for name in names)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: its class says so and it holds no attention."""
    return bool(families.NORM_CLASS.search(type(module).__name__)) and not _holds_attention(module)


def _holds_attention(module: nn.Module) -> bool:
    return any(families.ATTENTION_CLASS.search(type(m).__name__) for m in module.modules() if m is not module)


def _block_order() -> list[str]:
    pre = [f"{m}{suffix}" for m in ("mixer", *families.MIXERS) for suffix in ("_norm", "", "_post_norm")]
    return ["shared_norm", *pre, "cross_attn_norm", "cross_attn", "ffn_norm", "ffn", "ffn_post_norm"]


def _own_name(name: str) -> str:
    """An attribute as a step of a component's name: no leading digit, and no name that means something else."""
    return f"part_{name}" if name[0].isdigit() else families.RESERVED.get(name, name)
