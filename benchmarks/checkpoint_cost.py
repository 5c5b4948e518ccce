"""Time and bytes of a checkpoint of a model of 134 M parameters: `python benchmarks/checkpoint_cost.py`.

For everything learning (all weights and optimizer state), the FFN, and the last layer; each the median of three writes,
files synced and hashed, and of three verified reads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from frostline.anatomy import read_anatomy
from frostline.checkpoints import Checkpoints
from frostline.engine.run_state import capture, from_files, to_files
from frostline.engine.stage_switch import switch
from frostline.model import load_random
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

MODEL = ScratchModel(
    architecture="llama", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


def main() -> None:
    """Print a line per selection."""
    model = load_random(MODEL)
    anatomy = read_anatomy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    print(f"{anatomy.n_parameters / 1e6:.0f} M parameters")
    for learn in ("all", "ffn", "layers[-1]"):
        spec = StageSpec(learn=learn, steps=1, lr=1e-4)
        (stage,) = Schedule.of([("s", spec, select(anatomy, learn))]).stages
        active = switch(parameters, anatomy, stage, memory={}, leaving=None)
        for o in active.ownership.owned:
            o.value.grad = torch.ones_like(o.value)
        active.optimizer.step()
        active.optimizer.zero_grad()
        pieces = stage.selection.slices
        writes, reads = [], []
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder), run="benchmark")
            for step in range(3):
                started = time.perf_counter()
                state = capture(
                    parameters,
                    active,
                    {},
                    pieces,
                    step=step,
                    endings=(),
                    losses=(),
                    drifted=(),
                    n_skipped=0,
                    recent=(),
                    left_out=(),
                    records={},
                )
                path = checkpoints.write(step, *to_files(state))
                writes.append(time.perf_counter() - started)
                started = time.perf_counter()
                found, _ = checkpoints.newest()
                assert found is not None
                from_files({n: found.tensors(n) for n in ("weights", "optimizer")}, found.data)
                reads.append(time.perf_counter() - started)
            n_bytes = sum(p.stat().st_size for p in path.iterdir())
        active.ownership.release()
        print(
            f"{learn:12} {n_bytes / 1e6:7.0f} MB   write {statistics.median(writes):5.2f} s   "
            f"read and verify {statistics.median(reads):5.2f} s"
        )


if __name__ == "__main__":
    main()
