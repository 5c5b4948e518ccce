"""What lies below a tensor, proved: which rows are the query's, a head's, a neuron's, an expert's.

A gradient tells which elements of a tensor a result depends on, one by one, without knowing how the tensor is laid
out. Each attention and FFN part of a tiny model is run by itself and compared with its names. Read `prove_slices`
first; `slice_checks.py` holds the comparisons, `slice_capture.py` runs and watches a part.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from frostline.anatomy.component import Anatomy, Component, Cut
from frostline.anatomy.modules import module_of
from frostline.anatomy.slice_capture import NotMeasuredError, find_branches
from frostline.anatomy.slice_checks import CHECKS, Findings, Part
from frostline.anatomy.slices import Slice

NOISE = 0.1
"""Standard deviation of what is added to every parameter: zeros and ones would hide what they do."""


@dataclass(frozen=True, kw_only=True)
class SliceProof:
    """What was measured below the tensors of one model."""

    model_type: str
    measured: tuple[str, ...]
    """What was compared: attention branches, `layers[1].ffn.experts`, `layers[1].ffn.gate`, and cuts."""
    disagreements: tuple[str, ...]
    """Where a name and a measurement differ: part, tensor, what the name says, what was measured."""
    unmeasured: tuple[str, ...]
    """What could not be measured, and why."""
    exceptions: tuple[str, ...]
    """Differences that are known and true of the architecture, and why."""


def prove_slices(model: nn.Module, anatomy: Anatomy, *, seed: int = 0) -> SliceProof:
    """Prove the slices of a model small enough to run. Afterwards it has other weights and runs eagerly.

    One layer of each kind is measured: layers whose parts have the same classes, names, slices and cuts are of one
    kind. Never raises: what cannot be measured is listed.
    """
    found = Findings(anatomy.model_type)
    unmeasured: list[str] = []
    across = {".".join(c.name.split(".")[:2]) for c in anatomy.components if c.path[-2:][0][0] == "cross_attn"}
    unmeasured += [f"{name}: attention to another sequence is not measured" for name in sorted(across)]
    for part in _parts(model, anatomy, unmeasured, seed):
        for check in CHECKS[part.kind]:
            try:
                check(part, found)
            except NotMeasuredError as why:
                unmeasured.append(f"{part.name}: {check.__name__.removeprefix('check_')} not measured: {why}")
            except Exception as error:  # a module's own, in a backward pass
                unmeasured.append(f"{part.name}: {check.__name__.removeprefix('check_')} failed: {error!r}")
    return SliceProof(
        model_type=anatomy.model_type,
        measured=tuple(found.measured),
        disagreements=tuple(found.disagreements),
        unmeasured=tuple(unmeasured),
        exceptions=tuple(found.exceptions),
    )


def _parts(model: nn.Module, anatomy: Anatomy, unmeasured: list[str], seed: int) -> list[Part]:
    """One attention or FFN part of every kind that the model runs; the others are added to `unmeasured`."""
    members: dict[str, list[Component]] = defaultdict(list)
    for c in anatomy.components:
        if c.path[0][0] == "layers" and len(c.path) > 2 and c.path[1][0] in CHECKS:
            members[".".join(c.name.split(".")[:2])].append(c)
    modules = {name: module_of(model, anatomy, name) for name in members}
    kinds: dict[object, str] = {}
    for name, components in members.items():
        kinds.setdefault(_signature(modules[name], components, _cuts(anatomy, name)), name)
    prepare_to_measure(model, anatomy, seed)
    try:
        branches = find_branches(model, {name: modules[name] for name in kinds.values()}, seed)
    except NotMeasuredError as why:
        unmeasured.append(f"{anatomy.model_type}: {why}")
        return []
    unmeasured += [f"{name}: its module is never called" for name in kinds.values() if name not in branches]
    return [
        Part(
            name=name,
            kind=members[name][0].path[1][0],
            components=tuple(members[name]),
            cuts=_cuts(anatomy, name),
            branch=branch,
            norms=_norms(model, anatomy, branch.module),
        )
        for name, branch in branches.items()
    ]


def prepare_to_measure(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """Run eagerly, where that can be set, with weights of which none is zero."""
    model.eval()
    for name in ("set_attn_implementation", "set_experts_implementation"):
        getattr(model, name, lambda _: None)("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.requires_grad_(True)  # an adapter freezes the weights below it
                p.add_(NOISE * torch.randn(p.shape, generator=generator))
        for name, n_experts in _expert_tables(anatomy):
            table = model.get_buffer(name)
            table.copy_(torch.randint(n_experts, table.shape, generator=generator))


def _expert_tables(anatomy: Anatomy) -> Iterator[tuple[str, int]]:
    """(buffer, number of experts) of routers that look a token's experts up: in a new model the tables are empty."""
    for c in anatomy.components:
        tables = [s.tensor for s in c.slices if anatomy.tensor[s.tensor].dtype == "int64"]
        if tables and c.path[-1][0] == "router":
            paths = (d.path for d in anatomy.components if d.path[: len(c.path) - 1] == c.path[:-1])
            experts = {path[len(c.path) - 1] for path in paths if path[len(c.path) - 1][0] == "experts"}
            yield from ((table, len(experts)) for table in tables)


def _cuts(anatomy: Anatomy, name: str) -> tuple[Cut, ...]:
    return tuple(c for c in anatomy.cuts if c.name.startswith(f"{name}."))


def _signature(module: nn.Module, components: Sequence[Component], cuts: Sequence[Cut]) -> object:
    """Equal for parts of one kind: the same class, names, slices and cuts."""

    def own(s: Slice) -> object:
        before, _, after = re.split(r"\.(\d+)\.", s.tensor, maxsplit=1)  # the first number is the layer's
        return before, after, s.index

    names = tuple((c.path[1:], tuple(map(own, c.slices))) for c in components)
    return type(module), names, tuple((c.path[1:], c.n, tuple((own(s), d) for s, d in c.pieces)) for c in cuts)


def _norms(model: nn.Module, anatomy: Anatomy, module: nn.Module) -> tuple[nn.Module, ...]:
    """The norms inside a module that have weights."""
    inside = {id(m) for m in module.modules()}
    tensors = (s.tensor for c in anatomy.components if c.is_norm for s in c.slices)
    norms = [model.get_submodule(t.rpartition(".")[0]) for t in tensors]
    return tuple({id(m): m for m in norms if id(m) in inside}.values())
