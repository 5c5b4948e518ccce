"""Plans and what they answer: does it fit, what is the most that fits, what would something else cost, how long.

Composes recipe, model and `plan`; `frostline plan` is these calls. Read `plan_recipe` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from frostline.anatomy import find_blocks, read_anatomy
from frostline.engine import choose_loss
from frostline.engine.recompute import recompute_blocks
from frostline.errors import PlanError, SelectionError
from frostline.feed import fit_attention
from frostline.levers import Outlook, memory_of
from frostline.model import load_random, load_skeleton, untie
from frostline.plan import Batching, Device, Plan, StageCost, like, plan_to_json, points_for, time_stage
from frostline.plan_subject import Subject, outlook_of, subject_of
from frostline.recipe import Recipe, StageSpec, as_recipe, plain
from frostline.run_folder import checkpoint_of
from frostline.schedule import Schedule, Stage
from frostline.selection import select
from frostline.units import format_bytes

MAX_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What fits into a size of memory, for the stage that needs the most."""

    memory_bytes: int
    stage: str
    fits: bool
    largest_rows: int
    """Rows per micro-batch at the planned length; 0 when not even one row fits."""
    longest: int
    """Tokens per row, one row at a time; 0 when not even 2 fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """One step of another selection."""

    learn: str
    cost: StageCost


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One step under other settings of precision and memory."""

    precision: str
    """As a recipe says it; `bf16` with the rounding of the plan."""
    recompute: bool
    cost: StageCost


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How long the run takes, held-out losses and evidence apart."""

    seconds: float
    stage_seconds: tuple[float, ...]
    flops_per_s: float
    """Over the whole run."""
    basis: Literal["given", "measured here"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What to answer beside the plan."""

    memory: int | None = None
    """Bytes into which it has to fit."""
    compared: bool = False
    """Other selections and other settings, side by side."""
    flops_per_s: float | None = None
    """A rate to reckon the time with."""
    calibrate: bool = False
    """Measure the time of a step of every stage here, on random weights and tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A plan with its answers."""

    plan: Plan
    fit: Fit | None
    alternatives: tuple[Alternative, ...]
    settings: tuple[Setting, ...]
    duration: Duration | None
    prefixes: tuple[Outlook, ...] = ()
    """What will become of every stage's frozen prefix; empty without data."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            **plan_to_json(self.plan),
            "fit": asdict(self.fit) if self.fit else None,
            "alternatives": [
                {"learn": a.learn, "total_flops": a.cost.total_flops, **plain(asdict(a.cost))}
                for a in self.alternatives
            ],
            "settings": [
                {
                    "precision": s.precision,
                    "recompute": s.recompute,
                    "total_flops": s.cost.total_flops,
                    **plain(asdict(s.cost)),
                }
                for s in self.settings
            ],
            "duration": plain(asdict(self.duration)) if self.duration else None,
            "prefix": [asdict(o) for o in self.prefixes],
        }


def plan_recipe(
    recipe: Recipe | str | Path,
    *,
    overrides: Iterable[str] = (),
    device: Device | None = None,
    asked: Asked | None = None,
    trust_remote_code: bool = False,
) -> Planned:
    """The plan of a recipe (a record, a file, or a name of the package's). Reads its data (for epochs) and its model's
    configuration, no weights.

    FLOPs are of one step, memory is in bytes. `device`: whose kernels; where the recipe would run here, when left out.
    Raises `RecipeError`, `DataError`, `ModelError`, `SelectionError` as `train` does, and `PlanError` for an operation
    without a formula.
    """
    subject = subject_of(as_recipe(recipe, overrides), trust_remote_code)
    return _answered(subject.on(device), asked or Asked())


def plan_model(
    model: str,
    *,
    learn: str,
    rows: int,
    length: int,
    device: Device | None = None,
    asked: Asked | None = None,
    trust_remote_code: bool = False,
) -> Planned:
    """The plan of one AdamW step over a model: a folder, a hub name, or a bare configuration file.

    `rows` of `length` tokens each. `device`: whose kernels; this machine's when left out, as for a recipe. Raises
    `ModelError`, `SelectionError` and `PlanError`.
    """
    source = checkpoint_of(model)
    anatomy = read_anatomy(load_skeleton(source, trust_remote_code=trust_remote_code))
    spec = StageSpec(learn=learn, steps=1, lr=1.0)
    schedule = Schedule.of([("step", spec, select(anatomy, learn, ties="together"))])
    subject = Subject(
        source=source,
        schedule=schedule,
        batching=Batching(rows=rows, length=length, device="cuda" if torch.cuda.is_available() else "cpu"),
        untied=False,
        trust_remote_code=trust_remote_code,
    )
    return _answered(subject.on(device), asked or Asked())


def _answered(subject: Subject, asked: Asked) -> Planned:
    plan = subject.plan()
    heaviest = max(range(len(plan.stages)), key=lambda i: plan.stages[i].cost.peak_bytes)
    stage = subject.schedule.stages[heaviest]
    return Planned(
        plan=plan,
        fit=_fit(subject, plan, stage, asked.memory) if asked.memory is not None else None,
        alternatives=tuple(_alternatives(subject, stage)) if asked.compared else (),
        settings=tuple(_settings(subject, stage)) if asked.compared else (),
        duration=_duration(subject, plan, asked),
        prefixes=outlook_of(subject, plan),
    )


def _settings(subject: Subject, stage: Stage) -> Iterator[Setting]:
    """A step of the stage in every precision, with and without recomputed blocks."""
    for precision, recompute in product(("fp32", "bf16-mixed", "bf16"), (False, True)):
        weights: Literal["fp32", "bf16"] = "bf16" if precision == "bf16" else "fp32"
        bf16 = precision == "bf16-mixed"
        batching = replace(subject.batching, bf16=bf16, weights=weights, recompute=recompute)
        cost = subject.plan(subject.alone(stage), batching).stages[0].cost
        yield Setting(precision=precision, recompute=recompute, cost=cost)


def _duration(subject: Subject, plan: Plan, asked: Asked) -> Duration | None:
    """The time of the run: measured, or by the rate that was given."""
    if asked.calibrate:
        each = measure_seconds(subject, plan)
        basis: Literal["given", "measured here"] = "measured here"
    elif asked.flops_per_s is not None:
        each, basis = tuple(s.cost.total_flops / asked.flops_per_s for s in plan.stages), "given"
    else:
        return None
    seconds = sum(s.n_steps * t for s, t in zip(plan.stages, each, strict=True))
    return Duration(seconds=seconds, stage_seconds=each, flops_per_s=plan.total_flops / max(seconds, 1e-9), basis=basis)


def measure_seconds(subject: Subject, plan: Plan) -> tuple[float, ...]:
    """Seconds of a step of every stage, measured on random weights. Raises `PlanError` when they would not fit here."""
    device = torch.device(subject.batching.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError("torch sees no CUDA device here, so nothing can be measured on one; leave --calibrate out")
    memory = memory_of(device)
    if memory is not None and plan.peak_bytes > memory:
        raise PlanError(
            f"a step needs {format_bytes(plan.peak_bytes)}, and this machine has {format_bytes(memory)}: it cannot be "
            "measured here; give the rate of the machine it will run on (`--throughput 150TFLOPS`)"
        )
    model = load_random(subject.source, dtype=subject.batching.dtype, trust_remote_code=subject.trust_remote_code)
    if subject.untied:
        untie(model)
    fit_attention(model, subject.batching.shape.kept_by if subject.batching.shape else None)
    points = points_for(subject.schedule, model, subject.anatomy)
    model.to(device)
    if subject.batching.recompute:
        recompute_blocks([block for _, block in find_blocks(model)])
    batching, known = subject.batching, {}
    largest = batching.rows * batching.length // min(s.spec.accumulate for s in subject.schedule.stages)
    language = choose_loss(batching.loss, model, subject.anatomy, n_tokens=largest).loss
    for stage in subject.schedule.stages:
        if like(stage) not in known:
            known[like(stage)] = time_stage(
                model,
                subject.anatomy,
                stage,
                rows=batching.rows,
                length=batching.length,
                shape=batching.shape,
                n_vocabulary=model.config.get_text_config().vocab_size,  # type: ignore[union-attr, operator]
                bf16=batching.bf16,
                rounding=batching.rounding,
                points=points,
                language=language,
            )
    return tuple(known[like(stage)] for stage in subject.schedule.stages)


def _fit(subject: Subject, plan: Plan, stage: Stage, memory: int) -> Fit:
    """What fits, found by tracing: the peak grows with rows and with length."""
    alone = subject.alone(replace(stage, spec=stage.spec.model_copy(update={"accumulate": 1})))

    def peak(rows: int, length: int) -> int:
        batching = subject.batching.of_size(rows, length)
        return subject.plan(alone, batching).stages[0].cost.peak_bytes

    length = subject.batching.length
    longest = _positions(subject)
    return Fit(
        memory_bytes=memory,
        stage=stage.name,
        fits=plan.peak_bytes <= memory,
        largest_rows=_largest(lambda n: peak(n, length), memory, start=1, limit=MAX_ROWS),
        longest=_largest(lambda n: peak(1, n), memory, start=2, limit=longest),
    )


def _largest(bytes_at: Callable[[int], int], memory: int, *, start: int, limit: int) -> int:
    """The largest n whose bytes fit, to a sixteenth; 0 when `start` does not. The bytes must not fall with n."""
    if bytes_at(start) > memory:
        return 0
    low, high = start, start
    while high == low and low < limit:  # doubling: a trace of something far too large takes long
        high = min(4 * low, limit)
        low = high if bytes_at(high) <= memory else low
    while high - low > max(low // 16, 1) - (low < 16):
        middle = (low + high) // 2
        if middle == low:
            break
        low, high = (middle, high) if bytes_at(middle) <= memory else (low, middle)
    return low


def _positions(subject: Subject) -> int:
    """The longest row that the configuration allows."""
    config = load_skeleton(subject.source, trust_remote_code=subject.trust_remote_code).config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return most if isinstance(most, int) else 1 << 20


def _alternatives(subject: Subject, stage: Stage) -> Iterator[Alternative]:
    """The stage's own selection beside the usual ones."""
    n = subject.anatomy.n_layers
    few = max(n // 8, 1)
    usual = ["all", "ffn", "attn", "norm", f"layers[-{max(n // 2, 1)}:]", f"layers[-{few}:]", "head"]
    for learn in dict.fromkeys([stage.selection.expression, *usual]):
        try:
            schedule = subject.other(stage, learn)
        except SelectionError:
            continue  # this model has no such part
        yield Alternative(learn=learn, cost=subject.plan(schedule).stages[0].cost)
