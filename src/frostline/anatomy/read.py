"""Reading the anatomy of a live model, on any device (the meta device included: no weights are needed).

Names come from the model's own accessors and from structure: the token embedding and the head by their accessors,
blocks as the module list of the decoder, a block's branches by what they hold. What is not understood is an
`AnatomyError` that lists it. Read `read_anatomy` first. Loads nothing and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from torch import nn

from frostline.anatomy import families
from frostline.anatomy.component import Anatomy, Component, TensorInfo
from frostline.anatomy.slices import Slice, part, whole
from frostline.errors import AnatomyError

_BLOCK_ORDER = ("attn_norm", "attn", "attn_post_norm", "ffn_norm", "ffn", "ffn_post_norm")
"""Parts of a block in the order of the forward pass."""

Named = tuple[str, tuple[Slice, ...]]
"""A component name and slices for it; several may name the same component."""


def read_anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a causal language model of transformers. Raises `AnatomyError` listing what is not understood."""
    for accessor in ("get_input_embeddings", "get_output_embeddings", "get_decoder"):
        if not callable(getattr(model, accessor, None)):
            raise AnatomyError(
                f"{type(model).__name__} is not a causal language model of transformers (it has no {accessor}); "
                "for another module name its parts with `anatomy_of_parts`"
            )
    tensors = list_tensors(model)
    reader = _Reader(model, {t.name: t for t in tensors})
    named = list(reader.read())
    read = {s.tensor for _, slices in named for s in slices}
    unknown = [f"{t.name} {t.shape}" for t in tensors if t.name not in read]
    if unknown:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise AnatomyError(f"{kind}: {len(unknown)} tensors are not understood:\n  " + "\n  ".join(unknown))
    return Anatomy(model_type=reader.model_type, components=_joined(named), tensors=tensors)


def anatomy_of_parts(module: nn.Module, parts: Mapping[str, Sequence[str]]) -> Anatomy:
    """The anatomy of any module, its parts named by hand.

    `parts` maps a component name to the modules or tensors that it holds, by their names in the module. Raises
    `AnatomyError` when they do not partition the module's parameters and buffers.
    """
    tensors = list_tensors(module)
    components = []
    for name, members in parts.items():
        slices = []
        for member in members:
            inside = [t for t in tensors if t.name == member or t.name.startswith(member + ".")]
            if not inside:
                raise AnatomyError(f"component {name}: the module has no '{member}'")
            slices += [whole(t.name, t.shape) for t in inside]
        components.append(Component(name=name, slices=tuple(slices)))
    return Anatomy(model_type=type(module).__name__, components=tuple(components), tensors=tensors)


