"""The recipe's keys as Markdown, from the records themselves, so that the page cannot drift from them."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from frostline.recipe.comparison_spec import ComparisonSpec
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
from frostline.recipe.route_spec import RouteSpec
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
    ("each of `routes:` of a stage", RouteSpec),
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
    ("A comparison, a file of its own", ComparisonSpec),
)

TABLE = "| key | takes | default | meaning |\n|---|---|---|---|"
HEAD = """# The recipe, key by key

A recipe is YAML 1.2 (`1e-4` is a number). Unknown keys are errors. The run folder's `recipe.yaml` holds every key with
the value that was used. Among the stages, `{repeat: 3, stages: […]}` runs a list of stages several times; the run
folder's recipe has them written out, their names followed by `-1`, `-2`, … A named schedule (`schedule:`) stands in
place of the list of stages; [schedules](schedules.md) says what each does. This page is written by `make docs` from
the records in `src/frostline/recipe/`.

Under "takes", `{…}` is a record whose keys have a table of their own below, and `{name: …}` a mapping; the names of a
schedule are the titles below. A part is what the design calls a component.
"""


def recipe_markdown() -> str:
    """The page: one table of keys, what they take, defaults and meanings per record."""
    parts = [HEAD]
    for title, record in SECTIONS:
        parts.append(f"## {title}\n\n{cleandoc(record.__doc__ or '')}\n\n{TABLE}")
        parts[-1] += "".join(f"\n{_row(record, name, field)}" for name, field in _own_fields(record).items())
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def _own_fields(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a record; of a named schedule, those that are not every schedule's, or have another default."""
    if record is NamedSchedule or not issubclass(record, NamedSchedule):
        return dict(record.model_fields)
    shared = NamedSchedule.model_fields
    return {n: f for n, f in record.model_fields.items() if n not in shared or f.default != shared[n].default}


def _row(record: type[BaseModel], name: str, field: FieldInfo) -> str:
    taken = takes(field.annotation, field.metadata, alone=_may_stand_alone(record, name))
    meaning = " ".join((field.description or "").split())
    cells = (f"`{name}`", taken, _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def takes(annotation: Any, limits: Sequence[Any] = (), *, alone: bool = False) -> str:
    """The values of a type within limits: `off` · `blocks`; a whole number ≥ 1. `alone`: one of a list will do, or the
    name of a record."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        given = [m for i in inner[1:] for m in (i.metadata if isinstance(i, FieldInfo) else [i])]
        return takes(inner[0], given, alone=alone)
    if origin in (Union, UnionType):
        return _one_of([takes(i, limits, alone=alone) for i in sorted(inner, key=lambda i: i is NoneType)])
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"`[{', '.join('…' * len(inner))}]`, each {takes(inner[0])}"
    if origin is tuple:
        return f"{takes(inner[0])}, or a list of these" if alone else f"a list of {takes(inner[0])}"
    if origin is dict:
        return f"`{{name: …}}`, each {takes(inner[1])}"
    if issubclass(annotation, BaseModel):
        if issubclass(annotation, NamedSchedule):
            return "`{name: …}`"
        name = takes(annotation.model_fields["name"].annotation) + " or " if alone else ""
        return f"{name}`{{…}}`"
    return _PLAIN[annotation] + _within(limits)


def _may_stand_alone(record: type[BaseModel], name: str) -> bool:
    """Whether a key has a check that makes a list of one of a value, or a record of its name."""
    checks = record.__pydantic_decorators__.field_validators.values()
    return any(name in c.info.fields and c.info.mode == "before" for c in checks)


def _one_of(kinds: Sequence[str]) -> str:
    """Kinds of values, any of which will do."""
    apart = list(dict.fromkeys(kinds))
    return " or ".join(f"({k})" if " or " in k and len(apart) > 1 else k for k in apart)


_PLAIN: dict[Any, str] = {
    Any: "anything",
    bool: "`true` · `false`",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "`null`",
}
"""Type → what to call it."""
_SIGNS = {"ge": "≥", "gt": ">", "lt": "<", "le": "≤"}


def _within(limits: Sequence[Any]) -> str:
    """The bounds of a number, written after it: ` ≥ 0, < 1`."""
    kinds = [(type(m).__name__.lower(), m) for m in limits]  # Ge(ge=0)
    found = [f"{_SIGNS[kind]} {_number(getattr(m, kind))}" for kind, m in kinds if kind in _SIGNS]
    return f" {' and '.join(found)}" if found else ""


def _number(bound: float) -> str:
    return "2⁶³" if bound == 2**63 else str(bound)


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`"
