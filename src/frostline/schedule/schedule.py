"""A schedule is a table of stages; which stage a step belongs to is a pure lookup. Steps are 0-based."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frostline.recipe import StageSpec
from frostline.selection import Selection


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
    start: int
    """Its first step."""

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.start + self.spec.steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages of a run, one after another without gaps."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ends = [0, *(s.end for s in self.stages)]
        assert [s.start for s in self.stages] == ends[:-1], "stages must follow one another from step 0"

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end

    def at(self, step: int) -> Stage:
        """The stage that `step` (0-based) belongs to. Raises `IndexError` outside the run."""
        if not 0 <= step < self.n_steps:
            raise IndexError(f"step {step} is outside the run's {self.n_steps} steps")
        return next(s for s in self.stages if step < s.end)

    @classmethod
    def of(cls, specs: list[tuple[str, StageSpec, Selection]]) -> Schedule:
        """Lay stages (name, settings, what learns) one after another."""
        stages, start = [], 0
        for i, (name, spec, selection) in enumerate(specs):
            stages.append(Stage(index=i, name=name, spec=spec, selection=selection, start=start))
            start += spec.steps
        return cls(stages=tuple(stages))


def lr_at(stage: Stage, step: int) -> float:
    """The learning rate of a step: linear warm-up to `lr`, then the decay, which would reach 0 one step after the end.

    `step` is the run's (0-based). The first warm-up step already has a rate above zero.
    """
    spec, done = stage.spec, step - stage.start
    if done < spec.warmup:
        return spec.lr * (done + 1) / (spec.warmup + 1)
    progress = (done - spec.warmup) / (spec.steps - spec.warmup)
    match spec.decay:
        case "none":
            return spec.lr
        case "linear":
            return spec.lr * (1 - progress)
        case "cosine":
            return spec.lr * 0.5 * (1 + math.cos(math.pi * progress))
