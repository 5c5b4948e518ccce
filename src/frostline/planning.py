"""Plans and what they answer: does it fit, what is the most that fits, what would something else cost, and why.

Composes recipe, model and `plan`; `frostline plan` and `frostline why` are these calls. Read `plan_recipe` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from frostline.anatomy import Anatomy, read_anatomy
from frostline.errors import PlanError, SelectionError
from frostline.model import Source, load_skeleton
from frostline.plan import Batching, Plan, StageCost, make_plan, plan_to_json
from frostline.recipe import Recipe, StageSpec, load_recipe
from frostline.run import prepare
from frostline.run_folder import checkpoint_of
from frostline.schedule import Schedule, Stage
from frostline.selection import select

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
class Planned:
    """A plan with its answers."""

    plan: Plan
    fit: Fit | None
    alternatives: tuple[Alternative, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            **plan_to_json(self.plan),
            "fit": asdict(self.fit) if self.fit else None,
            "alternatives": [
                {"learn": a.learn, "total_flops": a.cost.total_flops, **asdict(a.cost)} for a in self.alternatives
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """What is planned: enough to plan variants of it."""

    source: Source
    schedule: Schedule
    batching: Batching
    untied: bool
    trust_remote_code: bool

    @property
    def anatomy(self) -> Anatomy:
        return self.schedule.stages[0].selection.anatomy

    def plan(self, schedule: Schedule | None = None, batching: Batching | None = None) -> Plan:
        return make_plan(
            self.source,
            schedule or self.schedule,
            batching or self.batching,
            untied=self.untied,
            trust_remote_code=self.trust_remote_code,
        )

    def other(self, stage: Stage, learn: str) -> Schedule:
        """One step of `stage` with another selection. Raises `SelectionError`."""
        spec = stage.spec.model_copy(
            update={"learn": learn, "steps": 1, "tokens": None, "epochs": None, "plateau": None}
        )
        lr = spec.lr if isinstance(spec.lr, float) else max(spec.lr.values())
        optimizer = spec.optimizer.model_copy(update={"weight_decay": 0.0, "betas": None})
        spec = spec.model_copy(update={"lr": lr, "optimizer": optimizer, "warmup": 0})
        return Schedule.of([("other", spec, select(self.anatomy, learn, ties="together"))])


def plan_recipe(
    path: Path,
    *,
    overrides: Iterable[str] = (),
    memory: int | None = None,
    compared: bool = False,
    trust_remote_code: bool = False,
) -> Planned:
    """The plan of a recipe. Reads its data (for epochs) and its model's configuration, no weights."""
    return _answered(_subject(load_recipe(path, overrides=overrides), trust_remote_code), memory, compared)


def plan_model(
    model: str,
    *,
    learn: str,
    rows: int,
    length: int,
    memory: int | None = None,
    compared: bool = False,
    trust_remote_code: bool = False,
) -> Planned:
    """The plan of one AdamW step over a model: a folder, a hub name, or a bare configuration file."""
    source = checkpoint_of(model)
    anatomy = read_anatomy(load_skeleton(source, trust_remote_code=trust_remote_code))
    spec = StageSpec(learn=learn, steps=1, lr=1.0)
    schedule = Schedule.of([("step", spec, select(anatomy, learn, ties="together"))])
    subject = _Subject(
        source=source,
        schedule=schedule,
        batching=Batching(rows=rows, length=length),
        untied=False,
        trust_remote_code=trust_remote_code,
    )
    return _answered(subject, memory, compared)


def _subject(recipe: Recipe, trust_remote_code: bool) -> _Subject:
    prepared = prepare(recipe, trust_remote_code=trust_remote_code)
    return _Subject(
        source=recipe.model,
        schedule=prepared.schedule,
        batching=Batching(rows=recipe.data.batch, length=recipe.data.length, bf16=recipe.precision == "bf16-mixed"),
        untied=recipe.ties == "untie",
        trust_remote_code=trust_remote_code,
    )


def _answered(subject: _Subject, memory: int | None, compared: bool) -> Planned:
    plan = subject.plan()
    heaviest = max(range(len(plan.stages)), key=lambda i: plan.stages[i].cost.peak_bytes)
    stage = subject.schedule.stages[heaviest]
    return Planned(
        plan=plan,
        fit=_fit(subject, plan, stage, memory) if memory is not None else None,
        alternatives=tuple(_alternatives(subject, stage)) if compared else (),
    )


def _fit(subject: _Subject, plan: Plan, stage: Stage, memory: int) -> Fit:
    """What fits, found by tracing: the peak grows with rows and with length."""
    alone = Schedule(stages=(replace(stage, index=0, start=0, n_steps=1),))
    alone = Schedule(stages=(replace(alone.stages[0], spec=stage.spec.model_copy(update={"accumulate": 1})),))

    def peak(rows: int, length: int) -> int:
        batching = replace(subject.batching, rows=rows, length=length)
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


def _positions(subject: _Subject) -> int:
    """The longest row that the configuration allows."""
    config = load_skeleton(subject.source, trust_remote_code=subject.trust_remote_code).config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return most if isinstance(most, int) else 1 << 20


def _alternatives(subject: _Subject, stage: Stage) -> Iterator[Alternative]:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """What leaving one part out of a stage would save per step."""

    part: str
    learn: str
    """The selection without it."""
    frontier: str
    """Where backward would stop then."""
    flops_saved: float
    """Share of the step's FLOPs."""
    bytes_saved: int
    """Of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """What makes a stage cost what it costs."""

    stage: str
    learn: str
    cost: StageCost
    reasons: tuple[Reason, ...]
    """What could be left out, the largest saving of FLOPs first."""


def why_recipe(path: Path, *, overrides: Iterable[str] = (), trust_remote_code: bool = False) -> tuple[Why, ...]:
    """For every stage, which parts keep the backward pass deep and what leaving each out would save."""
    subject = _subject(load_recipe(path, overrides=overrides), trust_remote_code)
    plan = subject.plan()
    return tuple(
        Why(
            stage=stage.name,
            learn=stage.selection.expression,
            cost=planned.cost,
            reasons=tuple(_reasons(subject, stage, planned.cost)),
        )
        for stage, planned in zip(subject.schedule.stages, plan.stages, strict=True)
    )


def _reasons(subject: _Subject, stage: Stage, cost: StageCost) -> Sequence[Reason]:
    parts = {c.path[0][0] for c, _ in stage.selection.by_component() if c.path[0][0] != "layers"}
    layers = stage.selection.layers
    kinds = dict.fromkeys(c.path[1][0] for c, _ in stage.selection.by_component() if c.path[0][0] == "layers")
    candidates = [*sorted(parts), *kinds]
    if len(layers) > 1:
        candidates += [f"layers[:{layers[0] + max((layers[-1] - layers[0] + 1) // 2, 1)}]", f"layers[{layers[0]}]"]
    found = []
    for part in candidates:
        learn = f"({stage.selection.expression}) - {part}"
        try:
            other = subject.plan(subject.other(stage, learn)).stages[0].cost
        except (SelectionError, PlanError):
            continue  # nothing would be left
        found.append(
            Reason(
                part=part,
                learn=learn,
                frontier=other.frontier,
                flops_saved=1 - other.total_flops / cost.total_flops,
                bytes_saved=cost.peak_bytes - other.peak_bytes,
            )
        )
    return sorted(found, key=lambda r: -r.flops_saved)
