"""Five shipped strategies in fp32 and bf16, eager and compiled: audits, losses, bytes, graphs, time.

`python benchmarks/precision.py MODEL TEXT OUT` trains each a few steps and prints a Markdown table; exit code 1 when an
audit fails, or a compiled fp32 loss is further than 1e-3 from the eager one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import frostline
from frostline.engine import StageCompiled
from frostline.run import RunResult
from frostline.units import format_bytes

RECIPES = Path(frostline.__file__).parent / "recipes"
STEPS = {
    "all": ["stages[0].steps=12", "stages[0].warmup=2"],
    "ffn": ["stages[0].steps=12", "stages[0].warmup=2"],
    "attn": ["stages[0].steps=12", "stages[0].warmup=2"],
    "lp-ft": ["schedule.probe.steps=6", "schedule.tune.steps=6", "schedule.warmup=2"],
    "lisa": ["schedule.every=4", "schedule.steps=12", "lr_across.warmup=2"],
}
"""Shipped recipe → what makes it short."""
SETTINGS: list[tuple[str, str | None, str]] = [
    ("fp32", None, "off"),
    ("fp32", None, "blocks"),
    ("bf16", "masters", "off"),
    ("bf16", "masters", "blocks"),
    ("bf16", "stochastic", "off"),
    ("bf16", "stochastic", "blocks"),
    ("bf16", "nearest", "off"),
]

COLUMNS = (
    "strategy", "weights", "blocks", "audit", "loss at the end", "furthest from eager fp32", "held-out loss",
    "peak of tensors", "new graphs by stage", "warm-up", "step", "updates lost",
)  # fmt: skip


def run(name: str, args: argparse.Namespace, precision: str, rounding: str | None, compiled: str) -> dict[str, Any]:
    """One row."""
    overrides = [
        f"model={args.model}", f"data.train={args.text}", "data.length=128", "data.batch=16", "eval.batches=4",
        "evidence.gradients_every=4", f"precision={precision}", f"compile={compiled}", "device=cpu", *STEPS[name],
        *([f"rounding={rounding}"] if rounding else []), *(["ties=together"] if name != "lp-ft" else []),
    ]  # fmt: skip
    recipe = frostline.load_recipe(RECIPES / f"{name}.yaml", overrides=overrides)
    events: list[Any] = []
    out = Path(args.out) / "-".join(filter(None, [name, precision, rounding, compiled]))
    result: RunResult = frostline.train(recipe, out=out, observers=[events.append])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    proofs = [e for e in events if isinstance(e, StageCompiled)]
    endings = [json.loads(line) for line in (out / "endings.jsonl").read_text().splitlines()]
    lost = [e["lost_updates"] for e in endings if "lost_updates" in e]
    return {
        "passed": result.audit.passed,
        "losses": [r["loss"] for r in rows if "loss" in r],
        "held_out": [r["held_out_loss"] for r in rows if "held_out_loss" in r][-1],
        "peak": max((c.measured_peak_bytes or 0 for c in result.checks), default=0) or None,  # compiled: none
        "agree": all(c.flops_agree for c in result.checks),
        "graphs": proofs[-1].n_graphs if proofs else 0,
        "by_stage": [p.proof.n_graphs for p in proofs],
        "warm_up": sum(p.proof.seconds for p in proofs),
        "seconds": statistics.median(t["seconds"] for t in timing if "seconds" in t and "step" in t),
        "lost": max(lost) if lost else None,
    }


def main() -> int:
    """Print the table; says whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; steps of 16 × 128 tokens")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    held = True
    for name in args.only:
        reference: list[float] = []
        for precision, rounding, compiled in SETTINGS:
            row = run(name, args, precision, rounding, compiled)
            reference = reference or row["losses"]
            off = max(abs(a - b) / b for a, b in zip(row["losses"], reference, strict=True))
            held &= row["passed"] and row["agree"] and (precision != "fp32" or off < 1e-3)
            cells = [
                name,
                precision if rounding is None else f"{precision}, {rounding}",
                "compiled" if compiled == "blocks" else "eager",
                "passed" if row["passed"] else "FAILED",
                f"{row['losses'][-1]:.4f}",
                f"{off:.1e}",
                f"{row['held_out']:.4f}",
                format_bytes(row["peak"]) if row["peak"] is not None else "–",
                " + ".join(map(str, row["by_stage"])) or "–",
                f"{row['warm_up']:.1f} s" if row["by_stage"] else "–",
                f"{1000 * row['seconds']:.0f} ms",
                "–" if row["lost"] is None else f"{100 * row['lost']:.0f} %",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
