"""Spectrum's measurement (arXiv 2406.06623): the ratio of signal to noise of every matrix in the layers.

Singular values above a threshold of Marchenko and Pastur are signal, the others noise; the ratio of their sums, divided
by the largest singular value, ranks matrices of one kind. As in the paper's own code the spread of the noise is taken
from the interquartile range of the singular values themselves, not of the entries; and the ratio depends on the scale
of a matrix, so it compares matrices of one kind and no others. Norms and vectors are not ranked: a single singular
value has no spread. Read `rank`, then `signal_to_noise`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from frostline.anatomy import Anatomy, Component, Slice, take
from frostline.errors import ModelError, RecipeError
from frostline.selection import Selection

NORMAL_IQR = 1.349
"""Interquartile range of a normal distribution, in standard deviations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """One matrix."""

    component: str
    kind: str
    """Its name without indices: matrices of one kind are ranked against each other."""
    snr: float
    chosen: bool


def rank(
    anatomy: Anatomy, weights: Mapping[str, torch.Tensor], *, top: float, among: Selection | None = None
) -> tuple[Ranked, ...]:
    """Every matrix in the layers, by kind and from the highest ratio down; the top share of each kind is chosen, and
    one at least.

    `weights`: tensor name → values. `among`: matrices of which something is selected. Raises `RecipeError` when there
    are none, `ModelError` for weights that are not finite.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    for component, piece in matrices(anatomy, among):
        kind = re.sub(r"\[\d+\]", "", component.name)
        found.setdefault(kind, []).append((component.name, _ratio(component.name, take(weights[piece.tensor], piece))))
    if not found:
        raise RecipeError("schedule.among: there is no matrix of a layer in it")
    out = []
    for kind, members in found.items():
        n_chosen = max(int(Fraction(str(top)) * len(members)), 1)
        best = sorted(members, key=lambda m: -m[1])
        out += [Ranked(component=n, kind=kind, snr=snr, chosen=i < n_chosen) for i, (n, snr) in enumerate(best)]
    return tuple(out)


def matrices(anatomy: Anatomy, among: Selection | None = None) -> Iterable[tuple[Component, Slice]]:
    """Every part in the layers that is a matrix (its bias apart), with the slice that holds it."""
    for c in anatomy.components:
        if c.path[0][0] != "layers" or c.is_norm or (among is not None and not any(map(among.within, c.slices))):
            continue
        flat = [s for s in c.slices if anatomy.learnable(s) and sum(n > 1 for n in s.shape) == 2]
        if flat:
            yield c, max(flat, key=lambda s: s.n_elements)


def signal_to_noise(matrix: torch.Tensor) -> float:
    """The ratio of one matrix; 0 where no singular value exceeds the threshold. Where all of them do, the noise counts
    as 1, as in the paper's code."""
    values = torch.linalg.svdvals(matrix.float())
    q25, q75 = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    threshold = marchenko_pastur(((q75 - q25) / NORMAL_IQR).item(), *matrix.shape)
    signal = values[values > threshold].sum().item()
    rest = values[values <= threshold]
    noise = rest.sum().item() if rest.numel() else 1.0
    if not signal:
        return 0.0
    return signal / noise / values[0].item() if noise else math.inf


def marchenko_pastur(sigma: float, n: int, m: int) -> float:
    """The largest singular value that noise of spread `sigma` explains, as the paper's code has it: σ (1 + √β), with β
    the ratio of the shorter to the longer side."""
    return sigma * (1 + math.sqrt(min(n, m) / max(n, m)))


def fingerprint_of(ranking: Sequence[Ranked]) -> str:
    """SHA-256 (hex) of a ranking."""
    rows = [[r.component, r.snr, r.chosen] for r in ranking]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _ratio(name: str, matrix: torch.Tensor) -> float:
    shape = [n for n in matrix.shape if n > 1]
    if not bool(matrix.isfinite().all()):
        raise ModelError(f"the model's weights are not finite in {name}")
    return signal_to_noise(matrix.reshape(shape))
