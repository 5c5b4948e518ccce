"""Two saved checkpoints compared by component, one tensor at a time: what differs, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frostline.anatomy import Anatomy, Slice, read_anatomy, take, whole
from frostline.audit.movement import Movement, measure, total
from frostline.errors import AnatomyError, ModelError
from frostline.model import load_skeleton
from frostline.run_folder import checkpoint_of
from frostline.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffRow:
    """One component (or, where no anatomy is known, one tensor) of two checkpoints."""

    component: str
    n_elements: int
    bytes_changed: int
    relative_change: float
    """‖after − before‖ / ‖before‖."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diff:
    """Two checkpoints compared."""

    before: str
    after: str
    rows: tuple[DiffRow, ...]
    only_before: tuple[str, ...]
    """Tensors that only the first checkpoint has."""
    only_after: tuple[str, ...]
    """Tensors that only the second checkpoint has."""
    reshaped: tuple[str, ...]
    """Tensors whose shapes differ."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        unlike = self.only_before or self.only_after or self.reshaped
        return not unlike and all(r.bytes_changed == 0 for r in self.rows)


def diff_checkpoints(before: str | Path, after: str | Path) -> Diff:
    """Compare two model folders, run folders (their final model) or `.safetensors` files.

    Components are those of the first folder's model; tensors outside them, and all tensors of bare files, go by
    their own names. Raises `ModelError` when one cannot be read.
    """
    old_path, new_path = _weights_path(before), _weights_path(after)
    anatomy = _anatomy_of(old_path)
    old, new = _Side(old_path, anatomy), _Side(new_path, _anatomy_of(new_path))
    common = [n for n in old.names if n in new.names]
    parts = _parts(anatomy)
    found: dict[str, list[Movement]] = {}
    reshaped = []
    for name in common:
        a, b = old[name], new[name]
        if a.shape != b.shape:
            reshaped.append(name)
            continue
        for component, piece in parts.get(name) or [(name, whole(name, a.shape))]:
            found.setdefault(component, []).append(measure(take(a, piece), take(b, piece)))
    return Diff(
        before=str(before),
        after=str(after),
        rows=tuple(_row(c, total(m)) for c, m in _in_order(anatomy, found)),
        only_before=tuple(n for n in old.names if n not in new.names),
        only_after=tuple(n for n in new.names if n not in old.names),
        reshaped=tuple(reshaped),
    )


def diff_to_json(diff: Diff) -> dict[str, Any]:
    """The diff as plain data; an infinite relative change is written as null."""
    data = asdict(diff)
    for row in data["rows"]:
        row["relative_change"] = row["relative_change"] if math.isfinite(row["relative_change"]) else None
    return {"equal": diff.equal, **json.loads(json.dumps(data))}


class _Side:
    """One checkpoint's tensors by the model's own names; a tied name reads the tensor that owns the storage."""

    def __init__(self, path: Path, anatomy: Anatomy | None) -> None:
        stored = {t.name for t in anatomy.tensors if t.persistent and t.alias_of is None} if anatomy else None
        self.weights = Weights(path, names=stored)
        self.ties = {a: s for a, s in anatomy.ties.items() if s in self.weights} if anatomy else {}
        self.names = list(dict.fromkeys([*self.weights, *self.ties]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name] if name in self.weights else self.weights[self.ties[name]]


def _weights_path(path: str | Path) -> Path:
    if not Path(path).exists():
        raise ModelError(f"no checkpoint at {path}")
    return Path(checkpoint_of(str(path)))


def _anatomy_of(path: Path) -> Anatomy | None:
    """The anatomy of the folder's model; None for a bare file, and for a model that Frostline does not understand."""
    if not (path / "config.json").exists():
        return None
    try:
        return read_anatomy(load_skeleton(str(path)))
    except (AnatomyError, ModelError):
        return None


def _parts(anatomy: Anatomy | None) -> dict[str, list[tuple[str, Slice]]]:
    """Tensor → its components with their slices."""
    parts: dict[str, list[tuple[str, Slice]]] = {}
    for component in anatomy.components if anatomy else ():
        for piece in component.slices:
            parts.setdefault(piece.tensor, []).append((component.name, piece))
    return parts


def _in_order(anatomy: Anatomy | None, found: dict[str, list[Movement]]) -> Iterator[tuple[str, list[Movement]]]:
    order = {c.name: i for i, c in enumerate(anatomy.components)} if anatomy else {}
    for name in sorted(found, key=lambda n: order.get(n, len(order))):
        yield name, found[name]


def _row(component: str, movement: Movement) -> DiffRow:
    return DiffRow(
        component=component,
        n_elements=movement.n_elements,
        bytes_changed=movement.bytes_changed,
        relative_change=movement.relative_change,
    )
