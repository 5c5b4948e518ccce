"""Runs kill trials for the tests here: a warm parent forks children that train, are killed by SIGKILL, and resume.

`python kill_driver.py FOLDER`, then JSON lines `{"name", "recipe", "kills": [...], "spoil": [...]}` on its input. A
kill is `{"after_step": k}`, `{"evaluated_at": k}`, `{"rolled_back": true}`, or `{"at": point}` inside a write of a
checkpoint or of a prefix cache, each with `"count": n` for the n-th time that this happens; `{"micro_batch": n}` in the
n-th backward pass, `{"measuring": n}` in the n-th measurement, `{"switching": n, "side": "before" or "after"}` at the
n-th stage switch; `{"stop_after_step": k}` is a SIGTERM, after which the run saves. `spoil`: batches whose loss is NaN.
A trial begins with an empty prefix cache, unless `"cache": "kept"`; `"between"` is what happens to it before every
resume: `delete`, `flip` or `cut`. With `"beside": true` another process trains the same at the same time, unharmed, in
a folder of its own. Prints, per trial, the files that differ from those of the run without kills.
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
from frostline import ready as ready_module
from frostline import run as running
from frostline.engine import Evaluated, RolledBack, StepDone, next_token_loss, prefix_store
from frostline.recipe import recipe_from_dict
from frostline.resume import resume

loop: Any = sys.modules["frostline.engine.train"]

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
    if not batches:
        return
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


def kill_inside(wanted: dict[str, Any]) -> None:
    """Kills at the moments that no event tells of."""
    seen = {"micro_batch": 0, "measuring": 0, "switching": 0}

    def count(what: str, side: str = "before") -> None:
        seen[what] += side == "before"
        if seen[what] == wanted.get(what) and side == wanted.get("side", "before"):
            os.kill(os.getpid(), signal.SIGKILL)

    backward, held_out_loss, switch = torch.Tensor.backward, loop.held_out_loss, loop.switch

    def counted_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        count("micro_batch")
        backward(self, *args, **kwargs)

    def counted_loss(*args: Any, **kwargs: Any) -> float:
        value = held_out_loss(*args, **kwargs)
        count("measuring")
        return value

    def counted_switch(*args: Any, **kwargs: Any) -> Any:
        count("switching")
        active = switch(*args, **kwargs)
        count("switching", "after")
        return active

    torch.Tensor.backward = counted_backward  # type: ignore[method-assign, assignment]
    loop.held_out_loss, loop.switch = counted_loss, counted_switch


def forked(work: Callable[[], object]) -> int:
    """The wait status of a child that does `work`."""
    return os.waitpid(started(work), 0)[1]


def started(work: Callable[[], object]) -> int:
    """A child that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return pid


def harm(cache: Path, how: str) -> None:
    """Delete a prefix cache, or damage what it holds of every row."""
    found = list(cache.glob("*/rows.bin"))
    assert found
    for rows in found:
        data = bytearray(rows.read_bytes())
        data[::99] = bytes((b + 1) % 256 for b in data[::99])  # done twice, it is damaged twice
        rows.write_bytes(data if how == "flip" else data[: len(data) // 2])
    if how == "delete":
        shutil.rmtree(cache)


def digests(folder: Path) -> dict[str, str]:
    """File → SHA-256, of everything that the seed determines."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(without_clocks(p)).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in CLOCKS and "MANIFEST" not in p.name
    }


def different(folder: Path, expected: dict[str, str]) -> list[str]:
    """The files that are not as expected."""
    found = digests(folder)
    return sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))


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
    if "cache" in plan["recipe"] and plan.get("cache") != "kept":
        shutil.rmtree(plan["recipe"]["cache"]["dir"], ignore_errors=True)
    for wanted in [*kills, {}]:
        killer = Killer(wanted)
        if statuses and plan.get("between"):
            harm(Path(plan["recipe"]["cache"]["dir"]), plan["between"])

        def work(first: bool = not statuses, killer: Killer = killer, wanted: dict[str, Any] = wanted) -> None:
            checkpoints.reached = prefix_store.reached = killer.reached
            kill_inside(wanted)
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
    os.fsync = lambda _: None  # what the system holds survives a kill: this is about processes, not about power
    ready_module.plan_of = lambda *_, **__: None  # plans take most of a trial's time, and train nothing
    root = Path(sys.argv[1])
    whole: dict[str, tuple[str, dict[str, str]]] = {}
    for line in sys.stdin:
        plan = json.loads(line)
        key = json.dumps([plan["recipe"], plan.get("spoil")], sort_keys=True)
        if key not in whole:
            reference = f"whole-{len(whole)}"
            statuses = trial(root / reference, plan, [])
            if statuses != [0]:
                print(json.dumps({"name": reference, "statuses": statuses, "differing": ["it failed"]}), flush=True)
                continue
            whole[key] = (reference, digests(root / reference))
        reference, expected = whole[key]
        differing: list[str] = []
        other = root / f"{plan['name']}-beside"
        if plan.get("beside"):
            if plan.get("cache") != "kept":
                shutil.rmtree(plan["recipe"]["cache"]["dir"], ignore_errors=True)
            plan["cache"] = "kept"
            pid = started(lambda: train(recipe_from_dict(plan["recipe"]), out=other))  # noqa: B023
        statuses = trial(root / plan["name"], plan, plan["kills"])
        if plan.get("beside"):
            statuses = [*statuses, os.waitpid(pid, 0)[1]]
            differing = [f"beside: {n}" for n in different(other, expected)]
        differing += different(root / plan["name"], expected)
        answer = {"name": plan["name"], "whole": reference, "statuses": statuses, "differing": differing}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
