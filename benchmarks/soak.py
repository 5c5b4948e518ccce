"""One demo-sized run killed many times at random instants: `python benchmarks/soak.py OUT --kills 100`.

A warm parent forks children that train or resume, and kills each by SIGKILL after a random time; the run must end with
the bytes of the same run left alone. Prints a line per kill and the verdict; exit code 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch

from frostline import train
from frostline.experiment.corpus import write_corpus
from frostline.recipe import Recipe, load_recipe
from frostline.resume import resume

CLOCKS = {"timing.jsonl", "environment.json", "plan.json", "lock", "status.json"}


def forked(work: Callable[[], object]) -> int:
    """Start a child that does `work` and ends; its process number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return pid


def digests(run: Path) -> dict[str, str]:
    """File → SHA-256 of all that the seed determines, checkpoints apart."""
    return {
        p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.name not in CLOCKS and "checkpoints" not in p.parts
    }


def soak(recipe: Recipe, out: Path, *, n_kills: int, seed: int) -> bool:
    """Train once alone and once with kills; whether both left the same bytes."""
    started = time.monotonic()
    assert os.waitpid(forked(lambda: train(recipe, out=out / "alone")), 0)[1] == 0
    alone_s = time.monotonic() - started
    draw, kills, run = random.Random(seed), 0, out / "killed"
    while True:
        first = not (run / "environment.json").exists()
        pid = forked(lambda first=first: train(recipe, out=run) if first else resume(run))
        if kills < n_kills:
            # long enough, now and then, to come further than the next checkpoint
            deadline = time.monotonic() + draw.uniform(1.0, 2.0 + 3 * alone_s / n_kills)
            while time.monotonic() < deadline and (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
                time.sleep(0.01)
            if done == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
                at = sorted(p.name for p in (run / "checkpoints").glob("step-?????????")) or ["none"]
                print(f"kill {kills}: {status.get('state', 'nothing written')}, newest {at[-1]}", flush=True)
                if first and not (run / "environment.json").exists() and run.exists():
                    shutil.rmtree(run)  # killed while the folder was made: `train` would refuse it
                continue
            if done[1] != 0:
                return False
        elif os.waitpid(pid, 0)[1] != 0:
            return False
        break
    whole, found = digests(out / "alone"), digests(run)
    differing = sorted(n for n in {*whole, *found} if whole.get(n) != found.get(n))
    minutes = (time.monotonic() - started) / 60
    verdict = "identical" if not differing else f"DIFFER: {differing}"
    print(f"{kills} kills in {minutes:.1f} minutes; {len(whole)} files {verdict}")
    return not differing and kills == n_kills


def main() -> None:
    """Make the demo's recipe with checkpoints every two steps, and soak it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True)
    write_corpus(options.out / "corpus")
    path = options.out / "recipe.yaml"
    path.write_text(files("frostline").joinpath("recipes/demo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    recipe = load_recipe(path, overrides=["checkpoint.every=2", "checkpoint.minutes=null", "eval.every=20"])
    raise SystemExit(0 if soak(recipe, options.out, n_kills=options.kills, seed=options.seed) else 1)


if __name__ == "__main__":
    main()
