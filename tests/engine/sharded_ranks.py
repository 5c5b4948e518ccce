"""Schedules under FSDP2, compared with the same schedules in one process. `test_sharded.py` starts one such per rank.

Every rank runs a case twice: alone with the global batch, and sharded with its half of the rows. What it found of the
differences goes to a JSON file; what may be found is for the test to say. Read `CASES`, then `compare`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from frostline.anatomy import Anatomy, put, read_anatomy, take, whole
from frostline.data import Batch
from frostline.engine import owned, stage_switch
from frostline.engine.loss import next_token_loss
from frostline.engine.owned import Owned, Ownership
from frostline.engine.stage_switch import Active, Memory, set_modes, switch
from frostline.engine.step import step
from frostline.errors import RecipeError
from frostline.recipe import StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")
N_RANKS = 2
STEPS = 2
CLIP = 0.01
"""Below every gradient norm here, so that every step is clipped."""

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 2, "vocab_size": 321, "n_positions": 33, **NO_DROPOUT}),
    "llama": ("llama", {"num_hidden_layers": 1, "vocab_size": 321, "intermediate_size": 47}),
    "mixtral": ("mixtral", {"num_hidden_layers": 1}),
    "two experts": ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 2}),
    "three experts": ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 3}),
}
"""Tiny models. Odd sizes make the ranks' shards unequal."""

SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "adam": {"name": "adam", "weight_decay": 0.1},
    "adamw": {"name": "adamw", "weight_decay": 0.1},
}
RATES = {"sgd": 1.0, "adam": 1e-2, "adamw": 1e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One schedule and the way it is sharded."""

    model: str
    stages: tuple[str, ...]
    """Per stage `what learns; what becomes of optimizer state`, or `…; …; optimizer`."""
    optimizer: str = "adamw"
    placement: str = "rows"
    """`rows`: every tensor by its first dimension; `columns`: matrices by their second; `replicated`: every rank holds
    everything (hybrid sharding over a group of one)."""
    accumulate: int = 1
    single_precision: bool = False
    """fp32 and the fast kernels; fp64 and plain ones otherwise."""


SCHEDULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "whole tensors freeze and thaw": ("gpt2", ("ffn; keep", "all; keep", "attn; keep", "all; reset")),
    "packed q": ("gpt2", ("attn.q; keep", "ffn; offload", "attn.q; offload", "attn.q & layers[0]; keep")),
    "a head, then all of q": (
        "gpt2",
        ("attn.heads[1]; keep", "attn.q; keep", "attn; offload", "attn.heads[1,2]; offload", "attn; offload"),
    ),
    "rows of the first shard": (
        "gpt2",
        ("embed.rows[0:16]; keep", "embed.rows[8:24]; offload", "embed.rows[0:16]; offload"),
    ),
    "rows of the last shard": ("gpt2", ("embed.rows[300:316]; keep", "attn; reset", "embed; offload")),
    "rows across both shards": ("llama", ("embed.rows[152:168]; keep", "embed; keep", "embed.rows[153:169]; keep")),
    "norms and biases": ("gpt2", ("norm; keep", "bias; offload", "norm | bias; offload", "bias & layers[1]; keep")),
    "a head and a kv head": (
        "llama",
        ("attn.heads[3]; keep", "ffn; offload", "attn.heads[3] | kv_heads[0]; offload", "attn; keep"),
    ),
    "every seventh neuron": (
        "llama",
        ("ffn.neurons[3:40:7]; keep", "ffn.neurons[3:20:7]; offload", "ffn; offload", "ffn.neurons[::2]; keep"),
    ),
    "single experts": (
        "mixtral",
        ("experts[1]; keep", "experts[1,3]; keep", "experts[3]; offload", "experts; offload"),
    ),
    "one expert per shard": (
        "two experts",
        ("experts; keep", "experts[0]; offload", "experts[1]; offload", "all; keep"),
    ),
    "neurons of an expert": (
        "three experts",
        ("experts[2].neurons[3:40:7]; keep", "experts; offload", "router | experts[0]; offload", "head; reset"),
    ),
}

CASES: dict[str, Case] = {
    f"{name} ({optimizer})": Case(model=model, stages=stages, optimizer=optimizer)
    for name, (model, stages) in SCHEDULES.items()
    for optimizer in OPTIMIZERS
} | {
    "shards of columns": Case(
        model="gpt2", stages=("attn.q; keep", "all; keep", "attn.heads[1]; keep"), placement="columns"
    ),
    "hybrid sharding": Case(
        model="gpt2", stages=("attn.q; keep", "all; keep", "attn.heads[1]; keep"), placement="replicated"
    ),
    "micro-batches": Case(
        model="mixtral", stages=("experts[1]; keep", "all; keep", "experts.neurons[3:40:7]; keep"), accumulate=2
    ),
    "optimizers take turns": Case(
        model="gpt2", stages=("attn.q; keep", "attn; offload; sgd", "attn.q; offload", "attn; offload; sgd")
    ),
    "single precision": Case(
        model="mixtral",
        stages=("experts[1]; keep", "attn; offload", "all; offload", "attn.heads[1]; keep"),
        optimizer="sgd",
        single_precision=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """How a sharded run differs from the one in one process, as one rank sees it."""

    frozen_moved: int
    """Elements whose bytes changed in a stage they were frozen in."""
    learning_moved: float
    """Smallest share of a stage's learning elements that moved."""
    movement_error: float
    """Largest ‖Δ − Δ′‖ / ‖Δ′‖ of a tensor over the run so far, at any stage's end."""
    norm_error: float
    """Largest relative difference of a gradient norm before clipping."""
    smallest_norm: float
    restored: tuple[tuple[int, int], ...]
    """Per stage, the leaves that continue with kept state: here, and in one process."""
    n_here: tuple[int, ...]
    """Per stage, the learning elements that this rank holds."""
    n_steps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Per stage, the distinct step counts in the optimizer's state at its end: here, and in one process."""
    misshapen: int
    """Tensors of optimizer state that have not the shape of their leaf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What one run went through."""

    stages: tuple[Stage, ...]
    weights: list[dict[str, torch.Tensor]]
    """Full tensors at the start and at every stage's end."""
    norms: list[float]
    restored: list[int]
    n_here: list[int]
    n_steps: list[tuple[int, ...]]
    misshapen: list[int]


def stages_of(case: Case, anatomy: Anatomy) -> tuple[Stage, ...]:
    specs = []
    for i, text in enumerate(case.stages):
        learn, state, *other = (t.strip() for t in text.split(";"))
        name = other[0] if other else case.optimizer
        settings = {"learn": learn, "state": state, "steps": STEPS, "clip": CLIP, "lr": RATES[name]}
        spec = StageSpec.model_validate(settings | {"optimizer": OPTIMIZERS[name]})
        specs.append((f"stage-{i}", spec, select(anatomy, learn, ties="together")))
    return Schedule.of(specs).stages


def build(case: Case) -> nn.Module:
    architecture, fields = MODELS[case.model]
    model = tiny.model(architecture, initializer_range=0.2, **fields)
    if case.single_precision:
        return model
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # type: ignore[operator]  # grouped products know no fp64
    return model.double()


def shard(model: nn.Module, placement: str) -> None:
    """Shard every block and the root."""
    by_columns = (lambda p: Shard(1) if p.dim() == 2 else Shard(0)) if placement == "columns" else None
    hybrid = placement == "replicated"
    sizes, names = ((N_RANKS, 1), ("copies", "shards")) if hybrid else ((N_RANKS,), ("shards",))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers  # type: ignore[union-attr]
    for block in (*blocks, model):  # type: ignore[misc]
        fully_shard(block, mesh=mesh, shard_placement_fn=by_columns)


def global_batch(at: int) -> Batch:
    """Four rows of one step; the first two have fewer targets than the others."""
    ids = torch.randint(tiny.VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(at))
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100
    return Batch(input_ids=ids[:, :-1], labels=labels)


def one_step(model: nn.Module, case: Case, at: int, rank: int | None) -> None:
    """Add the gradient of the mean loss over all targets of the global batch.

    FSDP2 averages gradients over ranks, and `step` divides a rank's sum by that rank's targets. For the average to be
    the sum over all ranks divided by all targets, a rank's sum is multiplied by (ranks × its targets / all targets).
    """
    batch = global_batch(at)
    mine = batch if rank is None else batch.split(N_RANKS)[rank]
    scale = 1.0 if rank is None else N_RANKS * mine.n_targets / batch.n_targets
    step(model, mine.split(case.accumulate), lambda m, b: next_token_loss(m, b) * scale, seed=at, device=CPU)


def run_schedule(case: Case, rank: int | None) -> Trace:
    """Run a case sharded as one of the ranks, or alone (None)."""
    model = build(case)
    anatomy = read_anatomy(model)
    if rank is not None:
        shard(model, case.placement)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stages = stages_of(case, anatomy)
    start = [snapshot(parameters)]
    trace = Trace(stages=stages, weights=start, norms=[], restored=[], n_here=[], n_steps=[], misshapen=[])
    memory: Memory = {}
    active: Active | None = None
    for stage in stages:
        evaluate(model)
        active = switch(parameters, anatomy, stage, memory=memory, leaving=active)
        set_modes(model, stage)
        for at in range(stage.start, stage.end):
            one_step(model, case, at, rank)
            trace.norms.append(float(active.ownership.clip(CLIP)))
            active.optimizer.step()
            active.ownership.write_back()
            active.optimizer.zero_grad()
        trace.weights.append(snapshot(parameters))
        trace.restored.append(active.n_restored)
        trace.n_here.append(sum(o.local.n_elements for o in active.ownership.owned))
        trace.n_steps.append(step_counts(active))
        trace.misshapen.append(misshapen(active))
    assert active is not None
    active.ownership.release()
    return replace(trace, weights=gather(trace.weights))


def evaluate(model: nn.Module) -> None:
    """What the training loop does before a switch; FSDP2 leaves the root's parameters gathered after it."""
    model.eval()
    with torch.no_grad():
        next_token_loss(model, global_batch(99))


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in parameters.items()}


