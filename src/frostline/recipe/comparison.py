"""A comparison file → one recipe per strategy and seed, or one message that names the place and the remedy.

Paths in the file are relative to it, paths in `--set` to the working directory. Read `load_comparison` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frostline.errors import RecipeError, did_you_mean
from frostline.recipe.comparison_spec import ComparisonSpec
from frostline.recipe.load import check_is_complete, read_text, validate
from frostline.recipe.overrides import Override, apply_override, put, shortened
from frostline.recipe.paths import make_paths_absolute
from frostline.recipe.problems import Origin, describe, innermost
from frostline.recipe.recipe import Recipe
from frostline.recipe.yaml_text import KeyPath, YamlDocument, parse_yaml

INSTEAD = {"stages": "schedule", "schedule": "stages"}
"""What a strategy gives → what of the common recipe it stands in place of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """One recipe variant."""

    name: str
    changes: tuple[str, ...]
    """What differs from the common recipe, as `key=value`; or `recipe FILE`."""
    recipe: Recipe
    """With the first seed."""

    def with_seed(self, seed: int) -> Recipe:
        """Its recipe for one run."""
        return self.recipe.model_copy(update={"seed": seed})


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Strategies × seeds, read and checked as far as the files alone allow."""

    name: str
    text: str
    """The file as it stands."""
    spec: ComparisonSpec
    strategies: tuple[Strategy, ...]
    overrides: tuple[str, ...]
    corpus: Path | None
    """Where the package's text is to be written before anything is trained; None where the data are the user's."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """In their order."""
        return self.spec.seeds

    @property
    def baseline(self) -> str:
        """The strategy that the others are held against."""
        return self.spec.baseline or self.strategies[0].name


def shipped_comparisons() -> dict[str, str]:
    """Name → text of the package's own comparisons, by name."""
    found = (f for f in files("frostline").joinpath("comparisons").iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(found, key=lambda f: f.name)}


def load_comparison(
    path: str | Path,
    *,
    out: str | Path,
    overrides: Iterable[str] = (),
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
) -> Comparison:
    """Read a comparison file, or one of the package by its name; `out`: where its corpus would lie, if it has one.

    `overrides` are `key=value` texts that hold for every strategy, after its own changes; `seeds` and `baseline`
    stand in place of the file's. Raises `RecipeError` naming file, line and key, and the strategy.
    """
    path, overrides = Path(path), tuple(overrides)
    text = _text(path)
    document = parse_yaml(text, where=str(path))
    spec = _spec(document, str(path), {"seeds": seeds, "baseline": baseline})
    own_data = any(o.partition("=")[0].strip() in ("data", "data.train") for o in overrides)
    corpus = Path(out).resolve() / "corpus" if spec.corpus and not own_data else None
    reader = _Reader(path=path, document=document, spec=spec, overrides=overrides, corpus=corpus)
    strategies = tuple(reader.strategy(name) for name in spec.strategies)
    _check_apart(strategies, str(path))
    return Comparison(name=path.stem, text=text, spec=spec, strategies=strategies, overrides=overrides, corpus=corpus)


def _text(path: Path) -> str:
    shipped = shipped_comparisons()
    if not path.exists() and str(path) in shipped:
        return shipped[str(path)]
    if not path.exists():
        raise RecipeError(
            f"no comparison at {path}.{did_you_mean(str(path), shipped)} The package has {', '.join(shipped)}."
        )
    return read_text(path)


