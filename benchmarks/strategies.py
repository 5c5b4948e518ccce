"""Strategies side by side: shipped recipes on one model and text, each with its audit.

    python benchmarks/strategies.py MODEL TEXT OUT --set precision=bf16 …

Prints a Markdown table. Every run folder stays in OUT/<strategy>; one that is there already is read and
not run again. Held-out losses are of the same rows in every run; state bytes are of the plan's largest stage, which
every run is held against.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from frostline import audit, load_recipe, train
from frostline.run_folder import RunFolder
from frostline.units import format_bytes, format_count

STRATEGIES = ("all", "ffn", "attn", "lp-ft", "lisa", "badam", "spectrum", "alternate", "gradual-unfreezing")


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES[:5]))
    options = parser.parse_args()
    print("| recipe | stages | steps | learns at once | optimizer state | held-out loss | audit | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    for name in options.strategies:
        folder = options.out / name
        if not folder.exists():
            started = time.monotonic()
            overrides = [f"model={options.model}", f"data.train={options.text}", *options.overrides]
            train(load_recipe(name, overrides=overrides), out=folder)
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - started))
        print(row(name, RunFolder.open(folder)), flush=True)
        failed |= not audit(folder).passed
    sys.exit(1 if failed else 0)


def row(name: str, folder: RunFolder) -> str:
    """One line of the table, from the run folder."""
    stages = folder.read_schedule()
    plan = folder.read_json("plan.json")["stages"]
    losses = [r["held_out_loss"] for r in folder.read_lines(folder.metrics) if "held_out_loss" in r]
    n = [s.n_learning for s in stages]
    learns = format_count(min(n)) + (f" … {format_count(max(n))}" if min(n) != max(n) else "")
    state = format_bytes(max(s["step"]["state_bytes"] for s in plan))
    seconds = json.loads((folder.path / "seconds.json").read_text())
    verdict = audit(folder.path).verdict
    return (
        f"| {name} | {len(stages)} | {stages[-1].end} | {learns} | {state} | {losses[0]:.4f} → {losses[-1]:.4f} | "
        f"{verdict} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
