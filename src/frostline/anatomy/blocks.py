"""Reading one block: its norms by what they feed, its branches by what they are, and every tensor inside them.

A branch is found by its module's class; a tensor inside a branch gets the field's name where `families` knows its
attribute, and keeps its attribute's name where not. Packed q/k/v and packed experts are cut into slices where the
layout is known; where it is not, the packed tensor is one part (`attn.qkv`). Read `BlockReader.read` first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import nn

from frostline.anatomy import families
from frostline.anatomy.component import TensorInfo
from frostline.anatomy.slices import Slice, part, whole

Named = tuple[str, tuple[Slice, ...]]
"""A component name and slices for it; several may name the same component."""


class BlockReader:
    """Reads one block of a model."""

    def __init__(self, at: str, name: str, block: nn.Module, tensors: Sequence[TensorInfo], model_type: str) -> None:
        self.at, self.name, self.root, self.model_type = at, name, block, model_type
        self.tensors = [t for t in tensors if t.name.startswith(name + ".")]
        self.shapes = {t.name: t.shape for t in self.tensors}

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
            yield from self.named_parts(role, module, path, families.ATTENTION_PARTS)
        elif kind == "ffn" and any(n in families.EXPERTS or n in families.ROUTERS for n, _ in module.named_children()):
            yield from self.moe(role, module, path)
        elif kind == "ffn":
            yield from self.named_parts(role, module, path, families.FFN_PARTS)
        elif kind == "linear_attn":
            yield from self.named_parts(role, module, path, families.LINEAR_ATTENTION_PARTS)
        else:
            yield from self.named_parts(role, module, path, {})

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
            if known == "qkv":
                yield from self.packed_qkv(role, name, child, here)
            elif known is None and any(n in names for n, _ in child.named_children()):
                yield from self.named_parts(role, child, here, names)  # a wrapper such as GPT-Neo's `attn.attention`
            else:
                yield f"{role}.{known or _own_name(name)}", self.inside(here)

    def packed_qkv(
        self, role: str, attribute: str, module: nn.Module, path: str
    ) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """q, k and v of a packed projection, where all outputs of one follow all of another; else `qkv` as a whole."""
        tensors = [t for t in self.tensors if t.name.startswith(path + ".")]
        equal_thirds = attribute == "c_attn" and all(t.shape[_out_dim(module, t)] % 3 == 0 for t in tensors)
        if not equal_thirds:
            yield f"{role}.qkv", self.inside(path)
            return
        for tensor in tensors:
            dim = _out_dim(module, tensor)
            third = tensor.shape[dim] // 3
            for part_name, indices in zip("qkv", _consecutive(third, third, third), strict=True):
                yield f"{role}.{part_name}", (part(tensor.name, tensor.shape, dim, indices),)

    def moe(self, role: str, module: nn.Module, path: str) -> Iterator[tuple[str, tuple[Slice, ...]]]:
        """Router, experts and shared expert of a mixture of experts."""
        for name in self.direct(module):
            target = "router" if name in families.ROUTER_BUFFERS else _own_name(name)
            yield f"{role}.{target}", self.slices(f"{path}.{name}")
        for name, child in module.named_children():
            here = f"{path}.{name}"
            if not self.has_tensors(here):
                continue
            if name in families.ROUTERS:
                yield f"{role}.router", self.inside(here)
            elif name in families.EXPERTS:
                yield from self.experts(role, child, here)
            elif name in families.SHARED_EXPERTS:
                yield from self.shared(f"{role}.shared_expert", child, here)
            else:
                yield f"{role}.{families.FFN_PARTS.get(name, _own_name(name))}", self.inside(here)

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
        packed = {t.name.rpartition(".")[2]: t for t in self.tensors if t.name.startswith(path + ".")}
        plain = set(packed) == {"gate_up_proj", "down_proj"} and not getattr(module, "is_transposed", False)
        if plain and getattr(module, "is_concatenated", True) and _gate_up_fits(*packed.values()):
            yield from _packed_experts(role, packed["gate_up_proj"], packed["down_proj"])
        else:
            yield f"{role}.experts", self.inside(path)

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


def _out_dim(module: nn.Module, tensor: TensorInfo) -> int:
    """The dimension of a projection's outputs: the last one for GPT-2's `Conv1D`, whose weight is (inputs, outputs)."""
    return len(tensor.shape) - 1 if type(module).__name__ == "Conv1D" else 0


def _consecutive(*widths: int) -> list[range]:
    return [range(a, b) for a, b in pairwise(accumulate(widths, initial=0))]


def _gate_up_fits(first: TensorInfo, second: TensorInfo) -> bool:
    gate_up, down = sorted((first, second), key=lambda t: t.name.endswith("down_proj"))
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        return False
    n_experts, two_width, hidden = gate_up.shape
    return down.shape == (n_experts, hidden, two_width // 2)


def _packed_experts(role: str, gate_up: TensorInfo, down: TensorInfo) -> Iterator[Named]:
    """`gate_up_proj` (experts, 2·width, hidden): gate rows, then up rows; `down_proj` (experts, hidden, width)."""
    n_experts, two_width, hidden = gate_up.shape
    for j in range(n_experts):
        here = f"{role}.experts[{j}]"
        for name, rows in zip(("gate", "up"), _consecutive(two_width // 2, two_width // 2), strict=True):
            yield f"{here}.{name}", (Slice(gate_up.name, ((range(j, j + 1),), (rows,), (range(hidden),))),)
        yield f"{here}.down", (part(down.name, down.shape, 0, range(j, j + 1)),)