def list_tensors(module: nn.Module) -> tuple[TensorInfo, ...]:
    """Every name of a parameter or buffer, tied names included, with the name that owns the storage."""
    persistent = set(module.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    out = []
    for kind, items in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            source = first.setdefault(id(tensor), name)
            out.append(
                TensorInfo(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    kind="parameter" if kind == "parameter" else "buffer",
                    persistent=name in persistent,
                    alias_of=source if source != name else None,
                )
            )
    return tuple(out)


def _joined(named: Sequence[Named]) -> tuple[Component, ...]:
    slices: dict[str, list[Slice]] = {}
    for name, found in named:
        slices.setdefault(name, []).extend(found)
    return tuple(Component(name=n, slices=tuple(found)) for n, found in slices.items())


class _Reader:
    """Walks one model; holds its tensors and the names of its modules."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
        self.model, self.tensors = model, tensors
        self.names = {id(m): n for n, m in model.named_modules(remove_duplicate=True)}
        self.model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]

    def read(self) -> Iterator[Named]:
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        decoder = self.model.get_decoder()  # type: ignore[operator]
        blocks_name, blocks = _blocks(decoder)
        yield "embed", self.slices(embedding)
        for name, child in decoder.named_children():
            if child is embedding or name == blocks_name:
                continue
            if isinstance(child, nn.Embedding) or _is_rotary(child):
                yield "position", self.slices(child)
        for i, block in enumerate(blocks):
            yield from self.block(f"layers[{i}]", block)
        for name, child in decoder.named_children():
            if name != blocks_name and _is_norm(child):
                yield "final_norm", self.slices(child)
        if head is not None:
            yield "head", self.slices(head)

    def slices(self, module: nn.Module) -> tuple[Slice, ...]:
        """Every parameter and buffer of `module`, whole."""
        return tuple(whole(t.name, t.shape) for t in self.inside(module))

    def inside(self, module: nn.Module) -> list[TensorInfo]:
        prefix = self.names[id(module)] + "."
        return [t for name, t in self.tensors.items() if name.startswith(prefix)]

    def block(self, at: str, block: nn.Module) -> Iterator[Named]:
        children = dict(block.named_children())
        found: list[Named] = []
        for name, child in children.items():
            if _is_norm(child):
                role = _norm_role(name, set(children))
                found += [(f"{at}.{role}", self.slices(child))] if role else []
            elif _holds(child, families.ROUTERS) and _holds(child, families.EXPERTS):
                found += list(self.moe(f"{at}.ffn", child))
            elif _holds(child, families.PACKED_QKV) or _holds(child, ("q_proj", "k_proj", "v_proj")):
                found += list(self.attention(f"{at}.attn", child))
            elif _holds(child, families.FFN_PARTS):
                found += list(self.parts(f"{at}.ffn", child, families.FFN_PARTS))
        yield from sorted(found, key=lambda named: _BLOCK_ORDER.index(named[0].split(".")[1]))

    def attention(self, at: str, module: nn.Module) -> Iterator[Named]:
        for name, child in module.named_children():
            if name in families.PACKED_QKV:
                yield from self.packed_qkv(at, child)
        yield from self.parts(at, module, families.ATTENTION_PARTS)

    def packed_qkv(self, at: str, module: nn.Module) -> Iterator[Named]:
        for tensor in self.inside(module):
            dim = len(tensor.shape) - 1 if _is_conv1d(module) else 0
            n = tensor.shape[dim]
            if n % 3:
                return  # q, k and v of different widths: not understood, and reported as such
            cuts = [0, n // 3, 2 * n // 3, n]
            for role, (start, stop) in zip("qkv", pairwise(cuts), strict=True):
                yield f"{at}.{role}", (part(tensor.name, tensor.shape, dim, range(start, stop)),)

    def parts(self, at: str, module: nn.Module, roles: Mapping[str, str]) -> Iterator[Named]:
        for name, child in module.named_children():
            if name in roles:
                yield f"{at}.{roles[name]}", self.slices(child)

    def moe(self, at: str, module: nn.Module) -> Iterator[Named]:
        for name, child in module.named_children():
            if name in families.ROUTERS:
                yield f"{at}.router", self.slices(child)
            elif name in families.EXPERTS:
                yield from self.packed_experts(at, child)

    def packed_experts(self, at: str, module: nn.Module) -> Iterator[Named]:
        """`gate_up_proj` (experts, 2·width, hidden): gate rows, then up rows; `down_proj` (experts, hidden, width)."""
        tensors = {t.name.rpartition(".")[2]: t for t in self.inside(module)}
        if set(tensors) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
            return
        gate_up, down = tensors["gate_up_proj"], tensors["down_proj"]
        n_experts, two_width, hidden = gate_up.shape
        if down.shape != (n_experts, hidden, two_width // 2):
            return
        for j in range(n_experts):
            here = f"{at}.experts[{j}]"
            gate = Slice(gate_up.name, ((range(j, j + 1),), (range(two_width // 2),), (range(hidden),)))
            up = Slice(gate_up.name, ((range(j, j + 1),), (range(two_width // 2, two_width),), (range(hidden),)))
            yield f"{here}.gate", (gate,)
            yield f"{here}.up", (up,)
            yield f"{here}.down", (part(down.name, down.shape, 0, range(j, j + 1)),)


def _blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(n, c) for n, c in decoder.named_children() if isinstance(c, nn.ModuleList) and len(c)]
    if len(lists) != 1:
        found = ", ".join(n for n, _ in lists) or "none"
        raise AnatomyError(f"{type(decoder).__name__}: expected one list of blocks, found {found}")
    return lists[0]


def _holds(module: nn.Module, names: Sequence[str] | Mapping[str, str]) -> bool:
    return any(name in names for name, _ in module.named_children())


def _is_norm(module: nn.Module) -> bool:
    one_dimensional = all(p.dim() <= 1 for p in module.parameters())
    return "norm" in type(module).__name__.lower() and one_dimensional and not list(module.children())


def _is_rotary(module: nn.Module) -> bool:
    return not list(module.parameters()) and "rotary" in type(module).__name__.lower()


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def _norm_role(name: str, siblings: set[str]) -> str | None:
    if name == families.POST_ATTENTION_NORM:
        return "attn_post_norm" if siblings & set(families.FFN_NORMS) else "ffn_norm"
    return families.PRE_NORMS.get(name) or families.FFN_NORMS.get(name)
