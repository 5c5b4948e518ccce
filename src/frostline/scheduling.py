"""The stages of a recipe as plain data. `frostline schedule` is `schedule_recipe` and these."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frostline.expansion import always_on
from frostline.prepared import Prepared, prepare, unresolved
from frostline.recipe import Recipe, as_recipe, plain


def schedule_recipe(
    recipe: Recipe | str | Path, *, overrides: Iterable[str] = (), trust_remote_code: bool = False
) -> Prepared:
    """The stages of a recipe (a record, a file, or a name of the package's), a named schedule written out: `.schedule`.

    Where experts are to be measured when training starts, some stand in for them. Raises a `FrostlineError` as `train`
    does.
    """
    return prepare(as_recipe(recipe, overrides), stand_in=True, trust_remote_code=trust_remote_code)


def written_stages(prepared: Prepared) -> list[dict[str, Any]]:
    """The stages as YAML would list them: what differs from a stage's defaults."""
    if prepared.expansion:
        return [dict(s) for s in prepared.expansion.stages]
    return [plain(s.model_dump(exclude_defaults=True)) for s in prepared.recipe.stages]


def schedule_to_json(prepared: Prepared) -> dict[str, Any]:
    """The stages with their place in the run, and what a named schedule measured or keeps on."""
    expansion, found = prepared.expansion, always_on(prepared.expansion, prepared.schedule)
    stages, still_open = [], unresolved(prepared)
    for stage, written in zip(prepared.schedule.stages, written_stages(prepared), strict=True):
        place = {"name": stage.name, "start": stage.start, "n_steps": stage.n_steps}
        waiting = still_open.get(stage.index)
        learning = {"n_learning": stage.selection.n_elements, "unresolved": waiting.waits_for if waiting else None}
        stages.append({**place, **learning, "written": written})
    shared = None
    if found is not None:
        shared = {"expression": found.expression, "n_elements": found.n_elements, "n_bytes": found.n_bytes}
        shared |= {"stage_elements": found.stage_elements, "stage_bytes": found.stage_bytes, "share": found.share}
    return {
        "schedule": expansion.to_json() | {"name": expansion.name} if expansion else None,
        "n_steps": prepared.schedule.n_steps,
        "always_on": shared,
        "stages": stages,
    }
