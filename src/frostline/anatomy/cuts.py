"""Heads, neurons and rows: the cuts of a model, from its components and the axes of their tensors.

A head is the query rows and output columns that only it uses, with its key and value rows where every query head has
its own; where several share one (grouped queries), those rows are a `kv_heads` member. A neuron is its row of gate and
up and its column of down. A row is a token's, of the embedding or the head. Read `cuts_of` first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from frostline.anatomy.component import Component, Cut, TensorInfo
from frostline.anatomy.layouts import Axes
from frostline.anatomy.slices import Slice

CUTS = ("heads", "kv_heads", "neurons", "rows")
"""Every kind of cut."""

_ROW_OWNERS = ("embed", "head", "position")
_EXTRAS = ("gate", "gate_bias", "sinks", "o_norm")
"""Further parts of attention that belong to query heads: as many rows as there are heads, or as their outputs."""

Pieces = tuple[tuple[Slice, int], ...]


@dataclass(frozen=True)
class _Reader:
    tensors: Mapping[str, TensorInfo]
    axes: Mapping[str, Axes]

    def along(self, components: Iterable[Component | None], side: int) -> Pieces:
        """The parameter slices of components with their output (0) or input (1) dimension, where they have one."""
        slices = [s for c in components if c is not None for s in c.slices]
        pieces = ((s, self.axes[s.tensor][side]) for s in slices if self.tensors[s.tensor].kind == "parameter")
        return tuple((s, dim) for s, dim in pieces if dim is not None)


def cuts_of(
    components: Sequence[Component],
    tensors: Sequence[TensorInfo],
    axes: Mapping[str, Axes],
    n_heads: Mapping[str, int],
) -> Iterator[Cut]:
    """Every cut that the sizes allow.

    `axes`: tensor → dimensions of its outputs and inputs; `n_heads`: attention branch → number of its query heads.
    """
    reader = _Reader({t.name: t for t in tensors}, axes)
    branches: dict[str, dict[str, Component]] = defaultdict(dict)
    for c in components:
        branch, part = _split(c.name)
        branches[branch][part] = c
    for branch, parts in branches.items():
        if branch in n_heads:
            yield from _heads(branch, parts, n_heads[branch], reader)
        yield from _neurons(branch, parts, reader)
        for owner in _ROW_OWNERS:
            if branch == "" and owner in parts:
                yield from _rows(owner, parts[owner], reader)


def _split(name: str) -> tuple[str, str]:
    """(branch, part): the part is all that follows `attn`, elsewhere the last step."""
    steps = name.split(".")
    at = next((i for i, step in enumerate(steps) if step.split("[")[0] == "attn"), len(steps) - 2)
    return ".".join(steps[: at + 1]), ".".join(steps[at + 1 :])


def _heads(branch: str, parts: Mapping[str, Component], n: int, reader: _Reader) -> Iterator[Cut]:
    query, out = reader.along(_of(parts, "q", "q.b"), 0), reader.along([parts.get("o")], 1)
    both = reader.along(_of(parts, "kv"), 0)  # one projection for keys and values
    key = both or reader.along(_of(parts, "k", "k.b"), 0)
    value = () if both else reader.along(_of(parts, "v", "v.b"), 0)
    if not query or not out or not _divide((*query, *out), n):
        return
    extras = [p for name in _EXTRAS if name in parts for p in reader.along([parts[name]], 0)]
    width = sum(s.shape[dim] for s, dim in out)
    own = (*query, *_norm(parts, "q_norm", query, reader), *out)
    own += tuple((s, dim) for s, dim in extras if s.shape[dim] in (n, width))
    n_kv = _n_kv(query, key, n) if "k.b" not in parts else n
    if key and (value or both) and n_kv and _divide((*key, *value), n_kv):
        shared = (*key, *_norm(parts, "k_norm", key, reader), *value)
        if n_kv == n:
            own += shared
        yield Cut(name=f"{branch}.heads", n=n, pieces=own)
        yield Cut(name=f"{branch}.kv_heads", n=n_kv, pieces=shared)
    else:
        yield Cut(name=f"{branch}.heads", n=n, pieces=own)


def _n_kv(query: Pieces, key: Pieces, n: int) -> int | None:
    """Number of key heads: as wide as the query's."""
    if not key:
        return None
    (q, q_dim), (k, k_dim) = query[0], key[0]
    n_kv, rest = divmod(k.shape[k_dim] * n, q.shape[q_dim])
    return n_kv if n_kv and not rest and n % n_kv == 0 else None


def _norm(parts: Mapping[str, Component], name: str, projection: Pieces, reader: _Reader) -> Pieces:
    """A norm over all heads at once, or with a row per head, has weights per head; one that all share has none."""
    (s, dim), pieces = projection[0], reader.along([parts.get(name)], 0)
    return tuple((p, d) for p, d in pieces if s.shape[dim] in (p.shape[d], p.n_elements))


def _neurons(branch: str, parts: Mapping[str, Component], reader: _Reader) -> Iterator[Cut]:
    rows, columns = reader.along(_of(parts, "gate", "up"), 0), reader.along([parts.get("down")], 1)
    inner = reader.along([parts.get("down_norm")], 0)
    widths = {s.shape[dim] for s, dim in (*rows, *columns)}
    if "up" in parts and columns and len(widths) == 1:
        n = widths.pop()
        pieces = (*rows, *((s, d) for s, d in inner if s.shape[d] == n), *columns)
        yield Cut(name=f"{branch}.neurons", n=n, pieces=pieces)


def _rows(owner: str, component: Component, reader: _Reader) -> Iterator[Cut]:
    pieces = reader.along([component], 0)
    sizes = {s.shape[dim] for s, dim in pieces}
    if len(sizes) == 1:
        yield Cut(name=f"{owner}.rows", n=sizes.pop(), pieces=pieces)


def _of(parts: Mapping[str, Component], *names: str) -> list[Component]:
    return [parts[name] for name in names if name in parts]


def _divide(pieces: Pieces, n: int) -> bool:
    return all(s.shape[dim] % n == 0 for s, dim in pieces)
