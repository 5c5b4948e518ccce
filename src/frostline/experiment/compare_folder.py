"""The folder of a comparison: the name of everything in it, and what state the run of a strategy and seed is in.

    comparison.yaml    the comparison as it was given
    comparison.json    everything that was measured, written anew after every run
    comparison.html    the page
    corpus/            the package's text, where the comparison trains on it
    runs/STRATEGY/seed-N/   ordinary run folders

Read `standing` first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from frostline.data import files_to_hash
from frostline.environment import describe_environment
from frostline.errors import RunFolderError
from frostline.experiment.corpus import write_corpus
from frostline.prepared import choose_device
from frostline.recipe import Recipe, keys_of, load_recipe
from frostline.run_folder import RunFolder
from frostline.storage import appearing_whole, storage_errors, write_text

SCHEMA = 1
"""Version of `comparison.json`."""
Standing = Literal["new", "finished", "unfinished", "failed"]
"""Of a run: nothing is there; done; to be resumed; stopped by an error."""
PLACES = ("data.train", "data.held_out", "data.chat_template", "model", "eval.keep")
"""Keys of a recipe that say where bytes are which the run folder has hashed."""
NOT_BEGUN = ("status.json", "recipe.yaml", "expansion.json", "lock", "evidence", "evidence/choice.json")
"""What a run writes before the file with which it begins, `environment.json`."""


class ComparisonFolder:
    """One folder of a comparison."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = self.path / "comparison.yaml"
        self.results = self.path / "comparison.json"
        self.page = self.path / "comparison.html"
        self.runs = self.path / "runs"

    def check(self, strategies: tuple[str, ...]) -> None:
        """Raise `RunFolderError` unless it is free, or of a comparison that has one of these strategies."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.path.is_dir() or not self.source.exists():
            what = "is no folder" if not self.path.is_dir() else "holds something else"
            raise RunFolderError(f"{self.path} {what}: a comparison never overwrites; name another --out")
        there = self.strategies()
        if there and not set(there) & set(strategies):
            raise RunFolderError(
                f"{self.path} holds another comparison, of the strategies {', '.join(there)}; name another --out"
            )

    def strategies(self) -> list[str]:
        """Names of the strategies that have run folders."""
        return sorted(p.name for p in self.runs.iterdir() if p.is_dir()) if self.runs.is_dir() else []

    def run(self, strategy: str, seed: int) -> Path:
        """Where a run's folder is."""
        return self.runs / strategy / f"seed-{seed}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, the folder is there and no other comparison works in it. Raises `RunFolderError` when one does."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with RunFolder(self.path).locked():
            yield

    def write_source(self, text: str, corpus: Path | None) -> None:
        """Write down what is compared, and the package's text where that is trained on."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.source, text)
        if corpus is not None and not corpus.exists():
            with appearing_whole(corpus) as place:
                write_corpus(place)

    def write_results(self, data: dict[str, Any]) -> None:
        """Write `comparison.json`."""
        text = json.dumps({"schema": SCHEMA, **data}, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.results, text + "\n")

    def read_results(self) -> dict[str, Any]:
        """What an earlier call has written; empty where there is none that can be read."""
        try:
            data = json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) and data.get("schema") == SCHEMA else {}


def standing(path: Path, expected: Callable[[], Recipe], hashes: Hashes) -> Standing:
    """How far the run at `path` is, once it is known to be of the recipe that is `expected` (with plain stages).

    What a kill left of a run that had not begun is removed. Raises `RunFolderError` naming what differs when the run
    is of another recipe or of other data.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return "new"
    folder = RunFolder(path)
    if not (path / "environment.json").exists():
        _remove_unbegun(path)
        return "new"
    different = _differences(folder, expected(), hashes)
    if different:
        raise RunFolderError(f"{path} is of another recipe:\n  " + "\n  ".join(different))
    state = folder.read_status()["state"]
    return "finished" if state == "finished" else "failed" if state == "failed" else "unfinished"


def _remove_unbegun(path: Path) -> None:
    """Remove a folder that a run was killed in before it began. Raises `RunFolderError` for anything else in it."""
    names = [p.relative_to(path).as_posix() for p in path.rglob("*")] if path.is_dir() else ["a file"]
    more = [n for n in names if n not in NOT_BEGUN and not n.endswith(".tmp")]
    if more:
        raise RunFolderError(f"{path} is no run folder, and something is there: {', '.join(more[:3])}")
    with storage_errors(path):
        shutil.rmtree(path)


MOST = 8
"""So many differences of one run are listed."""


def _differences(folder: RunFolder, expected: Recipe, hashes: Hashes) -> list[str]:
    """What differs between the run's recorded recipe and data and those it should have, as `key: then → now`."""
    then, now = keys_of(load_recipe(folder.recipe).as_dict()), keys_of(expected.as_dict())
    recorded = folder.read_json("environment.json")
    bytes_then = {kind: [row["sha256"] for row in recorded.get(kind, ())] for kind in ("data", "base")}
    moved = bytes_then == hashes.of(expected)
    out = [] if moved else ["data or base model: other bytes than those it was trained on"]
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key) and not (moved and key.startswith(PLACES)):
            out.append(f"{key}: {_shown(then, key)} → {_shown(now, key)}")
    return [*out[:MOST], *([f"and {len(out) - MOST} more keys"] if len(out) > MOST else [])]


def _shown(keys: dict[str, Any], key: str) -> str:
    return json.dumps(keys[key], ensure_ascii=False) if key in keys else "(not there)"


class Hashes:
    """SHA-256 of the data and the base model of recipes; those of the same files are taken once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], dict[str, list[str]]] = {}

    def of(self, recipe: Recipe) -> dict[str, list[str]]:
        """Kind → hashes, as a run folder has them."""
        data = tuple(map(str, files_to_hash(recipe.data, *(recipe.eval.keep or ()))))
        base = recipe.model if isinstance(recipe.model, str) else None
        if (data, base) not in self._known:
            found = describe_environment(device=choose_device(recipe), data=data, base=base)
            self._known[data, base] = {kind: [row["sha256"] for row in found[kind]] for kind in ("data", "base")}
        return self._known[data, base]
