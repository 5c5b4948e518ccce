"""A comparison of strategies over seeds, as its file says it. `comparison.py` makes recipes of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from frostline.recipe.base import Record

Changes = dict[str, Any] | list[str] | str


class ComparisonSpec(Record):
    """Strategies × seeds: `frostline compare` trains every strategy with every seed."""

    recipe: str | dict[str, Any]
    """What the strategies have in common: a recipe file, a recipe of the package by its name, or the recipe itself."""
    set: dict[str, Any] = Field(default={})
    """Keys of that recipe to change for all strategies: `{eval.every: 20}`."""
    strategies: Annotated[dict[str, Any], Field(min_length=1)]
    """Name → what differs from the common recipe: keys (`stages[0].learn: ffn`, a line each), a list as for `--set`
    (`["stages[0].learn=ffn"]`), or a recipe file of its own. Stages that a strategy gives replace a schedule of the
    common recipe, and the other way round."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A list, or how many from 0 on. Every strategy is trained with each of them."""
    baseline: str | None = None
    """The strategy that the others are held against; the first one when left out."""
    budget: str | None = None
    """What was held equal, in a sentence; shown with the results."""
    corpus: Literal["python"] | None = None
    """`python`: the text that every Python carries, written beside the runs, is what all strategies train on unless
    `--set data.train=…` says otherwise."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_or_list(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
            raise ValueError(f"write a list of whole numbers, or how many from 0 on; found {value!r}")
        if isinstance(value, int):
            if not 1 <= value <= 10_000:
                raise ValueError(f"there must be at least one seed (and at most 10,000); found {value}")
            return tuple(range(value))
        if not value:
            raise ValueError("there must be at least one seed; the list is empty")
        return tuple(value)

    @field_validator("seeds")
    @classmethod
    def _seeds_apart(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        twice = [s for s, n in Counter(value).items() if n > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice: the same run twice says nothing")
        if min(value) < 0 or max(value) >= 2**63:
            raise ValueError("a seed is a whole number from 0 to 2^63 - 1")
        return value

    @field_validator("strategies")
    @classmethod
    def _named_and_changed(cls, value: dict[str, Any]) -> dict[str, Any]:
        seen: dict[str, str] = {}
        for name, changes in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"'{name}' cannot be the name of a strategy: letters, digits, '_', '.' and '-'")
            if name.lower() in seen:
                raise ValueError(f"'{seen[name.lower()]}' and '{name}' differ in case alone, and name folders")
            seen[name.lower()] = name
            is_list = isinstance(changes, list) and all(isinstance(c, str) for c in changes)
            if not (is_list or isinstance(changes, (dict, str))):
                raise ValueError(
                    f"'{name}': write keys to change (stages[0].learn: ffn, a line each), a list as for --set "
                    f"(['stages[0].learn=ffn']) or a recipe file; [] for none; found {changes!r}"
                )
        return value

    @model_validator(mode="after")
    def _baseline_is_one(self) -> ComparisonSpec:
        if self.baseline is not None and self.baseline not in self.strategies:
            raise ValueError(
                f"baseline: no strategy is named '{self.baseline}'; there are {', '.join(self.strategies)}"
            )
        return self
