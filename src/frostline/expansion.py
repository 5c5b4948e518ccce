"""A recipe with a named schedule → the same recipe with its plain stages, and what there is to tell about them.

Nothing after this knows of named schedules: the run folder's recipe holds the stages, and audit and resume read those.
Read `expand` first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frostline.anatomy import Anatomy
from frostline.engine.stage_bytes import stage_bytes
from frostline.errors import RecipeError, SelectionError
from frostline.model import load_model
from frostline.recipe import Recipe, ScratchModel, plain, with_stages
from frostline.recipe.schedule_spec import Spectrum
from frostline.schedule import Schedule, make_groups
from frostline.schedule.named import PlainStage, chosen_expression, plain_stages
from frostline.schedule.spectrum import Ranked, fingerprint_of, rank
from frostline.selection import Selection, select
from frostline.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Expansion:
    """What a named schedule became."""

    name: str
    settings: dict[str, Any]
    """The schedule as the recipe has it, defaults included."""
    stages: tuple[PlainStage, ...]
    always: str | None
    """What learns in every stage, where the schedule has such a setting."""
    ranking: tuple[Ranked, ...] = ()
    """What Spectrum measured."""

    def to_json(self) -> dict[str, Any]:
        """As plain data; a measurement with its hash."""
        measured = {"ranking": [asdict(r) for r in self.ranking], "sha256": fingerprint_of(self.ranking)}
        return {"settings": self.settings, "stages": list(self.stages), **(measured if self.ranking else {})}


def expand(recipe: Recipe, anatomy: Anatomy, *, trust_remote_code: bool = False) -> tuple[Recipe, Expansion | None]:
    """The recipe with plain stages; unchanged, and None, where it has them already.

    Reads the model's weights for Spectrum and for nothing else. Raises `RecipeError` for what the model does not have.
    """
    spec = recipe.schedule
    if spec is None:
        return recipe, None
    for key in ("always", "among", "freeze"):
        _check(anatomy, getattr(spec, key, None), f"schedule.{key}")
    ranking = measure(recipe, spec, anatomy, trust_remote_code) if isinstance(spec, Spectrum) else ()
    chosen = chosen_expression([r.component for r in ranking if r.chosen]) if ranking else None
    expansion = Expansion(
        name=spec.name,
        settings=plain(spec.model_dump()),
        stages=plain_stages(spec, anatomy, seed=recipe.seed, chosen=chosen),
        always=getattr(spec, "always", None),
        ranking=ranking,
    )
    with named_in(expansion):
        return with_stages(recipe, expansion.stages), expansion


def measure(recipe: Recipe, spec: Spectrum, anatomy: Anatomy, trust_remote_code: bool) -> tuple[Ranked, ...]:
    """Spectrum's ranking of the base model's matrices. Raises `RecipeError` for a model without weights."""
    if isinstance(recipe.model, ScratchModel):
        raise RecipeError("schedule: spectrum ranks trained weights, and a model from scratch has none yet")
    if Path(recipe.model).is_file():
        raise RecipeError(f"schedule: spectrum ranks weights, and {recipe.model} is a configuration without any")
    weights: Mapping[str, torch.Tensor]
    if Path(recipe.model).is_dir() and not trust_remote_code:
        names = {t.name for t in anatomy.tensors if t.kind == "parameter" and t.alias_of is None}
        weights = Weights(recipe.model, names=names)
    else:
        weights = load_model(recipe.model, trust_remote_code=trust_remote_code).state_dict()
    among = select(anatomy, spec.among, ties="together") if spec.among else None
    return rank(anatomy, weights, top=spec.top, among=among)


def _check(anatomy: Anatomy, expression: str | None, key: str) -> None:
    if expression is not None:
        try:
            select(anatomy, expression, ties="together")
        except SelectionError as error:
            raise RecipeError(f"{key}: {error}") from None


@contextmanager
def named_in(expansion: Expansion | None) -> Iterator[None]:
    """Inside, an error about a stage that nobody wrote says which schedule it comes from."""
    try:
        yield
    except RecipeError as error:
        if expansion is None:
            raise

        def said(match: re.Match[str]) -> str:
            stage = expansion.stages[int(match[1])]["name"]
            return f"schedule {expansion.name}, its stage '{stage}'{': ' if match[2] == '.' else ''}"

        raise RecipeError(re.sub(r"(?:recipe: )?'?stages\[(\d+)\](\.?)", said, str(error))) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class AlwaysOn:
    """What a schedule's `always` costs in a stage: gradients and optimizer state."""

    expression: str
    n_elements: int
    n_bytes: int
    stage_elements: int
    stage_bytes: int

    @property
    def share(self) -> float:
        """Of the stage's bytes."""
        return self.n_bytes / self.stage_bytes


def always_on(expansion: Expansion | None, schedule: Schedule) -> AlwaysOn | None:
    """The memory of what is always on, against that of the first stage; None where nothing is."""
    if expansion is None or expansion.always is None:
        return None
    stage = schedule.stages[0]
    anatomy = stage.selection.anatomy

    def element_bytes(tensor: str) -> int:
        return anatomy.tensor[tensor].element_bytes

    selection: Selection = select(anatomy, expansion.always, ties="together")
    lr = stage.spec.lr if isinstance(stage.spec.lr, float) else max(stage.spec.lr.values())
    spec = stage.spec.model_copy(
        update={"lr": lr, "optimizer": stage.spec.optimizer.model_copy(update={"betas": None})}
    )
    alone = replace(stage, selection=selection, groups=make_groups(selection, spec))
    return AlwaysOn(
        expression=expansion.always,
        n_elements=selection.n_elements,
        n_bytes=stage_bytes(alone, element_bytes),
        stage_elements=stage.selection.n_elements,
        stage_bytes=stage_bytes(stage, element_bytes),
    )
