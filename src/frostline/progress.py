"""How far a run in a loop of one's own has come: what a checkpoint keeps so that the run folder can go on from there.

Weights, optimizer and random numbers are the loop's to save and to load. A `Progress` says which run it is of, where
the records had come to, and what the learning pieces hashed to, so that other weights are refused. `Learning.progress`
makes one, `learning(…, since=…)` goes on from it. Read `Progress`, then `misfits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Slice, fingerprint, named_tensors, take
from frostline.environment import MATTERS, describe_environment
from frostline.errors import RunFolderError
from frostline.run_folder import RunFolder, damaged_records


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A place in a run."""

    run: str
    """The name of the run, drawn when its folder was made."""
    learn: tuple[str, ...]
    """What learns, one expression per stage."""
    step: int
    """Optimizer steps done."""
    stage: int
    """The stage in progress (0-based)."""
    endings: tuple[int, ...]
    """Steps done at the end of each stage before it."""
    records: dict[str, int]
    """How far the records of the run folder had come."""
    drifted: tuple[str, ...]
    """Buffers that had to be put back in the stage so far."""
    hashes: dict[str, str]
    """Piece that learns in the stage → SHA-256 of its bytes; all others are as they were when it began."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: Path) -> Progress:
        """Read it again. Raises `RunFolderError` naming the file `where` it was found, when it is damaged."""
        with damaged_records(where):
            return cls(
                run=str(data["run"]),
                learn=tuple(data["learn"]),
                step=int(data["step"]),
                stage=int(data["stage"]),
                endings=tuple(map(int, data["endings"])),
                records={str(k): int(v) for k, v in data["records"].items()},
                drifted=tuple(data["drifted"]),
                hashes={str(k): str(v) for k, v in data["hashes"].items()},
            )


def name_of(folder: RunFolder) -> str | None:
    """What tells a run from every other; None for a folder that is no run of a loop of one's own."""
    try:
        is_own = folder.read_json("schedule.json")["loop"] == "own"
        name = folder.read_json("environment.json").get("run")
    except (RunFolderError, KeyError):
        return None
    return name if is_own and isinstance(name, str) else None


def hashes_of(model: nn.Module, pieces: Iterable[Slice]) -> dict[str, str]:
    """Piece → SHA-256 of its bytes."""
    tensors = named_tensors(model)
    return {str(p): fingerprint(take(tensors[p.tensor], p)) for p in pieces}


def check_it_goes_on(since: Progress, folder: RunFolder, learn: Sequence[str]) -> None:
    """Raise `RunFolderError` unless this run can go on in this folder."""
    if name_of(folder) != since.run:
        raise RunFolderError(
            f"{folder.path} is not the folder of the run that the checkpoint was saved in: name that one"
        )
    if tuple(learn) != since.learn:
        raise RunFolderError(
            f"the run learned {' · '.join(since.learn)}, and is to go on with {' · '.join(learn)}: a run goes on with "
            "what it began with; train anew, from the checkpoint's weights, with another `out`"
        )
    if len(folder.read_boundaries()) <= since.stage:
        raise RunFolderError(f"{folder.path} has lost evidence: boundary-{since.stage}.json is not there")


def misfits(since: Progress, folder: RunFolder, model: nn.Module, pieces: Iterable[Slice]) -> list[str]:
    """Pieces that are not what they were then: learning ones at the checkpoint, others when the stage began."""
    boundaries = folder.read_boundaries()
    expected = {**boundaries[since.stage].hashes, **since.hashes}
    found = hashes_of(model, (p for p in pieces if p.tensor not in boundaries[0].derived))
    return [name for name, hashed in found.items() if expected.get(name) != hashed]


def note_differences(folder: RunFolder, device: torch.device, step: int) -> list[str]:
    """What of software and machine is not as it was, as `what: old → new`; kept in the run folder for the audit."""
    then = folder.read_json("environment.json")
    now = describe_environment(device=device, data=(), base=None)
    found = [line for key in MATTERS for line in _differing(key, then.get(key), now.get(key))]
    if found:
        before = then.get("resumed_inexactly", [])
        folder.write_json(
            "environment.json", {**then, "resumed_inexactly": [*before, {"step": step, "differences": found}]}
        )
    return found


def _differing(key: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        yield from (f"{key}.{k}: {old.get(k)} → {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k))
    elif old != new:
        yield f"{key}: {old} → {new}"
