"""What a step costs when few experts learn: time and weight-gradient FLOPs for 8, 4, 2 and 1 of 8 experts per layer.

    python benchmarks/few_experts.py [--rows 8] [--length 256] [--bf16] [--device cuda] [--eager]

A Mixtral of random weights whose experts are most of its arithmetic; only experts learn. Time: the median of steps in
turn, so that what else the machine does falls on all settings alike. `--eager`: transformers' own experts, to compare.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from frostline.anatomy import read_anatomy
from frostline.engine import loss_of, step
from frostline.engine.stage_switch import set_modes, switch
from frostline.model import load_model
from frostline.plan.meter import Meter
from frostline.plan.trace import micro_batches, update
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CONFIG = {
    "architecture": "mixtral",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One number of learning experts."""

    learning: int
    seconds: float
    weight_flops: int
    """Of the gradients of experts' weights, counted while a real step ran."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", type=int, default=1, help="multiplies hidden and intermediate size")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    rows = measure(asked)
    print(f"{'experts':>8} {'ms':>9} {'of all':>7} {'weight-gradient FLOPs':>22} {'of all':>7}")
    for row in rows:
        share, flops = row.seconds / rows[0].seconds, row.weight_flops / max(rows[0].weight_flops, 1)
        print(f"{row.learning:>8} {1e3 * row.seconds:>9.1f} {share:>7.2f} {row.weight_flops:>22.3e} {flops:>7.3f}")


def measure(asked: argparse.Namespace) -> list[Row]:
    """The same steps with 8, 4, 2 and 1 learning experts, in turn."""
    sizes = {n: CONFIG[n] * asked.scale for n in ("hidden_size", "intermediate_size")}  # type: ignore[operator]
    model = load_model(ScratchModel(**{**CONFIG, **sizes}), seed=0)
    if asked.eager:
        model.set_experts_implementation("eager")  # type: ignore[operator]
    anatomy, device = read_anatomy(model), torch.device(asked.device)
    stages = {n: stage_of(anatomy, n) for n in (8, 4, 2, 1)}
    ids = torch.randint(5, 500, (asked.rows, asked.length), generator=torch.Generator().manual_seed(0))
    flops = {n: weight_flops(model, anatomy, stage, ids, bf16=asked.bf16) for n, stage in stages.items()}
    model, ids = model.to(device), ids.to(device)
    times: dict[int, list[float]] = {n: [] for n in stages}
    for turn in range(asked.repeats + 1):
        for n, stage in stages.items():
            seconds = one_step(model, anatomy, stage, ids, bf16=asked.bf16)
            times[n] += [seconds] if turn else []
    return [Row(learning=n, seconds=statistics.median(times[n]), weight_flops=flops[n]) for n in stages]


def stage_of(anatomy: object, n: int) -> Stage:
    """A stage in which the first `n` experts of every layer learn."""
    spec = StageSpec(learn=f"experts[0:{n}]", steps=1, lr=1e-4)
    return Schedule.of([("step", spec, select(anatomy, spec.learn))]).stages[0]  # type: ignore[arg-type]


def weight_flops(model: torch.nn.Module, anatomy: object, stage: Stage, ids: torch.Tensor, *, bf16: bool) -> int:
    """FLOPs of the gradients of experts' weights, counted in a real step."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, anatomy, stage, memory={}, leaving=None)  # type: ignore[arg-type]
    with Meter(parameters) as meter:
        step(model, micro_batches(*ids.shape, 1, ids), loss_of(stage, None), seed=0, device=ids.device, bf16=bf16)
    active.ownership.release()
    return sum(n for (name, kind), n in meter.flops.items() if kind == "weight gradients" and "experts" in name)


def one_step(model: torch.nn.Module, anatomy: object, stage: Stage, ids: torch.Tensor, *, bf16: bool) -> float:
    """Seconds of the second of two steps of a stage: the first makes the optimizer's state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, anatomy, stage, memory={}, leaving=None)  # type: ignore[arg-type]
    set_modes(model, stage)
    batches = micro_batches(len(ids), ids.shape[1], 1, ids)
    for _ in range(2):
        if ids.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step(model, batches, loss_of(stage, None), seed=0, device=ids.device, bf16=bf16)
        update(active)
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    active.ownership.release()
    return seconds


if __name__ == "__main__":
    main()
