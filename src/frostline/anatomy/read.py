"""Reading the anatomy of a live model, on any device (the meta device included: no weights are needed).

The token embedding and the head come from the model's own accessors, blocks from what transformers checkpoints as one
unit, a block's branches from what their modules are. Inside a branch a tensor gets the field's name where the table
knows it and keeps its own where not, so nothing is left out; what belongs to no branch is an `AnatomyError` that lists
it. Read `read_anatomy` first; `blocks.py` reads one block. Loads nothing and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frostline.anatomy import families
from frostline.anatomy.blocks import BlockReader, Named, is_norm
from frostline.anatomy.component import Anatomy, Component, TensorInfo
from frostline.anatomy.cuts import cuts_of
from frostline.anatomy.layouts import Axes, projection_axes
from frostline.anatomy.slices import Slice, whole
from frostline.errors import AnatomyError


def read_anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a causal language model of transformers. Raises `AnatomyError` listing what is not understood."""
    for accessor in ("get_input_embeddings", "get_output_embeddings", "get_decoder"):
        if not callable(getattr(model, accessor, None)):
            raise AnatomyError(
                f"{type(model).__name__} is not a causal language model of transformers (it has no {accessor}); "
                "for another module name its parts with `anatomy_of_parts`"
            )
    tensors = list_tensors(model)
    reader = _ModelReader(model, tensors)
    named = list(reader.read())
    read = {s.tensor for _, slices in named for s in slices}
    unknown = [f"{t.name} {t.shape}" for t in tensors if t.name not in read]
    if unknown:
        raise AnatomyError(
            f"{reader.model_type}: {len(unknown)} tensors are not understood:\n  " + "\n  ".join(unknown)
        )
    components = _joined(named)
    cuts = tuple(cuts_of(components, tensors, reader.axes, reader.n_heads))
    return Anatomy(model_type=reader.model_type, components=components, tensors=tensors, cuts=cuts)


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
        if not slices:
            raise AnatomyError(f"component {name} names no tensor or module")
        components.append(Component(name=name, slices=tuple(slices)))
    return Anatomy(model_type=type(module).__name__, components=tuple(components), tensors=tensors)


def list_tensors(module: nn.Module) -> tuple[TensorInfo, ...]:
    """Every name of a parameter or buffer, tied names included, with the name that owns the storage."""
    persistent = set(module.state_dict(keep_vars=True))
    first: dict[object, str] = {}
    out = []
    for kind, items in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            source = first.setdefault(_storage_key(tensor) if kind == "parameter" else id(tensor), name)
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


def _storage_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of one storage; the object itself where there is no storage."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder's blocks, in the order of the model, with their names in it. Raises `AnatomyError` for none.

    What transformers checkpoints as one unit is a block; where a model has no such units, the elements of the module
    list with the most parameters are.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    name_of = {id(m): n for n, m in model.named_modules()}
    candidates = [decoder, model] if isinstance(decoder, nn.Module) else [model]
    for root in candidates:
        units = [m for m in root.modules() if isinstance(m, GradientCheckpointingLayer)]
        nested = {id(inner) for unit in units for inner in unit.modules() if inner is not unit}
        outer = [u for u in units if id(u) not in nested]
        if outer:
            return [(name_of[id(u)], u) for u in outer]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise AnatomyError(f"{type(model).__name__} has no list of blocks")
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return [(name_of[id(b)], b) for b in largest]


def embedding_dropout(model: nn.Module) -> list[nn.Module]:
    """Dropout on what the embedding gives: the modules for it that stand beside the blocks and not in one.

    In every decoder-only type of transformers, dropout outside a block and outside of what has parameters is called
    before the first block (`tests/anatomy/test_all_types.py`). Empty for a model without blocks.
    """
    if getattr(model, "get_decoder", None) is None:
        return []
    try:
        names = [name for name, _ in find_blocks(model)]
    except AnatomyError:
        return []
    above = {prefix for name in names for prefix in _prefixes(name)}
    holders = [model.get_submodule(prefix) for prefix in sorted(above)]
    return [child for holder in holders for child in holder.children() if isinstance(child, _DropoutNd)]


def _prefixes(name: str) -> Iterator[str]:
    """`a.b.c` → ``, `a`, `a.b`."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(len(parts)))


def _apart_from_adapters(name: str, slices: tuple[Slice, ...]) -> Iterator[Named]:
    """A part's own tensors, and those of an adapter on it as a part of its own: `layers[3].adapter.attn_q`."""
    adapters = tuple(s for s in slices if families.ADAPTERS.search(f".{s.tensor}."))
    yield name, tuple(s for s in slices if s not in adapters)
    if adapters:
        first, *rest = name.split(".")
        at, inside = (f"{first}.", rest) if first.startswith("layers[") else ("", [first, *rest])
        yield f"{at}adapter.{'_'.join(re.sub(r'[^a-z_0-9]+', '_', step).strip('_') for step in inside)}", adapters


