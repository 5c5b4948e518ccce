"""Components: the named parts of a model, and the anatomy that lists them all.

A component is backed by one or more slices of parameters and buffers. An anatomy's components partition every
parameter and buffer name of the model: `Anatomy` refuses to exist otherwise. Cuts divide components further, into
heads, neurons and rows. Plain data, no torch; how it is read from a model is `read.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from frostline.anatomy.slices import Indices, Slice, compress, overlap, slice_from_json, slice_to_json, whole
from frostline.errors import AnatomyError

Segment = tuple[str, int | None]
"""One step of a component's name: `layers[3]` is `("layers", 3)`, `attn` is `("attn", None)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One name under which the model has a parameter or buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch writes it, without `torch.`: `float32`, `bfloat16`."""
    kind: Literal["parameter", "buffer"]
    persistent: bool = True
    """Whether a checkpoint holds it."""
    alias_of: str | None = None
    """For a tied parameter: the name that owns the storage."""

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return whole(self.name, self.shape).n_elements

    @property
    def element_bytes(self) -> int:
        """Bytes per element, from the number of bits in the type's name."""
        bits = re.search(r"\d+", self.dtype)
        return max(int(bits[0]) // 8, 1) if bits else 1

    @property
    def is_quantised(self) -> bool:
        """Whether it holds codes instead of numbers that a gradient could move."""
        return not self.dtype.startswith(("float", "bfloat", "complex")) or self.dtype.startswith("float8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A named part of a model."""

    name: str
    """Such as `embed`, `layers[3].attn.q`, `layers[3].ffn.experts[7].down`, `final_norm`, `head`."""
    slices: tuple[Slice, ...]
    """The elements that belong to it, in parameters and buffers."""

    @property
    def path(self) -> tuple[Segment, ...]:
        """The name's steps, outermost first."""
        return parse_path(self.name)

    @property
    def is_other(self) -> bool:
        """Whether it lies outside the decoder, in another model of a composite (vision, audio)."""
        return self.path[0][0] == "other"

    @property
    def is_norm(self) -> bool:
        """Whether it is a normalisation: `attn_norm`, `ffn_norm`, `attn.q_norm`, `final_norm`, …"""
        return self.path[-1][0].endswith("norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A second way to divide a part: its attention heads, its neurons, its rows. Members lie across components.

    Member `i` holds the `i`-th of `n` equal, consecutive chunks of every piece's own indices along one dimension.
    """

    name: str
    """Such as `layers[3].attn.heads`, `layers[3].ffn.neurons`, `embed.rows`."""
    n: int
    """Number of members."""
    pieces: tuple[tuple[Slice, int], ...]
    """Slices and the dimension that each is cut along."""

    @property
    def path(self) -> tuple[Segment, ...]:
        """The name's steps, outermost first."""
        return parse_path(self.name)

    def members(self, chosen: Iterable[int]) -> tuple[Slice, ...]:
        """The slices that hold the chosen members (0-based) and nothing else."""
        wanted = tuple(sorted(set(chosen)))
        if len(wanted) == self.n:
            return tuple(piece for piece, _ in self.pieces)
        return tuple(_chunks(piece, dim, self.n, wanted) for piece, dim in self.pieces)


def _chunks(piece: Slice, dim: int, n: int, wanted: tuple[int, ...]) -> Slice:
    taken = _taken(piece.index[dim], n, wanted)
    return Slice(piece.tensor, (*piece.index[:dim], taken, *piece.index[dim + 1 :]))


@lru_cache(maxsize=512)
def _taken(indices: Indices, n: int, wanted: tuple[int, ...]) -> Indices:
    """The chosen of `n` equal chunks; remembered, because thousands of experts are cut alike."""
    flat = [i for r in indices for i in r]
    width = len(flat) // n
    return compress(i for chunk in wanted for i in flat[chunk * width : (chunk + 1) * width])


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The ordered, complete, non-overlapping components of one model."""

    model_type: str
    """The architecture's name in transformers, or the class name of another module."""
    components: tuple[Component, ...]
    tensors: tuple[TensorInfo, ...]
    """Every name of a parameter or buffer, tied names included, in the model's order."""
    cuts: tuple[Cut, ...] = ()
    """Heads, neurons and rows: they divide components and are none themselves."""

    def __post_init__(self) -> None:
        for component in self.components:
            parse_path(component.name)
        check_partition(self.components, self.tensors)
        check_cuts(self.cuts, self.tensors)

    @cached_property
    def tensor(self) -> dict[str, TensorInfo]:
        """Tensor name → what is known of it."""
        return {t.name: t for t in self.tensors}

    @cached_property
    def component(self) -> dict[str, Component]:
        """Component name → component."""
        return {c.name: c for c in self.components}

    @cached_property
    def owner(self) -> dict[Slice, Component]:
        """Slice → the component it belongs to."""
        return {s: c for c in self.components for s in c.slices}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tied parameter name → the name that owns the storage."""
        return {t.name: t.alias_of for t in self.tensors if t.alias_of is not None}

    @cached_property
    def tied_components(self) -> tuple[tuple[str, str], ...]:
        """Pairs (tied component, component that owns the storage)."""
        names = {s.tensor: c.name for c in self.components for s in c.slices}
        return tuple((names[alias], names[source]) for alias, source in self.ties.items())

    @property
    def n_parameters(self) -> int:
        """Parameter elements, tied storage counted once."""
        return sum(t.n_elements for t in self.tensors if t.kind == "parameter" and t.alias_of is None)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len({c.path[0] for c in self.components if c.path[0][0] == "layers"})

    def learnable(self, piece: Slice) -> bool:
        """Whether the slice lies in a parameter of real numbers: buffers and quantised weights never learn."""
        info = self.tensor[piece.tensor]
        return info.kind == "parameter" and not info.is_quantised

    def storage_name(self, tensor: str) -> str:
        """The name that owns the storage of `tensor`."""
        return self.tensor[tensor].alias_of or tensor

    def is_bias(self, piece: Slice) -> bool:
        """Whether the slice lies in a bias parameter."""
        return self.learnable(piece) and re.search(r"bias$", piece.tensor) is not None

    def n_own_elements(self, component: Component) -> int:
        """Parameter elements of a component; tied storage counts where it is owned."""
        own = (s for s in component.slices if self.learnable(s) and s.tensor not in self.ties)
        return sum(s.n_elements for s in own)


@lru_cache(maxsize=200_000)
def parse_path(name: str) -> tuple[Segment, ...]:
    """`layers[3].attn.q` → `(("layers", 3), ("attn", None), ("q", None))`."""
    segments: list[Segment] = []
    for step in name.split("."):
        match = re.fullmatch(r"([A-Za-z_]\w*)(?:\[(\d+)\])?", step)
        if match is None:
            raise AnatomyError(f"'{name}' is no component name: write it as in layers[3].attn.q")
        segments.append((match[1], int(match[2]) if match[2] is not None else None))
    return tuple(segments)


def reaches_outside(piece: Slice, shape: tuple[int, ...]) -> bool:
    """Whether a slice names an index that the tensor does not have; looks at the ends of its ranges only."""
    ranges = [(r, n) for dim, n in zip(piece.index, shape, strict=False) for r in dim]
    return any(not r or min(r[0], r[-1]) < 0 or max(r[0], r[-1]) >= n for r, n in ranges)


def check_partition(components: tuple[Component, ...], tensors: tuple[TensorInfo, ...]) -> None:
    """Raise `AnatomyError` unless every element of every tensor belongs to exactly one component."""
    shapes = {t.name: t.shape for t in tensors}
    held: dict[str, list[Slice]] = {name: [] for name in shapes}
    for c in components:
        for s in c.slices:
            if s.tensor not in shapes:
                raise AnatomyError(f"component {c.name} names a tensor the model does not have: {s.tensor}")
            held[s.tensor].append(s)
    names = Counter(c.name for c in components)
    problems = [f"two components are named {n}" for n, count in names.items() if count > 1]
    for name, shape in shapes.items():
        slices = held[name]
        if any(reaches_outside(s, shape) for s in slices):
            problems.append(f"{name} {shape}: a slice of it reaches outside")
            continue
        if any(len(s.index) != len(shape) for s in slices):
            problems.append(f"{name} {shape}: a slice of it has another number of dimensions")
            continue
        n_held, n_all = sum(s.n_elements for s in slices), whole(name, shape).n_elements
        if n_held < n_all:
            problems.append(f"{name} {shape}: {n_all - n_held} of {n_all} elements belong to no component")
        elif n_held > n_all or overlap(slices):
            problems.append(f"{name} {shape}: some elements belong to two components")
    if problems:
        raise AnatomyError("the components do not partition the model:\n  " + "\n  ".join(problems))


def check_cuts(cuts: tuple[Cut, ...], tensors: tuple[TensorInfo, ...]) -> None:
    """Raise `AnatomyError` unless every cut divides slices of the model's tensors into equal chunks."""
    shapes = {t.name: t.shape for t in tensors}
    for cut in cuts:
        for piece, dim in cut.pieces:
            shape = shapes.get(piece.tensor)
            if shape is None or len(piece.index) != len(shape) or reaches_outside(piece, shape):
                raise AnatomyError(f"{cut.name} cuts what the model does not have: {piece}")
            if cut.n < 1 or not 0 <= dim < len(shape) or piece.shape[dim] % cut.n:
                raise AnatomyError(f"{cut.name}: dimension {dim} of {piece} does not divide into {cut.n} equal chunks")


def anatomy_to_json(anatomy: Anatomy) -> dict[str, Any]:
    """The anatomy as plain data."""
    return {
        "model_type": anatomy.model_type,
        "n_parameters": anatomy.n_parameters,
        "n_layers": anatomy.n_layers,
        "components": [
            {
                "name": c.name,
                "n_elements": anatomy.n_own_elements(c),
                "slices": [slice_to_json(s) for s in c.slices],
            }
            for c in anatomy.components
        ],
        "cuts": [
            {"name": c.name, "n": c.n, "pieces": [{**slice_to_json(s), "dim": dim} for s, dim in c.pieces]}
            for c in anatomy.cuts
        ],
        "tensors": [asdict(t) for t in anatomy.tensors],
        "ties": [{"component": a, "tied_to": b} for a, b in anatomy.tied_components],
    }


def anatomy_from_json(data: Mapping[str, Any]) -> Anatomy:
    """The inverse of `anatomy_to_json`. Raises `AnatomyError` when the components do not partition the tensors."""
    return Anatomy(
        model_type=data["model_type"],
        components=tuple(
            Component(name=c["name"], slices=tuple(map(slice_from_json, c["slices"]))) for c in data["components"]
        ),
        tensors=tuple(TensorInfo(**{**t, "shape": tuple(t["shape"])}) for t in data["tensors"]),
        cuts=tuple(
            Cut(name=c["name"], n=c["n"], pieces=tuple((slice_from_json(p), p["dim"]) for p in c["pieces"]))
            for c in data["cuts"]
        ),
    )
