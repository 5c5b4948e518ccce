"""The plan of a run: what every stage computes, holds and writes, before anything is trained.

`make_plan` traces one optimizer step per stage; everything else follows from it and from the schedule. Read it first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from frostline.anatomy import Anatomy, Slice, find_blocks, subtract_all
from frostline.engine import How, Points, choose_loss, place
from frostline.engine.documents import use_document_attention
from frostline.engine.recompute import recompute_blocks
from frostline.engine.rounding import Rounding
from frostline.errors import FrostlineError, PlanError, in_one_line
from frostline.model import load_fake, untie
from frostline.model_source import Source
from frostline.plan.alike import Build, Layout, builds, exchanged, layout
from frostline.plan.cost import StageCost
from frostline.plan.meter import KINDS, Device, Meter
from frostline.plan.shapes import StepShape
from frostline.plan.trace import trace_stage
from frostline.schedule import Schedule, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """What a step takes."""

    rows: int
    """Per optimizer step."""
    length: int
    """Tokens per row."""
    bf16: bool = False
    """Matrix products in bf16 (autocast)."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What the model's weights are kept in."""
    rounding: Rounding = "masters"
    """How bf16 weights take updates."""
    recompute: bool = False
    """Blocks keep their input only (gradient checkpointing)."""
    device: Device = "cpu"
    """Whose kernels and allocator the bytes are of."""
    loss: How = "auto"
    """Whether the logits of all tokens ever exist."""
    shape: StepShape | None = None
    """A step near the average, where rows are made of documents: FLOPs are of it."""
    largest: StepShape | None = None
    """The largest step, where steps differ in size: bytes are of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.weights == "bf16" else torch.float32

    @property
    def tokens(self) -> int:
        """Tokens that are computed per optimizer step."""
        return self.shape.computed if self.shape else self.rows * self.length

    @property
    def tokens_per_row(self) -> float:
        """Of the training data, on the average."""
        return self.tokens / self.rows

    def of_size(self, rows: int, length: int) -> Batching:
        """Whole rows of another size: the most that documents could make of it."""
        return replace(self, rows=rows, length=length, shape=None, largest=None)


Slices = tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """The prediction for one stage."""

    name: str
    learn: str
    n_steps: int
    """At most so many, where a plateau may end the stage."""
    n_learning: int
    """Parameters that learn."""
    cost: StageCost
    """Of one optimizer step."""
    evidence_bytes: int
    """Entry values that the run folder keeps for the audit."""
    hashed_bytes: int
    """What is hashed when the stage ends; after the last one everything."""
    prefix_bytes: int
    """What a cache of the activations at the frontier would hold for all training rows; 0 where nothing is below it,
    or where no data is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The prediction for a schedule."""

    model_type: str
    n_parameters: int
    batching: Batching
    stages: tuple[StagePlan, ...]

    @property
    def total_flops(self) -> int:
        """FLOPs of the whole run, held-out losses apart."""
        return sum(s.n_steps * s.cost.total_flops for s in self.stages)

    @property
    def hashed_bytes(self) -> int:
        """What is hashed for the evidence, at the start and at the end of every stage."""
        return self.stages[0].cost.weight_bytes + sum(s.hashed_bytes for s in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most that any stage holds."""
        return max(s.cost.peak_bytes for s in self.stages)


def make_plan(
    source: Source, schedule: Schedule, batching: Batching, *, untied: bool = False, trust_remote_code: bool = False
) -> Plan:
    """The plan of a schedule over the model that `source` says. Reads no weights and needs no memory for them.

    `untied`: the head has weights of its own. Raises `PlanError` for arithmetic without a formula.
    """
    model, mode = load_fake(source, dtype=batching.dtype, trust_remote_code=trust_remote_code)
    if untied:
        with mode:
            untie(model)
    if batching.shape is not None and batching.shape.kept_by == "calls":
        use_document_attention(model)
    points = points_for(schedule, model, schedule.stages[0].selection.anatomy)
    if batching.recompute:
        recompute_blocks([block for _, block in find_blocks(model)])
    anatomy = schedule.stages[0].selection.anatomy
    n_vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    at_once = batching.rows * batching.length // min(s.spec.accumulate for s in schedule.stages)
    with plan_errors(anatomy.model_type), mode, Meter({}):  # which knows products that torch has for values alone
        language = choose_loss(batching.loss, model, anatomy, n_tokens=at_once).loss

    def trace(stage: Stage, shape: StepShape | None) -> StageCost:
        return trace_stage(
            model,
            anatomy,
            stage,
            rows=batching.rows,
            length=batching.length,
            n_vocabulary=n_vocabulary,
            shape=shape,
            bf16=batching.bf16,
            rounding=batching.rounding,
            device=batching.device,
            points=points,
            language=language,
            mode=mode,
        )

    def cost_of(stage: Stage) -> StageCost:
        with plan_errors(anatomy.model_type):
            cost = trace(stage, batching.shape)
            return _with_bytes_of(cost, trace(stage, batching.largest)) if batching.largest is not None else cost

    n_tokens = round((schedule.step_size.n_rows if schedule.step_size else 0) * batching.tokens_per_row)
    types = getattr(model.config.get_text_config(), "layer_types", None)  # type: ignore[union-attr, operator]
    costs = costs_of(schedule, cost_of, builds(anatomy, tuple(types) if types else None))
    evidence = evidence_of(schedule, costs[0].weight_bytes)
    rows = zip(schedule.stages, costs, evidence, strict=True)
    stages = [_stage_plan(s, c, e, n_tokens=n_tokens) for s, c, e in rows]
    return Plan(
        model_type=anatomy.model_type, n_parameters=anatomy.n_parameters, batching=batching, stages=tuple(stages)
    )


