"""A schedule is a table of stages; which stage a step belongs to is a pure lookup. Steps are 0-based.

A stage may end before its time (a plateau). What has been decided so far is a list of endings, and `Schedule.ended`
gives the table that follows from it; nothing else about a schedule ever changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from frostline.anatomy import Slice
from frostline.errors import RouteError
from frostline.recipe import PlateauSpec, RunRateSpec, StageSpec
from frostline.schedule.groups import Group, make_groups
from frostline.schedule.routes import Route, make_routes
from frostline.selection import Selection, buffers_by_rule

AtSwitch = Literal["everything", "changing"]
"""What is hashed at a switch: every tensor, or what has learned or is about to; see `EvidenceSpec.at_switch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSize:
    """What one step takes of the training data: turns tokens and epochs into steps."""

    tokens: int
    """Training tokens per step."""
    rows: int
    """Rows per step."""
    n_rows: int
    """Rows of the training data."""

    def n_steps(self, spec: StageSpec) -> int:
        """Steps of a stage, if nothing ends it earlier."""
        return spec.n_steps(tokens_per_step=self.tokens, rows=self.n_rows, rows_per_step=self.rows)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage with its place in the run."""

    index: int
    """0-based."""
    name: str
    spec: StageSpec
    """Its settings, as the recipe says them."""
    selection: Selection
    """What learns."""
    groups: tuple[Group, ...]
    """What learns, by settings."""
    routes: tuple[Route, ...]
    """Where gradients stop."""
    start: int
    """Its first step."""
    n_steps: int
    """Its steps: at most so many while it runs, exactly so many when it has ended."""

    @property
    def by_rule(self) -> tuple[Slice, ...]:
        """Buffers that the stage moves by a rule: correction biases of routers, where `moe.bias` asks for it."""
        asked = self.spec.moe is not None and self.spec.moe.bias is not None
        return buffers_by_rule(self.selection) if asked else ()

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.start + self.n_steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages of a run, one after another without gaps."""

    stages: tuple[Stage, ...]
    across: RunRateSpec | None = None
    """The course of the learning rate across the run, in place of the stages' own."""
    step_size: StepSize | None = None
    """What tokens and epochs were turned into steps with."""
    at_switch: AtSwitch = "everything"
    """What is hashed and kept between two stages."""

    def __post_init__(self) -> None:
        ends = [0, *(s.end for s in self.stages)]
        assert [s.start for s in self.stages] == ends[:-1], "stages must follow one another from step 0"

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end

    def at(self, step: int, endings: Sequence[int] = ()) -> Stage:
        """The stage that `step` (0-based) belongs to, given the ends decided so far. Raises `IndexError` outside."""
        laid = self.ended(endings)
        if not 0 <= step < laid.n_steps:
            raise IndexError(f"step {step} is outside the run's {laid.n_steps} steps")
        return next(s for s in laid.stages if step < s.end)

    def ended(self, endings: Sequence[int]) -> Schedule:
        """The same stages, the first of them with the ends (steps done) that were decided."""
        if list(endings) == [s.end for s in self.stages[: len(endings)]]:
            return self
        stages, start = [], 0
        for i, s in enumerate(self.stages):
            n_steps = endings[i] - start if i < len(endings) else s.n_steps
            stages.append(replace(s, start=start, n_steps=n_steps))
            start += n_steps
        return replace(self, stages=tuple(stages))

    def rate_at(self, step: int) -> float:
        """The factor (0 to 1) that every learning rate is multiplied with at a step (0-based)."""
        if self.across is not None:
            return _course(step, self.n_steps, self.across.warmup, self.across.decay)
        stage = self.at(step)
        return _course(step - stage.start, stage.n_steps, stage.spec.warmup, stage.spec.decay)

    @classmethod
    def of(
        cls,
        specs: Sequence[tuple[str, StageSpec, Selection]],
        *,
        step_size: StepSize | None = None,
        across: RunRateSpec | None = None,
        at_switch: AtSwitch = "everything",
    ) -> Schedule:
        """Lay stages (name, settings, what learns) one after another.

        `step_size` is needed where a duration is in tokens or epochs. Raises `SelectionError` for settings by part and
        `RouteError` for routes.
        """
        stages, start = [], 0
        for i, (name, spec, selection) in enumerate(specs):
            if step_size is None and spec.steps is None:
                raise ValueError(f"stage {name}: without training rows, a duration is in steps")
            n_steps = step_size.n_steps(spec) if step_size else spec.steps or 0
            groups = make_groups(selection, spec)
            try:
                routes = make_routes(spec.routes, selection.anatomy.n_layers)
            except RouteError as error:
                raise RouteError(f"stages[{i}].routes: {error}") from None
            stages.append(
                Stage(
                    index=i,
                    name=name,
                    spec=spec,
                    selection=selection,
                    groups=groups,
                    routes=routes,
                    start=start,
                    n_steps=n_steps,
                )
            )
            start += n_steps
        return cls(stages=tuple(stages), across=across, step_size=step_size, at_switch=at_switch)


def _course(done: int, n_steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up to 1, then the decay, which would reach 0 one step after the end.

    The first warm-up step already has a factor above zero.
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = (done - warmup) / max(n_steps - warmup, 1)
    match decay:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0


def plateaued(losses: Sequence[float], plateau: PlateauSpec) -> bool:
    """Whether the last `patience` of a stage's held-out losses brought no new best."""
    best, since = math.inf, 0
    for loss in losses:
        improved = loss < best - plateau.min_delta
        best, since = (loss, 0) if improved else (best, since + 1)
    return since >= plateau.patience
