"""The recipe's keys as Markdown, from the records themselves, so that the page cannot drift from them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from frostline.recipe.data_spec import DataSpec, SourceSpec
from frostline.recipe.model_spec import ScratchModel, TrainedTokenizer
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.recipe import (
    CheckpointSpec,
    EvalSpec,
    EvidenceSpec,
    NonFiniteSpec,
    Recipe,
    RunRateSpec,
    SpikeSpec,
)
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
    ("`lr_across:`", RunRateSpec),
    ("`eval:`", EvalSpec),
    ("`nonfinite:`", NonFiniteSpec),
    ("`spike:`", SpikeSpec),
    ("`checkpoint:`", CheckpointSpec),
    ("`evidence:`", EvidenceSpec),
)

HEAD = """# The recipe, key by key

A recipe is YAML 1.2 (`1e-4` is a number). Unknown keys are errors. The run folder's `recipe.yaml` holds every key with
the value that was used. Among the stages, `{repeat: 3, stages: […]}` runs a list of stages several times; the run
folder's recipe has them written out, their names followed by `-1`, `-2`, … This page is written by `make docs` from the
records in `src/frostline/recipe/`.
"""


def recipe_markdown() -> str:
    """The page: one table of keys, defaults and meanings per record."""
    parts = [HEAD]
    for title, record in SECTIONS:
        parts.append(f"## {title}\n\n{record.__doc__}\n\n| key | default | meaning |\n|---|---|---|")
        parts[-1] += "".join(f"\n{_row(name, field)}" for name, field in record.model_fields.items())
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
