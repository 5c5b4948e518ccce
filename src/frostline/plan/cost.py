"""What a step of a stage costs, and to which parts of the model it belongs. Read `StageCost`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from frostline.anatomy import Anatomy, Component, Slice, intersect
from frostline.plan.meter import KINDS, Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one optimizer step of a stage computes and holds. Bytes are of tensors, without the allocator's own."""

    flops: dict[str, dict[Kind, int]]
    """Part → kind → FLOPs; what is between two weights (attention's scores) counts with the part."""
    frontier: str
    """The first part that learns and gets a gradient: backward stops there."""
    weight_bytes: int
    """Parameters and buffers."""
    gradient_bytes: int
    """Of what learns."""
    state_bytes: int
    """Optimizer state."""
    copy_bytes: int
    """Leaves of slices, beside the packed tensors."""
    activation_bytes: int
    """Alive between the forward and the backward pass of one micro-batch, logits included."""
    logit_bytes: int
    """Of these, tensors over the vocabulary."""
    peak_bytes: int
    """The most that is alive at once, weights included; what is in the host's memory is not, for a device."""
    host_bytes: int
    """The most that offloaded leaves, their gradients and their state hold of the host's memory; 0 without them."""
    prefix_flops: int
    """Forward FLOPs below the frontier: what activations kept from another epoch would save."""
    prefix_bytes_per_token: int
    """What would be kept for it: the activations that enter the part at the frontier."""
    unreached: tuple[str, ...]
    """Parts that are to learn and that no gradient reaches: the loss does not depend on them."""

    @property
    def total_flops(self) -> int:
        """FLOPs of a step."""
        return sum(sum(kinds.values()) for kinds in self.flops.values())

    def of_kind(self, kind: Kind) -> int:
        """FLOPs of one kind."""
        return sum(kinds.get(kind, 0) for kinds in self.flops.values())

    @property
    def resident_bytes(self) -> int:
        """By about how much a process on the CPU grows: the peak, a fifth of it for the allocator and scratch of
        kernels, and 150 MB for libraries loaded late (fitted to `benchmarks/plan_memory.py`)."""
        return int(1.2 * self.peak_bytes + 150e6)

    @property
    def transient_bytes(self) -> int:
        """What the peak holds beyond everything named: gradients on their way, packed gradients, scratch."""
        kept = 0 if self.host_bytes else self.gradient_bytes + self.state_bytes + self.copy_bytes
        named = self.weight_bytes + kept + self.activation_bytes
        return max(self.peak_bytes - named, 0)


def parts_of(anatomy: Anatomy, pieces: Sequence[Slice]) -> tuple[str, ...]:
    """Names of the parts that the pieces belong to."""
    wanted: dict[str, list[Slice]] = {}
    for piece in pieces:
        wanted.setdefault(piece.tensor, []).append(piece)

    def holds_one(component: Component) -> bool:
        return any(intersect(s, piece) is not None for s in component.slices for piece in wanted.get(s.tensor, ()))

    return tuple(c.name for c in anatomy.components if wanted and holds_one(c))


def by_part(flops: Counter[tuple[str, Kind]], anatomy: Anatomy) -> dict[str, dict[Kind, int]]:
    """FLOPs of tensors as FLOPs of parts: a tensor of several parts counts for what they have in common."""
    part_of: dict[str, str] = {}
    for c in anatomy.components:
        for s in c.slices:
            part_of[s.tensor] = _common(part_of[s.tensor], c.name) if s.tensor in part_of else c.name
    out: dict[str, dict[Kind, int]] = {}
    for (tensor, kind), n in flops.items():
        part = part_of.get(tensor.rstrip("*"), "other")
        if tensor.endswith("*"):
            part = part.rpartition(".")[0] or part
        kinds = out.setdefault(part, dict.fromkeys(KINDS, 0))
        kinds[kind] += n
    return out


def _common(first: str, second: str) -> str:
    """The steps that two names begin with; indices that differ are dropped."""
    steps = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            if a.split("[")[0] == b.split("[")[0]:
                steps.append(a.split("[")[0])
            break
        steps.append(a)
    return ".".join(steps)