def _joined(named: Sequence[Named]) -> tuple[Component, ...]:
    slices: dict[str, dict[Slice, None]] = {}
    for name, found in (part for given in named for part in _apart_from_adapters(*given)):
        if found:  # some norms have no parameters
            slices.setdefault(name, {}).update(dict.fromkeys(found))
    return tuple(Component(name=n, slices=tuple(found)) for n, found in slices.items())


class _ModelReader:
    """Walks one model from the embedding to the head."""

    def __init__(self, model: nn.Module, tensors: Sequence[TensorInfo]) -> None:
        self.model = model
        self.tensors = tensors
        self.model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
        self.axes: dict[str, Axes] = {
            t.name: projection_axes(model.get_submodule(t.name.rpartition(".")[0]), t.shape) for t in tensors
        }
        """Tensor → dimensions of its outputs and inputs."""
        self.n_heads: dict[str, int] = {}
        """Attention branch → number of its query heads; filled by `read`."""

    def read(self) -> Iterator[Named]:
        blocks = find_blocks(self.model)
        before, after = self.outside([name for name, _ in blocks])
        yield from before
        for i, (name, block) in enumerate(blocks):
            block_reader = BlockReader(f"layers[{i}]", name, block, self.tensors, self.model_type)
            yield from block_reader.read()
            self.axes |= block_reader.axes
            self.n_heads |= block_reader.n_heads
        yield from after

    def outside(self, blocks: Sequence[str]) -> tuple[list[Named], list[Named]]:
        """What is not in a block: what comes before the blocks, and what comes after them."""
        inside = tuple(f"{name}." for name in blocks)
        backbone = self.backbone(blocks)
        outer = [t.name for t in self.tensors if not t.name.startswith(inside)]
        norms = {n.rpartition(".")[0] for n in outer if self.is_stream_norm(n, backbone)}
        before: list[Named] = []
        after: list[Named] = []
        for tensor in self.tensors:
            if tensor.name.startswith(inside):
                continue
            part = self.part_of(tensor, backbone, only_norm=len(norms) == 1)
            if part is not None:
                late = part.split(".")[0] in ("final_norm", "head_norm", "head")
                (after if late else before).append((part, (whole(tensor.name, tensor.shape),)))
        return before, after

    def backbone(self, blocks: Sequence[str]) -> str:
        """The name of the smallest model inside the model that holds all blocks; empty when it is the model itself."""
        inner = [n for n, m in self.model.named_modules() if n and isinstance(m, PreTrainedModel)]
        holding = [n for n in inner if all(b.startswith(n + ".") for b in blocks)]
        return max(holding, key=len, default="")

    def is_stream_norm(self, name: str, backbone: str) -> bool:
        """Whether a tensor outside the blocks belongs to a norm of the decoder itself."""
        path = name.split(".")[:-1]
        parent = ".".join(path[:-1])
        return bool(path) and is_norm(self.model.get_submodule(".".join(path))) and (parent == backbone or not parent)

    def part_of(self, tensor: TensorInfo, backbone: str, *, only_norm: bool) -> str | None:
        """The part that a tensor outside the blocks belongs to; None when it is not understood."""
        *path, own = tensor.name.split(".")
        chain = [self.model.get_submodule(".".join(path[:n])) for n in range(1, len(path) + 1)]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()  # type: ignore[operator]
        if any(m is embedding for m in chain):
            return "embed"
        if head is not None and any(m is head for m in chain):
            return "head"
        if not ".".join(path).startswith(backbone) and path[:1] != ["lm_head"] and path[:1] != ["head"]:
            return f"other.{'.'.join(map(_step, path))}" if self.is_composite() else None
        rest = path[len(backbone.split(".")) :] if backbone else path
        if rest and families.TOWERS.search(rest[0]):
            return f"other.{'.'.join(map(_step, rest))}"
        if families.RESIDUAL_ATTRIBUTES.search((rest or [own])[0]):
            return f"residual.{'_'.join(rest) or own}"
        if _is_position((*path, own, type(chain[-1]).__name__ if chain else "")):
            return "position"
        if chain and is_norm(chain[-1]):
            if path[0] in ("lm_head", "head"):
                return "head_norm"
            return "final_norm" if only_norm or "embed" not in ".".join(rest) else "embed_norm"
        if path[:1] in (["lm_head"], ["head"]):
            return f"head.{'_'.join(path[1:])}"
        if rest in (["project_in"], ["project_out"]):  # OPT with embeddings of another width
            return "embed.project_in" if rest == ["project_in"] else "head.project_out"
        if chain and isinstance(chain[-1], nn.Embedding):
            return f"embed.{'_'.join(rest)}"
        if tensor.kind == "buffer" and own in families.MASKS:
            return "mask"
        if not rest and tensor.kind == "parameter":
            return f"residual.{own}"
        return None

    def is_composite(self) -> bool:
        """Whether the decoder is one of several models (vision, audio, encoder) in this one."""
        config = self.model.config
        return config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False)  # type: ignore[union-attr, operator]


def _is_position(names: Sequence[str]) -> bool:
    words = ("wpe", "position", "pos_emb", "pos_encoding", "rotary")
    return any(word in name.lower() for name in names for word in words)


def _step(attribute: str) -> str:
    return attribute if not attribute[0].isdigit() else f"part_{attribute}"