def _spec(document: YamlDocument, where: str, instead: Mapping[str, Any]) -> ComparisonSpec:
    """What a file says, but for what is given in place of it."""
    if not isinstance(document.values, dict):
        raise RecipeError(f"{where}: a comparison is a mapping with recipe, strategies and seeds; this is not one")
    values = {**document.values, **{k: v for k, v in instead.items() if v is not None}}
    origin = Origin(document=document, where=where)
    try:
        return ComparisonSpec.model_validate(values)
    except ValidationError as error:
        problems = [describe(e, origin=origin, stages=(), record=ComparisonSpec) for e in innermost(error.errors())]
        if isinstance(values.get("stages"), list) and "strategies" not in values:
            problems = [f"{where}: this is a recipe; a comparison names one, and strategies that change it"]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """Makes the recipe of every strategy of one file."""

    path: Path
    document: YamlDocument
    spec: ComparisonSpec
    overrides: tuple[str, ...]
    corpus: Path | None

    def strategy(self, name: str) -> Strategy:
        """Raises `RecipeError` that names the strategy."""
        changes = self.spec.strategies[name]
        own = changes if isinstance(changes, str) else None
        try:
            recipe = self._recipe(name, own or self.spec.recipe, {} if own else changes)
        except RecipeError as error:
            raise RecipeError(f"strategy '{name}': {error}") from None
        return Strategy(name=name, changes=_written(changes), recipe=recipe)

    def _recipe(self, name: str, source: str | Mapping[str, Any], changes: Any) -> Recipe:
        here = self.path.resolve().parent
        file, document, base = self._source(source, here)
        if not isinstance(document.values, dict):
            raise RecipeError(f"{file}: a recipe is a mapping with model, data and stages; this is not one")
        values = deepcopy(document.values)
        common = [] if isinstance(self.spec.strategies[name], str) else list(self._common(values))
        applied = [*common, *self._changed(values, name, changes)]
        elsewhere: dict[KeyPath, Path] = {o.path: here for o in applied}
        if self.corpus is not None:
            applied.append(put(values, "data.train", str(self.corpus), place=f"{self.path}: corpus"))
        for text in self.overrides:
            applied.append(apply_override(values, text))
            elsewhere.pop(applied[-1].path, None)
            elsewhere[applied[-1].path] = Path.cwd()
        self._check_seed(applied)
        if not file.is_file():
            check_is_complete(str(file), values, [o.path for o in applied])
        make_paths_absolute(values, base=base, elsewhere=elsewhere)
        values["seed"] = self.spec.seeds[0]
        return validate(values, Origin(document=document, where=str(file), overrides=applied))

    def _source(self, source: str | Mapping[str, Any], here: Path) -> tuple[Path, YamlDocument, Path]:
        """A recipe's file, its values with their lines, and what its paths start from."""
        if not isinstance(source, str):
            lines = {p[1:]: line for p, line in self.document.lines.items() if p[0] == "recipe" and len(p) > 1}
            return self.path, YamlDocument(values=source, lines=lines), here
        file = here / source
        if not file.exists() and Path(source).suffix not in (".yaml", ".yml"):
            return Path(source), parse_yaml(read_text(Path(source)), where=source), Path.cwd()
        return file, parse_yaml(read_text(file), where=str(file)), file.parent

    def _common(self, values: dict[str, Any]) -> Iterable[Override]:
        for key, value in self.spec.set.items():
            yield self._put(values, key, value, ("set", key))

    def _changed(self, values: dict[str, Any], name: str, changes: Any) -> list[Override]:
        """What a strategy changes, put into the common recipe's values."""
        given = {c.partition("=")[0].strip() for c in changes}
        for key, other in INSTEAD.items():
            if key in given and other not in given:
                values.pop(other, None)
        if isinstance(changes, dict):
            return [self._put(values, key, value, ("strategies", name, key)) for key, value in changes.items()]
        out = []
        for i, text in enumerate(changes):
            place = self._place(("strategies", name, i))
            try:
                out.append(replace(apply_override(values, text), place=f"{place}: {shortened(text)}"))
            except RecipeError as error:
                raise RecipeError(f"{place}: {str(error).removeprefix('--set ')}") from None
        return out

    def _put(self, values: dict[str, Any], key: str, value: Any, path: KeyPath) -> Override:
        place = self._place(path)
        try:
            return put(values, key, deepcopy(value), place=f"{place}: {key}")
        except RecipeError as error:
            raise RecipeError(f"{place}: {str(error).removeprefix('--set ')}") from None

    def _place(self, path: KeyPath) -> str:
        line = self.document.line_of(path)
        return f"{self.path}:{line}" if line else str(self.path)

    def _check_seed(self, applied: Sequence[Override]) -> None:
        for override in applied:
            if override.path == ("seed",):
                raise RecipeError(f"{override}: the seeds are those of the comparison (`seeds:`, or --seeds)")


def _written(changes: Any) -> tuple[str, ...]:
    """What a strategy changes, for people."""
    if isinstance(changes, str):
        return (f"recipe {changes}",)
    return tuple(changes) if isinstance(changes, list) else tuple(f"{k}={_short(v)}" for k, v in changes.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _check_apart(strategies: Sequence[Strategy], where: str) -> None:
    """Raise `RecipeError` for two strategies that are one: with the same seeds their runs would be the same."""
    for i, strategy in enumerate(strategies):
        for other in strategies[:i]:
            if strategy.recipe == other.recipe:
                raise RecipeError(
                    f"{where}: the strategies '{other.name}' and '{strategy.name}' are the same recipe, so with the "
                    "same seeds they are the same runs"
                )
