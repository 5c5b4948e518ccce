"""Runs kill trials for the tests here: a warm parent forks children that train, are killed by SIGKILL, and resume.

`python kill_driver.py FOLDER`, then JSON lines `{"name", "recipe", "kills": [...], "spoil": [...]}` on its input. A
kill is `{"after_step": k}`, `{"evaluated_at": k}`, `{"rolled_back": true}`, or `{"at": point}` inside a write of a
checkpoint or of a prefix cache, each with `"count": n` for the n-th time that this happens; `{"stop_after_step": k}` is
a SIGTERM, after which the run saves. `spoil`: batches whose loss is NaN. A trial begins with an empty prefix cache.
Prints, per trial, the files that differ from those of the run without kills.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frostline import checkpoints, train
from frostline import run as running
from frostline.engine import Evaluated, RolledBack, StepDone, next_token_loss, prefix_store
from frostline.recipe import recipe_from_dict
from frostline.resume import resume

CLOCKS = {"timing.jsonl", "environment.json", "plan.json", "lock", "status.json"}


class Killer:
    """An observer, and a function to call inside writes, that kills the process at the moment that is wanted."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.wanted, self.left = wanted, wanted.get("count", 1)

    def now(self, matches: bool, how: int = signal.SIGKILL) -> None:
        self.left -= matches
        if matches and self.left == 0:
            os.kill(os.getpid(), how)

    def __call__(self, event: object) -> None:
        if isinstance(event, StepDone):
            self.now(event.step == self.wanted.get("after_step"))
            self.now(event.step == self.wanted.get("stop_after_step"), signal.SIGTERM)
        elif isinstance(event, Evaluated):
            self.now(event.step == self.wanted.get("evaluated_at"))
        elif isinstance(event, RolledBack):
            self.now("rolled_back" in self.wanted)

    def reached(self, point: str) -> None:
        self.now(point == self.wanted.get("at"))


def spoil(batches: list[int]) -> None:
    """Let the loss of these batches be NaN, whenever they come."""
    batches_of, current = running.batches_of, [0]

    def noted(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        inner = batches_of(*args, **kwargs)

        def get(batch: int, stage: Any) -> Any:
            current[0] = batch
            return inner(batch, stage)

        return get

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return next_token_loss(model, batch) * (math.nan if current[0] in batches else 1.0)

    running.batches_of, running.loss_of = noted, lambda *_: loss  # type: ignore[assignment]


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
    state["records"].pop("timing.jsonl", None)
    return json.dumps(state).encode()


def finished(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def trial(folder: Path, plan: dict[str, Any], kills: list[dict[str, Any]]) -> list[int]:
    """The wait statuses of a run with `kills`, the last one that of the resume that ends it."""
    statuses: list[int] = []
    if "cache" in plan["recipe"]:
        shutil.rmtree(plan["recipe"]["cache"]["dir"], ignore_errors=True)
    for wanted in [*kills, {}]:
        killer = Killer(wanted)

        def work(first: bool = not statuses, killer: Killer = killer) -> None:
            checkpoints.reached = prefix_store.reached = killer.reached
            spoil(plan.get("spoil", []))
            if first:
                train(recipe_from_dict(plan["recipe"]), out=folder, observers=[killer])
            else:
                resume(folder, observers=[killer])

        statuses.append(forked(work))
        if finished(folder):
            break
    return statuses


def main() -> None:
    torch.set_num_threads(1)
    prefix_store.COMMIT_BYTES = 1
    running.plan_of = lambda *_, **__: None  # plans take most of a trial's time, and train nothing
    root = Path(sys.argv[1])
    whole: dict[str, dict[str, str]] = {}
    for line in sys.stdin:
        plan = json.loads(line)
        key = json.dumps([plan["recipe"], plan.get("spoil")], sort_keys=True)
        if key not in whole:
            reference = root / f"whole-{len(whole)}"
            statuses = trial(reference, plan, [])
            assert statuses == [0], f"the run without kills failed: {statuses}"
            whole[key] = digests(reference)
        statuses = trial(root / plan["name"], plan, plan["kills"])
        found = digests(root / plan["name"])
        differing = sorted(n for n in {*found, *whole[key]} if found.get(n) != whole[key].get(n))
        print(json.dumps({"name": plan["name"], "statuses": statuses, "differing": differing}), flush=True)


if __name__ == "__main__":
    main()
