"""The planned peak against the growth of a process that trains: `python benchmarks/plan_memory.py`.

Every cell runs in a process of its own: three optimizer steps without a meter, then the largest resident memory less
what the process had before the model was made. The plan counts bytes of tensors; what the process has beyond them
(allocator, scratch of kernels, libraries loaded late) is the difference. Prints a table and, with --json, data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = {
    "architecture": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 8192, "max_position_embeddings": 512,
}  # fmt: skip
MIXTRAL = {
    "architecture": "mixtral", "hidden_size": 512, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 8192,
    "max_position_embeddings": 512,
}  # fmt: skip
CELLS: list[dict[str, Any]] = [
    {"model": MODEL, "learn": "all"},
    {"model": MODEL, "learn": "ffn"},
    {"model": MODEL, "learn": "ffn", "recompute": True},
    {"model": MODEL, "learn": "ffn", "bf16": True},
    {"model": MODEL, "learn": "layers[-2:]"},
    {"model": MODEL, "learn": "head"},
    {"model": MODEL | {"vocab_size": 32000}, "learn": "ffn"},
    {"model": MIXTRAL, "learn": "experts | router"},
]
ROWS, LENGTH = 4, 512


def label(cell: dict[str, Any]) -> str:
    """One line for people."""
    extra = "".join(f" {k}" for k in ("recompute", "bf16") if cell.get(k))
    return f"{cell['model']['architecture']} {cell['model']['vocab_size']} {cell['learn']}{extra}"


def measure(cell: dict[str, Any]) -> dict[str, float]:
    """Planned peak of tensors, expected and measured growth, bytes; call it in a fresh process."""
    import resource

    import torch

    from frostline.anatomy import find_blocks, read_anatomy
    from frostline.engine import choose_loss
    from frostline.engine.freed_memory import kept
    from frostline.engine.recompute import recompute_blocks
    from frostline.model import load_random, load_skeleton
    from frostline.plan import Batching, make_plan, time_stage
    from frostline.recipe import ScratchModel, StageSpec
    from frostline.schedule import Schedule
    from frostline.selection import select

    source = ScratchModel(**cell["model"])
    anatomy = read_anatomy(load_skeleton(source))
    spec = StageSpec(learn=cell["learn"], steps=1, lr=1e-4)
    schedule = Schedule.of([("cell", spec, select(anatomy, cell["learn"]))])
    options = {"bf16": cell.get("bf16", False)}
    batching = Batching(rows=ROWS, length=LENGTH, recompute=cell.get("recompute", False), **options)
    cost = make_plan(source, schedule, batching).stages[0].cost
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model = load_random(source)
    if batching.recompute:
        recompute_blocks([block for _, block in find_blocks(model)])
    vocabulary = cell["model"]["vocab_size"]
    loss = choose_loss(batching.loss, model, anatomy, n_tokens=ROWS * LENGTH).loss  # the plan's: without full logits
    with kept():  # as a run on a CPU does
        time_stage(
            model, anatomy, schedule.stages[0], rows=ROWS, length=LENGTH, n_vocabulary=vocabulary, n_steps=2,
            language=loss, **options,
        )  # fmt: skip
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return {"tensors": cost.peak_bytes, "expected": cost.resident_bytes, "growth": peak - before}


def in_own_process(cell: dict[str, Any]) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Run every cell, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell)))
        return
    rows = [(label(cell), in_own_process(cell)) for cell in CELLS]
    if options.json:
        print(json.dumps(dict(rows), indent=1))
        return
    for name, found in rows:
        tensors, expected, growth = (found[k] / 1e6 for k in ("tensors", "expected", "growth"))
        print(f"{name:34} tensors {tensors:6.0f} MB   expected {expected:6.0f} MB   grew {growth:6.0f} MB   "
              f"off by {growth - expected:5.0f} MB ({100 * (growth / expected - 1):.0f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