def gather(snapshots: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same with full tensors. All snapshots of a tensor are gathered at once: most of the time goes to messages."""
    # a new dimension by its number: -1 is another one for shards before torch 2.13
    full = {
        n: full_tensor(torch.stack([s[n] for s in snapshots], dim=w.dim())).unbind(-1) for n, w in snapshots[0].items()
    }
    return [{n: each[i] for n, each in full.items()} for i in range(len(snapshots))]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step_counts(active: Active) -> tuple[int, ...]:
    states = [active.optimizer.state_of(o.value) for o in active.ownership.owned]
    return tuple(sorted({int(s["step"]) for s in states if "step" in s}))


def misshapen(active: Active) -> int:
    pairs = [(o.value, v) for o in active.ownership.owned for v in active.optimizer.state_of(o.value).values()]
    return sum(v.dim() > 0 and v.shape != leaf.shape for leaf, v in pairs if isinstance(v, torch.Tensor))


def compare(case: Case, rank: int, fault: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Finding:
    """Run a case alone and sharded, the latter with a fault if one is given."""
    alone = run_schedule(case, None)
    with fault():
        sharded = run_schedule(case, rank)
    pairs = list(zip(sharded.weights[:-1], sharded.weights[1:], alone.stages, strict=True))
    return Finding(
        frozen_moved=sum(moved_outside(before, after, stage) for before, after, stage in pairs),
        learning_moved=min(moved_inside(before, after, stage) for before, after, stage in pairs),
        movement_error=largest(
            movement_error(here, there, alone.weights[0])
            for here, there in zip(sharded.weights, alone.weights, strict=True)
        ),
        norm_error=largest(abs(a - b) / b for a, b in zip(sharded.norms, alone.norms, strict=True)),
        smallest_norm=min(alone.norms),
        restored=tuple(zip(sharded.restored, alone.restored, strict=True)),
        n_here=tuple(sharded.n_here),
        n_steps=tuple(zip(sharded.n_steps, alone.n_steps, strict=True)),
        misshapen=sum(sharded.misshapen),
    )


def learning_masks(weights: Mapping[str, torch.Tensor], stage: Stage) -> dict[str, torch.Tensor]:
    masks = {n: torch.zeros(w.shape, dtype=torch.bool) for n, w in weights.items()}
    for s in stage.selection.slices:
        for name, mask in masks.items():
            if stage.selection.anatomy.storage_name(name) == s.tensor:
                put(mask, s, torch.ones(s.shape, dtype=torch.bool))
    return masks


def moved_outside(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], stage: Stage) -> int:
    masks = learning_masks(before, stage)
    return sum(int(((before[n].view(bits(w)) != w.view(bits(w))) & ~masks[n]).sum()) for n, w in after.items())


def bits(tensor: torch.Tensor) -> torch.dtype:
    """Integers of the same size: bytes are compared, so that 0.0 and -0.0 differ and a NaN equals itself."""
    return {4: torch.int32, 8: torch.int64}[tensor.element_size()]


def moved_inside(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], stage: Stage) -> float:
    slices = stage.selection.slices
    moved = sum(int((take(before[s.tensor], s) != take(after[s.tensor], s)).sum()) for s in slices)
    return moved / stage.selection.n_elements


def movement_error(
    sharded: Mapping[str, torch.Tensor], alone: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> float:
    def of_tensor(name: str) -> float:
        movement = float((alone[name] - start[name]).norm())
        error = float((sharded[name] - alone[name]).norm())
        return error / movement if movement else error * torch.inf if error else 0.0

    return largest(map(of_tensor, alone))


def largest(numbers: Iterable[float]) -> float:
    """The largest number; NaN when one is (Python's `max` would pass over it)."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def index_the_dtensor(self: Owned) -> None:
    rows = self.piece.index[0][0]
    target = self.parameter.detach()[rows.start : rows.stop].to_local()  # type: ignore[attr-defined]
    if self.is_copy and self.value.numel():
        target.copy_(self.value.detach())


def own_whole_tensors(parameters: Mapping[str, nn.Parameter], slices: Sequence[Any], **settings: Any) -> Ownership:
    names = dict.fromkeys(s.tensor for s in slices)
    return owned.own(parameters, (whole(n, parameters[n].shape) for n in names), **settings)


@contextmanager
def clip_by_this_rank_alone() -> Iterator[None]:
    clip = Ownership.clip

    def alone(self: Ownership, max_norm: float) -> torch.Tensor:
        with patch.object(torch.distributed, "all_reduce"):
            return clip(self, max_norm)

    with patch.object(Ownership, "clip", alone):
        yield


FAULTS: dict[str, tuple[Case, Callable[[], AbstractContextManager[Any]]]] = {
    "write-back by indexing the DTensor": (
        CASES["rows of the first shard (sgd)"],
        lambda: patch.object(Owned, "write_back", index_the_dtensor),
    ),
    "a forgotten hook": (
        CASES["packed q (adamw)"],
        lambda: patch.object(Ownership, "_move_gradient", lambda _, p, __: p.register_post_accumulate_grad_hook(id)),
    ),
    "the whole shard owned": (
        CASES["single experts (adamw)"],
        lambda: patch.object(stage_switch, "own", own_whole_tensors),
    ),
    "a norm of one rank alone": (CASES["packed q (sgd)"], clip_by_this_rank_alone),
    "a norm that counts copies": (
        CASES["hybrid sharding"],
        lambda: patch.object(owned, "shard_groups", lambda _: [None]),
    ),
    "a root left gathered": (
        CASES["neurons of an expert (sgd)"],
        lambda: patch.object(stage_switch, "reshard", lambda _: None),
    ),
}
"""Name → a case, and what breaks it."""


def refusals() -> dict[str, str]:
    """What a switch says to optimizers that treat a matrix as one thing."""
    model = build(CASES["packed q (sgd)"])
    anatomy = read_anatomy(model)
    shard(model, "rows")
    said = {}
    for name in ("adafactor", "muon"):
        spec = StageSpec.model_validate({"learn": "ffn", "steps": 1, "lr": 0.1, "optimizer": name})
        stage = Schedule.of([("only", spec, select(anatomy, "ffn"))]).stages[0]
        try:
            switch(dict(model.named_parameters()), anatomy, stage, memory={}, leaving=None)
            said[name] = ""
        except RecipeError as error:
            said[name] = str(error)
    return said


def main(rank: int, folder: Path) -> None:
    # ranks meet at a file: a port that is free now may be taken a moment later
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=N_RANKS)
    findings = {
        "cases": {name: asdict(compare(case, rank)) for name, case in CASES.items()},
        "faults": {name: asdict(compare(case, rank, fault)) for name, (case, fault) in FAULTS.items()},
        "refusals": refusals(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(findings), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
