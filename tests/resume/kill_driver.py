"""Runs kill trials for `test_kills.py`: a warm parent forks children that train, are killed by SIGKILL, and resume.

`python kill_driver.py FOLDER < PLAN`: the plan is JSON lines `{"name", "recipe", "kills": [...]}`; a kill is
`{"after_step": k}`, `{"evaluated_at": k}`, or `{"at": point, "count": n}` for the n-th time a write of a checkpoint
reaches a point. Prints, per trial, the files that differ from those of the run without kills.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frostline import checkpoints, train
from frostline import run as running
from frostline.engine import Evaluated, StepDone
from frostline.recipe import recipe_from_dict
from frostline.resume import resume

CLOCKS = {"timing.jsonl", "environment.json", "plan.json", "lock", "status.json"}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def observer(wanted: dict[str, Any]) -> Callable[[object], None]:
    """Kills after a step, or in the middle of a measurement."""

    def look(event: object) -> None:
        if isinstance(event, StepDone) and event.step == wanted.get("after_step"):
            kill()
        if isinstance(event, Evaluated) and event.step == wanted.get("evaluated_at"):
            kill()

    return look


def set_up(wanted: dict[str, Any]) -> None:
    """Kills inside a write."""
    seen = [0]

    def reached(point: str) -> None:
        seen[0] += point == wanted.get("at")
        if point == wanted.get("at") and seen[0] == wanted.get("count", 1):
            kill()

    checkpoints.reached = reached


def forked(work: Callable[[], object]) -> int:
    """The wait status of a child that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def digests(folder: Path) -> dict[str, str]:
    """File → SHA-256, of everything that the seed determines."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(without_clocks(p)).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in CLOCKS and "MANIFEST" not in p.name
    }


def without_clocks(path: Path) -> bytes:
    """A file's bytes; of a checkpoint's state without the size of the clocks' record."""
    if path.name != "state.json":
        return path.read_bytes()
    state = json.loads(path.read_text())
    state["records"].pop("timing.jsonl")
    return json.dumps(state).encode()


def trial(folder: Path, recipe: dict[str, Any], kills: list[dict[str, Any]]) -> list[int]:
    """The wait statuses of a run with `kills`, the last one that of the resume that ends it."""
    statuses = []
    for i, wanted in enumerate([*kills, {}]):

        def work(first: bool = i == 0, wanted: dict[str, Any] = wanted) -> None:
            set_up(wanted)
            if first:
                train(recipe_from_dict(recipe), out=folder, observers=[observer(wanted)])
            else:
                resume(folder, observers=[observer(wanted)])

        statuses.append(forked(work))
    return statuses


def main() -> None:
    torch.set_num_threads(1)
    running.plan_of = lambda *_, **__: None  # plans take most of a trial's time, and train nothing
    root = Path(sys.argv[1])
    whole: dict[str, dict[str, str]] = {}
    for line in sys.stdin:
        plan = json.loads(line)
        key = json.dumps(plan["recipe"], sort_keys=True)
        if key not in whole:
            reference = root / f"whole-{len(whole)}"
            assert forked(lambda r=plan["recipe"], f=reference: train(recipe_from_dict(r), out=f)) == 0
            whole[key] = digests(reference)
        statuses = trial(root / plan["name"], plan["recipe"], plan["kills"])
        found = digests(root / plan["name"])
        differing = sorted(n for n in {*found, *whole[key]} if found.get(n) != whole[key].get(n))
        print(json.dumps({"name": plan["name"], "statuses": statuses, "differing": differing}), flush=True)


if __name__ == "__main__":
    main()
