"""Blocks against the whole model as the unit of compilation: processor time to compile, graphs, time of a step.

`python benchmarks/compile_units.py` trains a small 8-layer Llama: everything, the FFN alone, everything.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch._dynamo.utils import counters

from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine import next_token_loss, step
from frostline.engine.stage_switch import set_modes, switch
from frostline.model import load_model
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

MODEL = ScratchModel(
    architecture="llama", vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
)  # fmt: skip


def measure(unit: str) -> None:
    """Print one row per stage."""
    torch._dynamo.reset()
    counters.clear()
    model = load_model(MODEL)
    parts: list[nn.Module] = [b for _, b in find_blocks(model)] if unit == "blocks" else [model]
    for part in parts if unit != "off" else ():
        part.forward = torch.compile(part.forward, fullgraph=unit == "blocks", dynamic=False)
    anatomy, active = read_anatomy(model), None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ids = torch.randint(2048, (8, 129), generator=torch.Generator().manual_seed(0))
    batch = Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])
    for learn in ("all", "ffn", "all"):
        spec = StageSpec(learn=learn, steps=1, lr=1e-4)
        stage = Schedule.of([("s", spec, select(anatomy, learn))]).stages[0]
        active = switch(parameters, anatomy, stage, memory={}, leaving=active)
        set_modes(model, stage)
        seconds, graphs = [], counters["stats"]["unique_graphs"]
        for i in range(6):
            started = time.process_time()
            step(model, [batch], next_token_loss, seed=i, device=torch.device("cpu"))
            active.update()
            active.optimizer.zero_grad()
            seconds.append(time.process_time() - started)
        new = counters["stats"]["unique_graphs"] - graphs
        print(f"| {unit} | {learn} | {new} | {seconds[0]:.1f} s | {statistics.median(seconds[1:]):.3f} s |", flush=True)


def main() -> None:
    """Print the table. The compiler's own cache is put aside, so that compiling is measured."""
    from torch._inductor import config

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; processor time of this process")
    print("| unit | learns | new graphs | first step | later steps |\n|---|---|---|---|---|")
    for unit in ("off", "blocks", "model"):
        with config.patch(force_disable_caches=True, compile_threads=1):
            measure(unit)


if __name__ == "__main__":
    main()
