"""Going on with a run that was killed or interrupted, to the same bytes. Read `resume` first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frostline.anatomy import fingerprint, named_tensors, take
from frostline.checkpoints import Checkpoint, Checkpoints, Rejected
from frostline.choices import FILE as CHOICE
from frostline.choices import read_choice, wants_measurement
from frostline.data import files_to_hash
from frostline.engine import Observer
from frostline.engine.record import cut_pieces
from frostline.engine.run_state import RunState, from_files, misfits
from frostline.environment import MATTERS, describe_environment
from frostline.errors import RunFolderError
from frostline.levers import determinism
from frostline.prepared import Prepared, choose_device
from frostline.ready import Ready, make_ready
from frostline.recipe import Recipe, keys_of, load_recipe
from frostline.run import RunResult, carry_out, run_name
from frostline.run_folder import RunFolder, check_kept, damaged_records, rewind


def resume(
    run: str | Path,
    *,
    allow_inexact: bool = False,
    observers: Sequence[Observer] = (),
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RunResult:
    """Go on from the newest checkpoint that verifies; from the start when none was written yet.

    On the same machine with the same software the run ends with the bytes it would have had without the stop. Raises
    `RunFolderError` when the run is finished, worked on by another process, or damaged, when every checkpoint is
    corrupt, or when software, machine or data differ, unless `allow_inexact`. `say`: told what was rejected and what
    differs.
    """
    folder = RunFolder.open_started(run)
    recipe = load_recipe(folder.recipe)
    with folder.locked(), determinism(recipe.deterministic):
        status = folder.read_status()
        if status["state"] == "finished":
            raise RunFolderError(f"{run} is finished (after step {status['step']}): there is nothing to resume")
        checkpoint = _newest(folder, say)
        differences = _differences(folder, recipe, checkpoint)
        if differences and not allow_inexact:
            raise RunFolderError(
                "the run would not end with the same bytes, because these differ:\n  "
                + "\n  ".join(differences)
                + "\n  Resume all the same with --allow-inexact."
            )
        for line in differences:
            say(f"inexact: {line}")
        if status["state"] == "failed" and status.get("message"):
            say(f"it had failed: {status['message']}")
        choice = read_choice(folder)
        if choice is None and wants_measurement(recipe):
            raise RunFolderError(f"{run} has lost {CHOICE}, which says which experts it chose to train")
        ready = make_ready(recipe, choice=choice, trust_remote_code=trust_remote_code, say=say)
        with damaged_records(folder.path):
            state = _state(checkpoint, ready, folder) if checkpoint else None
        rewind(folder, state.records if state else {})
        _remember(folder, differences, state.step if state else 0)
        folder.write_status("running", step=state.step if state else 0)
        say(f"going on after step {state.step}" if state else "no checkpoint was written yet: starting again")
        return carry_out(ready, folder, observers=observers, resumed=state)


def _remember(folder: RunFolder, differences: list[str], step: int) -> None:
    """Keep what differed in the run folder, for the audit, the report and the model card."""
    if differences:
        environment = folder.read_json("environment.json")
        before = environment.get("resumed_inexactly", [])
        # names in place of this machine's paths: a model card shows this
        told = [re.sub(r"(?<![\w.])/(?:[^/\s\":,]+/)+", "", d) for d in differences]
        environment["resumed_inexactly"] = [*before, {"step": step, "differences": told}]
        folder.write_json("environment.json", environment)


def _newest(folder: RunFolder, say: Callable[[str], None]) -> Checkpoint | None:
    checkpoints = Checkpoints(folder.checkpoints, run=run_name(folder))
    for path in checkpoints.leftovers():
        say(f"ignored: {path.name}, which a kill left unfinished")
    found, rejected = checkpoints.newest()
    for r in rejected:
        say(f"rejected: {r.path.name}: {r.why}")
    if found is None and (rejected or _set_aside(folder)):
        raise RunFolderError(
            f"{folder.path}: no checkpoint verifies"
            + (f" ({_listed(rejected)})" if rejected else "")
            + "; a run never starts again by itself once it has saved something. Train anew in another folder."
        )
    return found


def _set_aside(folder: RunFolder) -> bool:
    return folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step-*.corrupt-*"))


def _listed(rejected: Sequence[Rejected]) -> str:
    return "; ".join(f"{r.path.name}: {r.why}" for r in rejected)


def _state(checkpoint: Checkpoint, ready: Ready, folder: RunFolder) -> RunState:
    """The state in a checkpoint, once the model is the one that the run started from. Raises `RunFolderError`."""
    check_kept(folder, checkpoint.data["records"])
    start = folder.read_boundaries()[0].hashes
    changed = _changed(ready, start)
    if changed:
        raise RunFolderError(
            f"the base model is not the one this run started from: {', '.join(changed[:5])}"
            + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        )
    _check_stages(checkpoint, ready.prepared)
    state = from_files({n: checkpoint.tensors(n) for n in ("weights", "optimizer")}, checkpoint.data)
    wrong = misfits(state, ready.prepared.schedule.stages[state.stage])
    if wrong:
        raise RunFolderError(f"{checkpoint.path} does not fit the model: {wrong[0]} has another shape")
    return state


def _check_stages(checkpoint: Checkpoint, prepared: Prepared) -> None:
    """Raise `RunFolderError` for edits that no resume can do: of what is over, and of what optimizer state is of."""
    data, now = checkpoint.data, prepared.recipe.as_dict()["stages"]
    then, ended, stage = data["recipe"]["stages"], len(data["endings"]), data["stage"]
    for i in range(ended):
        if now[i : i + 1] != then[i : i + 1]:
            raise RunFolderError(f"stages[{i}] is over: it cannot be edited any more")
    if stage < ended:
        return
    for key in ("learn", "optimizer.name"):
        old, new = (keys_of(s[stage]).get(key) if stage < len(s) else None for s in (then, now))
        if old != new:
            raise RunFolderError(
                f"stages[{stage}].{key}: {old} → {new}: the stage is under way, and its optimizer's state is of what "
                "it was; add a stage instead"
            )
    end = prepared.schedule.ended(data["endings"]).stages[stage].end
    if end <= data["step"]:
        raise RunFolderError(f"stages[{stage}] would end after step {end}, and step {data['step']} is done")


def _changed(ready: Ready, start: dict[str, str]) -> list[str]:
    tensors = named_tensors(ready.model)
    pieces = cut_pieces(ready.prepared.anatomy, [s.selection for s in ready.prepared.schedule.stages])
    now = {str(p): fingerprint(take(tensors[p.tensor], p)) for p in pieces}
    return sorted(n for n in {*now, *start} if now.get(n) != start.get(n))


def _differences(folder: RunFolder, recipe: Recipe, checkpoint: Checkpoint | None) -> list[str]:
    """What of software, machine, data and recipe is not as it was, as `what: old → new`. Raises `RunFolderError` for
    files that are gone."""
    then = folder.read_json("environment.json")
    base = recipe.model if isinstance(recipe.model, str) else None
    files = files_to_hash(recipe.data, *(recipe.eval.keep or ()))
    now = describe_environment(device=choose_device(recipe), data=files, base=base)
    _check_there(folder, recipe, then)
    same = {key for key in ("data", "base") if then.get(key) and _hashes(then, key) == _hashes(now, key)}
    out = []
    for key in (k for k in (*MATTERS, "data", "base") if k not in same):
        old, new = _flat(key, then.get(key)), _flat(key, now.get(key))
        out += [f"{k}: {old.get(k)} → {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
    return [*out, *(_edits(checkpoint, recipe, moved=same) if checkpoint else [])]


def _hashes(environment: Mapping[str, Any], key: str) -> list[str]:
    return [row["sha256"] for row in environment.get(key, ())]


def _check_there(folder: RunFolder, recipe: Recipe, then: Mapping[str, Any]) -> None:
    """Raise `RunFolderError` naming what the recipe reads and is gone."""
    named = [
        *files_to_hash(recipe.data, *(recipe.eval.keep or ())),
        *([recipe.model] if then.get("base") and isinstance(recipe.model, str) else []),
    ]
    gone = [str(path) for path in named if not Path(path).exists()]
    if gone:
        raise RunFolderError(
            f"{', '.join(gone[:3])}: what the run reads is not there any more. Put it back, or say in "
            f"{folder.recipe} where it is now: the same bytes in another place are as good"
        )


FREE = ("checkpoint", "nonfinite", "spike", "freed_memory")
"""Keys of a recipe that may be edited between a stop and a resume: they change no step that was done."""
PLACES = {"data": ("data.train", "data.held_out"), "base": ("model",)}
"""What was hashed → the keys that say where it is; they may be edited as long as the bytes there are the same."""


MOST = 12
"""So many edited keys are listed."""


def _edits(checkpoint: Checkpoint, recipe: Recipe, *, moved: Iterable[str]) -> list[str]:
    """What of the recipe was edited since the checkpoint, as `key: old → new`."""
    free = (*FREE, *(place for key in moved for place in PLACES[key]))
    then, now = (keys_of(r) for r in (checkpoint.data["recipe"], recipe.as_dict()))
    keys = [k for k in dict.fromkeys([*then, *now]) if not k.startswith(free) and then.get(k) != now.get(k)]
    more = [f"recipe: {len(keys) - MOST} more keys"] if len(keys) > MOST else []
    return [f"recipe {k}: {_value(then, k)} → {_value(now, k)}" for k in keys[:MOST]] + more


def _value(keys: dict[str, Any], key: str) -> str:
    return json.dumps(keys[key], ensure_ascii=False) if key in keys else "(not there)"


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {f"{key}.{k}": v for k, v in value.items()}
    if isinstance(value, list):
        return {f"{key} {row['path']}": row["sha256"][:12] for row in value}
    return {key: value}