def points_for(schedule: Schedule, model: nn.Module, anatomy: Anatomy, *, always: bool = False) -> Points | None:
    """The points of gradient routes, placed where a stage needs them, or `always`. Raises `RouteError`."""
    local = any(s.spec.local_loss != "none" for s in schedule.stages)
    if not always and not local and not any(s.routes for s in schedule.stages):
        return None
    return place(model, anatomy, local_losses=local)


def _with_bytes_of(cost: StageCost, largest: StageCost) -> StageCost:
    return replace(
        cost,
        activation_bytes=largest.activation_bytes,
        logit_bytes=largest.logit_bytes,
        peak_bytes=largest.peak_bytes,
    )


@contextmanager
def plan_errors(model_type: str) -> Iterator[None]:
    """Turn whatever a model raises when its tensors have no values into a `PlanError`."""
    torch_says = logging.getLogger("torch._subclasses.fake_tensor")
    was_silent, torch_says.disabled = torch_says.disabled, True  # it logs the traceback of what is reported below
    try:
        yield
    except FrostlineError:
        raise
    except Exception as error:
        raise PlanError(
            f"{model_type} cannot be executed without values, so it cannot be planned: {in_one_line(error)}"
        ) from error
    finally:
        torch_says.disabled = was_silent


EXACT_TRACES = 8
"""Up to so many different stages are traced each by itself; of more, those that are alike but for which of several
equal layers learns are traced once."""


def costs_of(
    schedule: Schedule, trace: Callable[[Stage], StageCost], layers: tuple[Build, ...]
) -> tuple[StageCost, ...]:
    """The cost of every stage; equal stages are traced once."""
    traced: dict[object, tuple[StageCost, Layout | None]] = {}
    few = len({like(s) for s in schedule.stages}) <= EXACT_TRACES
    out = []
    for stage in schedule.stages:
        exact = few or bool(stage.routes) or stage.spec.local_loss != "none"
        found = None if exact else layout(stage, layers, like(stage, learn=False))
        key = found.key if found else like(stage)
        if key not in traced:
            traced[key] = (trace(stage), found)
        cost, of = traced[key]
        out.append(exchanged(cost, of, found) if of and found else cost)
    return tuple(out)


def like(stage: Stage, *, learn: bool = True) -> str:
    """Equal for stages whose steps cost the same; `learn`: what learns included."""
    other = {"name": None, "steps": None, "tokens": None, "epochs": 1.0, **({} if learn else {"learn": ""})}
    return stage.spec.model_copy(update=other).model_dump_json()


def evidence_of(schedule: Schedule, weight_bytes: int) -> Iterator[tuple[int, int]]:
    """Of every stage: bytes of the entry values that are kept, and bytes that are hashed when it ends."""
    known: Slices = ()
    for stage in schedule.stages:
        after = schedule.stages[stage.index + 1] if stage.index + 1 < len(schedule.stages) else None
        if schedule.at_switch == "everything":
            yield stage.selection.n_bytes, weight_bytes
            continue
        mine = stage.selection.slices
        new = subtract_all(mine, known)
        known = (*known, *new)
        learned_next = subtract_all(after.selection.slices, mine) if after else ()
        yield _n_bytes(stage, new), _n_bytes(stage, (*mine, *learned_next)) if after else weight_bytes


def _n_bytes(stage: Stage, slices: Slices) -> int:
    tensors = stage.selection.anatomy.tensor
    return sum(s.n_elements * tensors[s.tensor].element_bytes for s in slices)


def _stage_plan(stage: Stage, cost: StageCost, evidence: tuple[int, int], *, n_tokens: int) -> StagePlan:
    return StagePlan(
        name=stage.name,
        learn=stage.selection.expression,
        n_steps=stage.n_steps,
        n_learning=stage.selection.n_elements,
        cost=cost,
        evidence_bytes=evidence[0],
        hashed_bytes=evidence[1],
        prefix_bytes=cost.prefix_bytes_per_token * n_tokens,
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    stages = []
    for s in plan.stages:
        cost = asdict(s.cost)
        stages.append(
            {
                **{k: v for k, v in asdict(s).items() if k != "cost"},
                "step": {
                    **cost,
                    "unreached": list(s.cost.unreached),
                    "total_flops": s.cost.total_flops,
                    "flops_by_kind": {kind: s.cost.of_kind(kind) for kind in KINDS},
                    "transient_bytes": s.cost.transient_bytes,
                    "resident_bytes": s.cost.resident_bytes,
                },
            }
        )
    return {
        "model_type": plan.model_type,
        "n_parameters": plan.n_parameters,
        **{k: v for k, v in asdict(plan.batching).items() if v is not None},
        "total_flops": plan.total_flops,
        "peak_bytes": plan.peak_bytes,
        "hashed_bytes": plan.hashed_bytes,
        "stages": stages,
    }
