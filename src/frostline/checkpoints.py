"""Checkpoints on disk: verified, or invisible.

A checkpoint is written into a temporary folder beside its place, every file synced, then a manifest with the size and
SHA-256 of each, then the folder is renamed and its parent synced: a kill at any instant leaves the checkpoints from
before. Tensors are safetensors, everything else JSON; nothing is ever executed. What does not verify is set aside under
another name, never deleted. Read `Checkpoints.write`, then `Checkpoints.newest`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from frostline.environment import hash_file
from frostline.errors import StorageError, first_line
from frostline.storage import storage_errors, sync

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-(\d{9})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One checkpoint whose files are what they were when they were written."""

    path: Path
    step: int
    data: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one of its files, on the CPU."""
        found: dict[str, torch.Tensor] = load_file(self.path / f"{name}.safetensors")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A checkpoint that cannot be trusted."""

    path: Path
    """Where it was set aside."""
    why: str


class _OtherRunError(Exception):
    """A checkpoint that is whole, and not ours."""


class Checkpoints:
    """The checkpoints of one run, in `folder`. `run` names it in every manifest: another run's are refused."""

    def __init__(self, folder: Path, *, run: str) -> None:
        self.folder, self.run = folder, run

    def write(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], data: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` (steps done): a file per entry of `tensors`, and `data` as JSON.

        Raises `StorageError`; nothing but the checkpoints from before is visible then.
        """
        target = self._path(step)
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._check_space(sum(t.nbytes for part in tensors.values() for t in part.values()))
            temporary = self.folder / f"{target.name}.tmp-{uuid4().hex[:8]}"
            temporary.mkdir()
        try:
            with storage_errors(temporary):
                self._fill(temporary, step, tensors, data)
                reached("before rename")
                old = None
                if target.exists():  # of the same step, from before a resume: never without one of the two
                    old = target.with_name(f"{target.name}.tmp-old-{uuid4().hex[:8]}")
                    target.rename(old)
                temporary.rename(target)
                sync(self.folder)
                reached("after rename")
                if old is not None:
                    shutil.rmtree(old, ignore_errors=True)
        except StorageError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def _fill(
        self, folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], data: Mapping[str, Any]
    ) -> None:
        for name, part in tensors.items():
            save_file(dict(part), folder / f"{name}.safetensors")
            sync(folder / f"{name}.safetensors")
            reached(f"after {name}")
        (folder / "state.json").write_text(json.dumps(data, ensure_ascii=False, sort_keys=True), encoding="utf-8")
        sync(folder / "state.json")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in sorted(folder.iterdir())}
        reached("before manifest")
        manifest = {"schema": 1, "run": self.run, "step": step, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(folder / MANIFEST)
        sync(folder)

    def _check_space(self, n_bytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        needed = int(1.1 * n_bytes + 1e6)  # with its manifest and state, and what the run writes beside it
        if free < needed:
            raise StorageError(f"cannot write {self.folder}: a checkpoint needs {needed} bytes and {free} are free")

    def newest(self) -> tuple[Checkpoint | None, list[Rejected]]:
        """The newest checkpoint that verifies, and those set aside on the way to it."""
        rejected: list[Rejected] = []
        for path in reversed(self.found()):
            found = self._read(path)
            if isinstance(found, Checkpoint):
                return found, rejected
            rejected.append(found)
        return None, rejected

    def _read(self, path: Path) -> Checkpoint | Rejected:
        """A checkpoint, if it verifies. Raises `StorageError` when the disk cannot say."""
        try:
            return self._verified(path)
        except _OtherRunError as error:
            return Rejected(path=path, why=str(error))
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
                raise StorageError(f"cannot read {path}: {error.strerror or error}") from error  # it may be whole
            return Rejected(path=_set_aside(path), why=f"it lacks {Path(str(error.filename)).name}")
        except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            return Rejected(path=_set_aside(path), why=first_line(error))

    def of(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step; None when there is none, or it does not verify and was set aside."""
        path = self._path(step)
        found = self._read(path) if path in self.found() else None
        return found if isinstance(found, Checkpoint) else None

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, in order; verified or not."""
        return [int(p.name.removeprefix("step-")) for p in self.found()]

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, once that of `step` has verified."""
        for path in self.found():
            if path.name > self._path(step).name:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def found(self) -> list[Path]:
        """Folders that are named as checkpoints are, the oldest first; verified or not."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink())

    def leftovers(self) -> list[Path]:
        """What a kill during a write has left: never read."""
        return sorted(self.folder.glob("step-*.tmp-*")) if self.folder.is_dir() else []

    def prune(self, keep: int, *, written: Path, spared: int | None = None) -> None:
        """Delete all but `keep` up to the one just written, and leftovers; not the one of step `spared`. Only after the
        one just written has verified."""
        self._verified(written)
        until = [p for p in self.found() if p.name <= written.name and (spared is None or p != self._path(spared))]
        for path in [*until[:-keep], *self.leftovers()]:
            shutil.rmtree(path, ignore_errors=True)

    def _verified(self, path: Path) -> Checkpoint:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != 1:
            raise ValueError(f"its manifest is of schema {manifest['schema']}")
        if manifest["run"] != self.run:
            raise _OtherRunError("it belongs to another run")
        named, there = set(manifest["files"]), {p.name for p in path.iterdir()} - {MANIFEST}
        if named != there or "state.json" not in named:
            raise ValueError(f"files missing or added: {', '.join(sorted(named ^ there)) or 'state.json'}")
        if f"step-{manifest['step']:09d}" != path.name:
            raise ValueError(f"its manifest is of step {manifest['step']}")
        for name, expected in manifest["files"].items():
            file = path / name
            if file.is_symlink() or file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
                raise ValueError(f"{name} is not what was written")
        data = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(path=path, step=manifest["step"], data=data)


def reached(point: str) -> None:
    """A moment inside a write; tests replace this function to kill the process there."""


def _set_aside(path: Path) -> Path:
    """Rename what does not verify; where that is not possible it stays, and is rejected again next time."""
    target = path.with_name(f"{path.name}.corrupt-{uuid4().hex[:8]}")
    try:
        path.rename(target)
    except OSError:
        return path
    return target
