"""The recipe's keys as Markdown, from the records themselves, so that the page cannot drift from them."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from frostline.recipe.data_spec import DataSpec, SourceSpec
from frostline.recipe.model_spec import ScratchModel, TrainedTokenizer
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.recipe import (
    CacheSpec,
    CheckpointSpec,
    EvalSpec,
    EvidenceSpec,
    NonFiniteSpec,
    Recipe,
    RunRateSpec,
    SpikeSpec,
)
from frostline.recipe.schedule_spec import SCHEDULES, DurationSpec, NamedSchedule
from frostline.recipe.stage_spec import OptimizerSpec, PlateauSpec, StageSpec

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Top level", Recipe),
    ("`model:` from scratch", ScratchModel),
    ("`tokenizer:` to train", TrainedTokenizer),
    ("`data:`", DataSpec),
    ("a source in `data.train`, in place of a path", SourceSpec),
    ("each of `stages:`", StageSpec),
    ("`optimizer:` of a stage", OptimizerSpec),
    ("`plateau:` of a stage", PlateauSpec),
    ("`moe:` of a stage", MoeSpec),
    ("`schedule:`, whichever it is", NamedSchedule),
    *((f"`schedule: {{name: {name}, …}}`", record) for name, record in SCHEDULES.items()),
    ("`each:`, `last:`, `probe:`, `tune:`, `joint:`, `then:`, `train:` of a schedule", DurationSpec),
    ("`lr_across:`", RunRateSpec),
    ("`eval:`", EvalSpec),
    ("`nonfinite:`", NonFiniteSpec),
    ("`spike:`", SpikeSpec),
    ("`checkpoint:`", CheckpointSpec),
    ("`cache:`", CacheSpec),
    ("`evidence:`", EvidenceSpec),
)

HEAD = """# The recipe, key by key

A recipe is YAML 1.2 (`1e-4` is a number). Unknown keys are errors. The run folder's `recipe.yaml` holds every key with
the value that was used. Among the stages, `{repeat: 3, stages: […]}` runs a list of stages several times; the run
folder's recipe has them written out, their names followed by `-1`, `-2`, … A named schedule (`schedule:`) stands in
place of the list of stages; [schedules](schedules.md) says what each does. This page is written by `make docs` from
the records in `src/frostline/recipe/`.
"""


def recipe_markdown() -> str:
    """The page: one table of keys, defaults and meanings per record."""
    parts = [HEAD]
    for title, record in SECTIONS:
        parts.append(f"## {title}\n\n{cleandoc(record.__doc__ or '')}\n\n| key | default | meaning |\n|---|---|---|")
        parts[-1] += "".join(f"\n{_row(name, field)}" for name, field in _own_fields(record).items())
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def _own_fields(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a record; of a named schedule, those that are not every schedule's, or have another default."""
    if record is NamedSchedule or not issubclass(record, NamedSchedule):
        return dict(record.model_fields)
    shared = NamedSchedule.model_fields
    return {n: f for n, f in record.model_fields.items() if n not in shared or f.default != shared[n].default}


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`".replace("|", "\\|")
