"""What is planned: a recipe, or a bare model, with enough of it to plan variants too. Read `Subject`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from frostline.anatomy import Anatomy
from frostline.data import Layout
from frostline.levers import Outlook, prefix_outlook
from frostline.model_source import Source
from frostline.plan import Batching, Device, Plan, make_plan
from frostline.prepared import Unresolved, batching_of, choose_device, prepare, unresolved
from frostline.recipe import Recipe
from frostline.schedule import Schedule, Stage
from frostline.selection import select


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned: enough to plan variants of it."""

    source: Source
    schedule: Schedule
    batching: Batching
    untied: bool
    trust_remote_code: bool
    recipe: Recipe | None = None
    """What it was made of; None for a bare model."""
    layout: Layout = "stream"
    unresolved: Mapping[int, Unresolved] = field(default_factory=dict)
    """Stage → its selection, where experts stand in for it."""

    @property
    def anatomy(self) -> Anatomy:
        """Of the model."""
        return self.schedule.stages[0].selection.anatomy

    def plan(self, schedule: Schedule | None = None, batching: Batching | None = None) -> Plan:
        """The plan of the subject, or of another schedule or batching over its model."""
        return make_plan(
            self.source,
            schedule or self.schedule,
            batching or self.batching,
            untied=self.untied,
            trust_remote_code=self.trust_remote_code,
        )

    def on(self, device: Device | None) -> Subject:
        """The same by another device's kernels."""
        return self if device is None else replace(self, batching=replace(self.batching, device=device))

    def alone(self, stage: Stage) -> Schedule:
        """One step of `stage`."""
        return Schedule(stages=(replace(stage, index=0, start=0, n_steps=1),))

    def other(self, stage: Stage, learn: str) -> Schedule:
        """One step of `stage` with another selection. Raises `SelectionError`."""
        spec = stage.spec.model_copy(
            update={"learn": learn, "steps": 1, "tokens": None, "epochs": None, "plateau": None}
        )
        lr = spec.lr if isinstance(spec.lr, float) else max(spec.lr.values())
        optimizer = spec.optimizer.model_copy(update={"weight_decay": 0.0, "betas": None})
        spec = spec.model_copy(update={"lr": lr, "optimizer": optimizer, "warmup": 0})
        return Schedule.of([("other", spec, select(self.anatomy, learn, ties="together"))])


def subject_of(recipe: Recipe, trust_remote_code: bool, *, stand_in: bool = False) -> Subject:
    """A recipe as a subject; reads its data and its model's configuration. `stand_in`: see `prepare`."""
    prepared = prepare(recipe, stand_in=stand_in, trust_remote_code=trust_remote_code)
    return Subject(
        source=recipe.model,
        schedule=prepared.schedule,
        batching=batching_of(prepared, choose_device(recipe)),
        untied=recipe.ties == "untie",
        trust_remote_code=trust_remote_code,
        recipe=recipe,
        layout=prepared.feed.layout,
        unresolved=unresolved(prepared),
    )


def outlook_of(subject: Subject, plan: Plan) -> tuple[Outlook, ...]:
    """What will become of every stage's frozen prefix; nothing is known of a bare model's."""
    return prefix_outlook(subject.recipe, plan, subject.schedule, subject.layout) if subject.recipe else ()
