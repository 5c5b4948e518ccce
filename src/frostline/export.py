"""What a run leaves to others: a standard model folder with a card. Of what learned alone, see `deltas.py`.

Read `export_run` first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from frostline.audit import audit
from frostline.errors import FrostlineError, RunFolderError
from frostline.recipe import ScratchModel, dump_yaml, load_recipe
from frostline.run_folder import RunFolder, damaged_records
from frostline.storage import appearing_whole, write_text
from frostline.units import format_count


def export_run(run: str | Path, out: str | Path) -> Path:
    """Copy a finished run's model to a new folder with a model card; plain transformers loads it.

    Raises `RunFolderError` when the run is not finished, its audit fails, or `out` is not empty.
    """
    folder, target = finished(run), new_folder(out)
    check_outside(folder, target)
    verdict = audit(folder.path)
    if not verdict.passed:
        raise RunFolderError(f"{run}: its audit fails, so it is not exported; see `frostline audit {run}`")
    card = model_card(folder)
    with appearing_whole(target) as temporary:
        temporary.mkdir(parents=True)
        for file in sorted(p for p in folder.model.rglob("*") if p.is_file()):
            copy = temporary / file.relative_to(folder.model)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        write_text(temporary / "README.md", card)
    return target


def finished(run: str | Path) -> RunFolder:
    """The folder of a run that has a model to export. Raises `RunFolderError`."""
    folder = RunFolder.open(run)
    state = folder.read_status()["state"]
    if state != "finished":
        hint = f"; go on with `frostline resume {run}`" if folder.has_recipe() else ""
        raise RunFolderError(f"{run} is not finished ({state}), so there is nothing to export{hint}")
    if not folder.model.is_dir():
        raise RunFolderError(f"{run} holds no model")
    if not folder.has_recipe():
        raise RunFolderError(
            f"{run} is of a loop of your own and has no recipe, so there is nothing to write a card or a delta from; "
            f"its model is {folder.model}, which transformers loads as it is"
        )
    return folder


def check_outside(folder: RunFolder, target: Path) -> None:
    """Raise `RunFolderError` for a target in the run folder itself."""
    if target.resolve().is_relative_to(folder.path.resolve()):
        raise RunFolderError(f"{target} lies in the run folder itself, which an export does not change")


def new_folder(out: str | Path) -> Path:
    """A folder that is not there, or empty. Raises `RunFolderError`."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{out} exists and is not empty; an export never overwrites")
    return target


def model_card(folder: RunFolder) -> str:
    """What was trained from what, what learned and when, and what the audit says; as Markdown."""
    with damaged_records(folder.path, FrostlineError):
        anatomy, recipe = folder.read_anatomy(), load_recipe(folder.recipe)
        environment, verdict = folder.read_json("environment.json"), audit(folder.path)
        stages = folder.read_schedule()
    scratch = isinstance(recipe.model, ScratchModel)
    name = "initial weights from the seed" if scratch else f"`{Path(str(recipe.model)).name}`"
    hashes = [f"| `{Path(f['path']).name}` | `{f['sha256']}` |" for f in environment["base"]]
    files = ["", "| file of the base | SHA-256 |", "|---|---|", *hashes] if hashes else []
    rows = [f"| {s.name} | `{_cell(s.learn)}` | {format_count(s.n_learning)} | {s.end - s.start} |" for s in stages]
    checks = [f"- {e.claim}: {e.measured}" for e in verdict.evidence]
    removed = [s.name for s in stages if any(r.get("remove") for r in s.settings.get("routes", ()))]
    warning = (
        [
            "",
            f"**In stage {', '.join(removed)} residual connections were left out of the forward pass; this folder's "
            "model has them, so it computes another function than the one that was trained.**",
        ]
        if removed
        else []
    )
    return "\n".join(
        [
            f"# {anatomy.model_type}, {format_count(anatomy.n_parameters)} parameters, trained with Frostline",
            "",
            f"Base: {name}.",
            *files,
            "",
            "| stage | what learned | parameters | steps |",
            "|---|---|---|---|",
            *rows,
            *warning,
            "",
            f"Audit: {verdict.verdict}.",
            "",
            *checks,
            "",
            "The recipe:",
            "",
            "```yaml",
            dump_yaml(_without_paths(recipe.as_dict())).rstrip(),
            "```",
            "",
        ]
    )


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with names in place of this machine's paths."""

    def name(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        return [named(v) for v in value] if isinstance(value, list) else name(value)

    return {k: named(v) for k, v in recipe.items()}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
