"""The page of keys: nothing of the records is left out, and what it says a key takes is what the record takes."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from frostline.recipe import NamedSchedule, Recipe
from frostline.recipe.comparison_spec import ComparisonSpec
from frostline.recipe.describe import SECTIONS, recipe_markdown, takes
from frostline.recipe.stage_spec import Betas, OptimizerSpec, Rates, StageSpec


def records_in(annotation: Any) -> set[type[BaseModel]]:
    """Every record that an annotation lets in, those inside records too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inside = (records_in(f.annotation) for f in annotation.model_fields.values())
        return {annotation}.union(*inside)
    return set().union(*(records_in(a) for a in get_args(annotation)))


def literals_in(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return list(inner) if get_origin(annotation) is Literal else [v for a in inner for v in literals_in(a)]


def test_every_record_that_a_recipe_may_hold_has_a_table() -> None:
    tables = {record for _, record in SECTIONS}
    assert records_in(Recipe) == tables - {NamedSchedule, ComparisonSpec}, (
        "NamedSchedule: the keys that all schedules share; ComparisonSpec: a file of its own"
    )


def test_every_allowed_value_stands_in_the_row_of_its_key() -> None:
    page = recipe_markdown()
    n = 0
    for title, record in SECTIONS:
        (table,) = re.findall(rf"## {re.escape(title)}\n(.*?)(?=\n## |\Z)", page, re.S)
        for name, field in record.model_fields.items():
            row = re.search(rf"^\| `{name}` \| (.*?) \| ", table, re.M)
            for value in literals_in(field.annotation) if row else ():
                n += 1
                assert f"`{value}`" in row[1], (title, name, value)  # type: ignore[index]
    assert n > 90


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Literal["off", "on"], "`off` · `on`"),
        (Rates, "a number > 0 or `{name: …}`, each a number > 0"),
        (Betas | None, "`[…, …]`, each a number ≥ 0 and < 1 or `null`"),
        (tuple[int | str, ...], "a list of a whole number or text"),
        (bool | OptimizerSpec, "`true` · `false` or `{…}`"),
    ],
)
def test_a_type_is_said_in_words(kind: Any, words: str) -> None:
    assert takes(kind) == words


def test_a_bound_on_the_page_is_the_bound_of_the_record() -> None:
    field = StageSpec.model_fields["layer_decay"]
    assert takes(field.annotation, field.metadata) == "a number > 0 and ≤ 1 or `null`"
    values = {"learn": "all", "steps": 1, "lr": 1.0}
    for wrong in (0.0, 1.5):
        with pytest.raises(ValidationError):
            TypeAdapter(StageSpec).validate_python({**values, "layer_decay": wrong})
    assert StageSpec(**values, layer_decay=1.0).layer_decay == 1.0
