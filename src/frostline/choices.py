"""What the selections of a recipe were resolved to, where the model alone does not decide: by use, or by a file.

Resolved once, when training starts, and kept in the run folder with what it was resolved from: `resume` goes on with
the kept selections, and the audit resolves them again and compares. Read `Choice` first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frostline.anatomy import Anatomy
from frostline.errors import RecipeError, RunFolderError, SelectionError
from frostline.moe import Usage, esft_expression, scores_of, usage_from_json, usage_to_json
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder
from frostline.selection import SCORES, Needs, Scores, needs, plain

FILE = "evidence/choice.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Plain selections, and what they were resolved from."""

    plain: dict[str, str]
    """Selection as written → as one that names every expert by its number."""
    measurement: dict[str, Any] | None
    """Which experts the training data uses; None where nothing had to be measured."""
    files: dict[str, str]
    """Expert configuration of ESFT, as it is named → its text."""

    @property
    def sha256(self) -> str:
        """Of what they were resolved from."""
        text = json.dumps([self.measurement, self.files], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, expression: str) -> str:
        """A selection as a plain one; itself, where it always was."""
        return self.plain.get(expression, expression)


def wants_measurement(recipe: Recipe) -> bool:
    """Whether a stage ranks experts by their use. Raises `RecipeError`."""
    return any(_needs(i, stage.learn).scores for i, stage in enumerate(recipe.stages))


def _needs(index: int, learn: str) -> Needs:
    try:
        return needs(learn)
    except SelectionError as error:
        raise RecipeError(f"stages[{index}].learn: {error}") from None


def make_choice(
    recipe: Recipe, anatomy: Anatomy, usage: Usage | None = None, *, stand_in: bool = False
) -> Choice | None:
    """Resolve what the model alone does not decide; None where there is nothing of that kind.

    Files are read here; rankings are resolved with `usage`, and left as they are without. `stand_in`: without it they
    are resolved as if all experts were used alike, so that the first of every layer stand for those that will be
    measured: to be shown and reckoned with, never to be trained. Raises `RecipeError` naming the stage.
    """
    if not any(_needs(i, stage.learn) for i, stage in enumerate(recipe.stages)):
        return None
    files: dict[str, str] = {}
    for i, stage in enumerate(recipe.stages):
        for path in _needs(i, stage.learn).files:
            files[path] = _read(path, f"stages[{i}].learn")
    measurement = usage_to_json(usage) if usage is not None else None
    choice = Choice(plain={}, measurement=measurement, files=files)
    asked = {s.learn: f"stages[{i}].learn: " for i, s in enumerate(recipe.stages)}
    return _resolved(choice, asked, anatomy, scores=_alike(anatomy) if stand_in else None)


def _alike(anatomy: Anatomy) -> Scores:
    """Scores of experts that are all used alike."""
    found: dict[str, set[str]] = {}
    for component in anatomy.components:
        site, _, rest = component.name.partition(".experts[")
        if rest:
            found.setdefault(site, set()).add(rest.partition("]")[0])
    shares = {site: (1 / len(experts),) * len(experts) for site, experts in found.items()}
    return dict.fromkeys(SCORES, shares)


def _resolved(choice: Choice, asked: Mapping[str, str], anatomy: Anatomy, *, scores: Scores | None = None) -> Choice:
    """The choice with every selection of `asked` (→ what to begin an error with) resolved anew; by `scores` where it
    holds no measurement."""
    files = {path: esft_expression(text, anatomy, path) for path, text in choice.files.items()}
    if choice.measurement is not None:
        scores = scores_of(usage_from_json(choice.measurement))
    out = {}
    for expression, where in asked.items():
        if not needs(expression):
            continue
        try:
            out[expression] = plain(anatomy, expression, scores=scores, files=files)
        except SelectionError as error:
            raise RecipeError(f"{where}{error}") from None
    return Choice(plain=out, measurement=choice.measurement, files=choice.files)


def _read(path: str, where: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: {path} cannot be read: {error}") from None


def write_choice(folder: RunFolder, choice: Choice) -> None:
    """Keep a choice in a run folder."""
    folder.write_json(FILE, {**asdict(choice), "sha256": choice.sha256})


def read_choice(folder: RunFolder) -> Choice | None:
    """The choice kept in a run folder; None where there is none. Raises `RunFolderError` when it is damaged."""
    if not (folder.path / FILE).exists():
        return None
    data = folder.read_json(FILE)
    try:
        choice = Choice(plain=dict(data["plain"]), measurement=data["measurement"], files=dict(data["files"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{folder.path / FILE} is damaged: {error}") from None
    if choice.sha256 != data.get("sha256"):
        raise RunFolderError(f"{folder.path / FILE}: what was measured is not what its hash says; it was changed")
    return choice


def contradictions(choice: Choice, anatomy: Anatomy) -> list[str]:
    """Selections that do not follow from what they were resolved from."""
    again = _resolved(choice, dict.fromkeys(choice.plain, ""), anatomy)
    return [asked for asked, found in choice.plain.items() if again.plain.get(asked) != found]
