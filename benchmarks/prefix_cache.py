"""What the cache of a frozen prefix saves of an evaluation, on the CPU.

    python benchmarks/prefix_cache.py --learn "layers[-2:]" --threads 2

A Llama of 34 million parameters with random weights, 8 × 4 held-out rows of 512 tokens: computed, computed and kept,
and read. Prints seconds of each and whether the losses have the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from frostline.anatomy import read_anatomy
from frostline.data import Batch
from frostline.engine import LoopSettings, PrefixCache, PrefixSettings, next_token_loss
from frostline.engine.evaluation import held_out_loss
from frostline.engine.stage_switch import set_modes, switch
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

SIZES = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
         "tie_word_embeddings": False}  # fmt: skip


def batch_at(place: int, rows: int, length: int) -> Batch:
    """Random tokens, from the place."""
    ids = torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(place))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return Batch(input_ids=ids, labels=labels, indices=tuple(range(place * rows, (place + 1) * rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", default="layers[-2:]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32)
    anatomy = read_anatomy(model)
    spec = StageSpec(learn=asked.learn, steps=1, lr=1e-4)
    stage = Schedule.of([("only", spec, select(anatomy, asked.learn))]).stages[0]
    switch(dict(model.named_parameters()), anatomy, stage, memory={}, leaving=None)
    set_modes(model, stage)
    held_out = [batch_at(i, 4, 512) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        cache = PrefixCache(
            model,
            anatomy,
            PrefixSettings(
                how="on",
                folder=Path(folder),
                limit_bytes=10**11,
                n_rows=4,
                batch=lambda _: held_out[0],
                bf16=False,
                depends_on=dict,
                worth=lambda _: None,
                say=lambda _stage, value, why: print(f"{value}: {why}"),
                measured=held_out,
            ),
        )
        loss = cache.measuring(stage, next_token_loss)
        seconds: dict[str, list[float]] = {}
        values: dict[str, float] = {}
        for name, how in [("kept", loss)] + [("computed", next_token_loss), ("read", loss)] * asked.reps:
            started = time.perf_counter()
            values[name] = held_out_loss(model, held_out, how, LoopSettings())
            seconds.setdefault(name, []).append(time.perf_counter() - started)
        cache.close()
    computed = statistics.median(seconds["computed"])
    for name, found in seconds.items():
        print(
            f"{name}: {statistics.median(found):.3f} s ({statistics.median(found) / computed:.2f} ×), {values[name]!r}"
        )
    print("the same bytes" if len(set(values.values())) == 1 else "OTHER LOSSES")


if __name__ == "__main__":
    main()
