"""The run folder itself: the name of every file in it, opening it, and reading and writing its records.

The folder's tree stands in the package's docstring. Read `RunFolder`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from frostline.anatomy import Anatomy, anatomy_from_json, anatomy_to_json, slice_from_json, slice_to_json
from frostline.errors import FrostlineError, RunFolderError, in_one_line
from frostline.run_folder.records import Boundary, GradientSample, StageRecord, State, UpdateSample
from frostline.secrecy import without_secrets
from frostline.storage import storage_errors, write_text

SCHEMA = 1
"""Version of every JSON file in a run folder."""


class RunFolder:
    """One run folder; see the package's docstring for its files. Writing errors are `StorageError`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.evidence = self.path / "evidence"
        self.model = self.path / "model"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.endings = self.path / "endings.jsonl"
        self.gradients = self.evidence / "gradients.jsonl"
        self.updates = self.evidence / "updates.jsonl"
        self.flow = self.evidence / "flow.jsonl"
        self.load = self.evidence / "load.jsonl"
        self.likeness = self.evidence / "likeness.jsonl"
        self.recipe = self.path / "recipe.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.growing = (
            *(self.metrics, self.timing, self.endings),
            *(self.gradients, self.updates, self.flow, self.load, self.likeness),
        )
        """The records that grow by a line at a time."""

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new, empty run folder. Raises `RunFolderError` when something is there already."""
        folder = cls.at_free(path)
        with storage_errors(folder.path):
            folder.evidence.mkdir(parents=True)
        return folder

    @classmethod
    def at_free(cls, path: str | Path) -> RunFolder:
        """A place for a run folder; nothing is written. Raises `RunFolderError` when something is there already."""
        folder = cls(path)
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise RunFolderError(f"{path} {folder._what_is_there()}: a run never overwrites; name another --out")
        return folder

    def _what_is_there(self) -> str:
        """Of a path that something is at, in words; an unfinished run can be resumed."""
        if not self.path.is_dir():
            return "is a file"
        try:
            state, step = (self.read_status()[key] for key in ("state", "step"))
        except RunFolderError:
            return "exists and is not empty"
        if state == "finished":
            return f"holds a run, finished after step {step}"
        if not self.recipe.exists() or not (self.path / "environment.json").exists():
            return "holds a run that was killed while its folder was made (delete it)"
        how = {"running": "is under way or was killed", "interrupted": f"was interrupted after step {step}"}
        return (
            f"holds a run that {how.get(state, f'failed after step {step}')} (`frostline resume {self.path}` goes on)"
        )

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder. Raises `RunFolderError` when it is not one."""
        folder = cls(path)
        folder._check_is_folder()
        if not (folder.path / "schedule.json").exists() and folder.recipe.exists():
            raise RunFolderError(f"{path} has not begun to train; `frostline resume {path}` begins")
        if not (folder.path / "schedule.json").exists():
            raise RunFolderError(f"{path} is no run folder: it has no schedule.json{folder._hint()}")
        return folder

    @classmethod
    def open_started(cls, path: str | Path) -> RunFolder:
        """A run folder that may not have begun to train. Raises `RunFolderError` when it was not made by `train`."""
        folder = cls(path)
        folder._check_is_folder()
        if not folder.recipe.exists() or not (folder.path / "environment.json").exists():
            raise RunFolderError(
                f"{path} is no run that can be resumed: it has no recipe.yaml or environment.json{folder._hint()}"
            )
        return folder

    def _check_is_folder(self) -> None:
        if self.path.is_file():
            raise RunFolderError(
                f"{self.path} is a file; a run folder is what `frostline train RECIPE --out RUN` writes"
            )
        if not self.path.is_dir():
            raise RunFolderError(f"no run folder at {self.path}")

    def _hint(self) -> str:
        """Where a run folder lies near a folder that is none."""
        above = self.path.resolve().parent
        below = sorted(p.parent.name for p in self.path.glob("*/schedule.json"))[:3]
        if (above / "schedule.json").exists():
            return f"; {above} is one"
        return f"; inside it are {', '.join(below)}" if below else ""

    def entry(self, stage: int) -> Path:
        """The file with the values that stage `stage` (0-based) starts to train."""
        return self.evidence / f"entry-{stage}.safetensors"

    def write_status(self, state: State, *, step: int, message: str = "") -> None:
        """Say how far the run is."""
        self.write_json("status.json", {"state": state, "step": step, "message": without_secrets(message)})

    def write_anatomy(self, anatomy: Anatomy) -> None:
        """Write `anatomy.json`."""
        self.write_json("anatomy.json", anatomy_to_json(anatomy))

    def read_anatomy(self) -> Anatomy:
        """The anatomy of the run's model."""
        return anatomy_from_json(self.read_json("anatomy.json"))

    def write_schedule(
        self,
        stages: list[StageRecord],
        *,
        step_size: Mapping[str, int] | None = None,
        loop: str = "recipe",
        at_switch: str = "everything",
    ) -> None:
        """Write `schedule.json`.

        `step_size`: tokens and rows per step, and rows of the training data. `loop`: `own` for a loop of the user's.
        `at_switch`: what is hashed and kept between two stages.
        """
        rows = [{**asdict(s), "learning": [slice_to_json(p) for p in s.learning]} for s in stages]
        self.write_json("schedule.json", {"loop": loop, "step_size": step_size, "at_switch": at_switch, "stages": rows})

    def has_recipe(self) -> bool:
        """Whether the run was made from a recipe: not one of `train_loop` by itself, or of a loop of the user's."""
        return (self.path / "environment.json").exists() and self.read_json("schedule.json")["loop"] == "recipe"

    def keeps_all_at_switches(self) -> bool:
        """Whether every tensor is hashed at every switch, and every value kept that a stage starts to train."""
        return bool(self.read_json("schedule.json").get("at_switch", "everything") == "everything")

    def read_step_size(self) -> dict[str, int] | None:
        """What tokens and epochs were turned into steps with; None where every duration is in steps."""
        size: dict[str, int] | None = self.read_json("schedule.json")["step_size"]
        return size

    def read_schedule(self) -> list[StageRecord]:
        """The stages, in order."""
        rows = self.read_json("schedule.json")["stages"]
        return [StageRecord(**{**r, "learning": tuple(map(slice_from_json, r["learning"]))}) for r in rows]

    def write_boundary(self, boundary: Boundary) -> None:
        """Write `evidence/boundary-<index>.json`."""
        self.write_json(f"evidence/boundary-{boundary.index}.json", asdict(boundary))

    def read_boundaries(self) -> list[Boundary]:
        """The boundaries reached so far, in order."""
        out: list[Boundary] = []
        while (self.evidence / f"boundary-{len(out)}.json").exists():
            row = self.read_json(f"evidence/boundary-{len(out)}.json")
            row.pop("schema", None)
            out.append(Boundary(**{**row, "derived": tuple(row["derived"])}))
        return out

    def read_gradients(self) -> list[GradientSample]:
        """Every gradient sample, in order."""
        return [GradientSample(**row) for row in self.read_lines(self.gradients)]

    def read_updates(self) -> list[UpdateSample]:
        """Every sample of what weights showed of an update, in order."""
        rows = self.read_lines(self.updates)
        return [
            UpdateSample(**{**r, "updates": {n: (int(w), int(lost)) for n, (w, lost) in r["updates"].items()}})
            for r in rows
        ]

    def write_model_files(self, hashes: Mapping[str, str]) -> None:
        """Write `evidence/model-files.json`: file name in `model/` → SHA-256."""
        self.write_json("evidence/model-files.json", {"files": dict(hashes)})

    def read_model_files(self) -> dict[str, str]:
        """File name in `model/` → the SHA-256 it was saved with; empty when none was recorded."""
        if not (self.evidence / "model-files.json").exists():
            return {}
        return dict(self.read_json("evidence/model-files.json")["files"])

    def read_status(self) -> dict[str, Any]:
        """`state`, `step`, `message`."""
        status = self.read_json("status.json")
        if not isinstance(status.get("state"), str) or not isinstance(status.get("step"), int):
            raise RunFolderError(f"{self.path / 'status.json'} does not say how far the run is")
        return status

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write one JSON file whole or not at all."""
        text = json.dumps({"schema": SCHEMA, **data}, indent=1, ensure_ascii=False)
        write_text(self.path / name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON file of this folder. Raises `RunFolderError` when it is missing, broken or of another schema."""
        path = self.path / name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} is incomplete: it has no {name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{path} is not readable: {error}") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RunFolderError(f"{path} is not of schema {SCHEMA}, the one this version of Frostline reads")
        return data

    def _may_be_cut(self) -> bool:
        """Whether the last line of a record may be half written: the run is under way, or was killed."""
        try:
            return bool(self.read_status()["state"] == "running")
        except RunFolderError:
            return False

    @contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Inside, whatever ends the run before its time is written into its status; a kill cannot be."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, FrostlineError):
                error.in_a_run()
            with suppress(FrostlineError):  # what failed may be the disk
                step = max((row.get("step", 0) for row in self.read_lines(self.metrics)), default=0)
                self.write_status("failed", step=step, message=_in_words(error))
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process works on this run. Raises `RunFolderError` when one does."""
        with storage_errors(self.path / "lock"):
            file = (self.path / "lock").open("a")
        with file:
            try:
                import fcntl
            except ImportError:  # not on Windows
                yield
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(f"another process is working on {self.path}") from None
            yield

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The rows of a `.jsonl` file of this folder that count: not those of steps that were taken back. None when it
        does not exist."""
        rows: list[dict[str, Any]] = []
        for row in self.read_all_lines(path):
            if "rolled_back_to" in row:
                rows = [r for r in rows if r["step"] <= row["rolled_back_to"]]
            else:
                rows.append(row)
        return rows

    def read_all_lines(self, path: Path) -> list[dict[str, Any]]:
        """Every row of a `.jsonl` file of this folder, as it was appended; none when it does not exist."""
        if not path.exists():
            return []
        try:
            with path.open(encoding="utf-8", newline="\n") as file:  # other separators may be in a name
                lines = list(file)
            if lines and not lines[-1].endswith("\n") and self._may_be_cut():
                lines.pop()
            rows = [json.loads(line) for line in lines]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no object")
            return rows
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{path} is not readable: {error}") from None


def _in_words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted twice"
    return str(error) if isinstance(error, FrostlineError) else f"{type(error).__name__}: {error}"


def checkpoint_of(path: str) -> str:
    """The model to read for a name on the command line: a run folder stands for its trained model."""
    folder = Path(path)
    return str(folder / "model") if (folder / "schedule.json").exists() else path


@contextmanager
def damaged_records(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn whatever damaged or hostile records of a run folder raise into a `RunFolderError` that names the folder."""
    damaged: tuple[type[Exception], ...] = (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)
    try:
        yield
    except damaged + more as error:
        raise RunFolderError(f"{path}: its records are damaged ({in_one_line(error)})") from error
    except SafetensorError as error:
        raise RunFolderError(f"{path}: a weight file is damaged ({error})") from error
