"""What padding costs: instruction-like lengths trained by default collation, packed behind a mask, and without padding.

    python benchmarks/packing.py [--documents 40] [--rounds 5] [--threads 2] [--learn ffn]

Documents have lognormal lengths (median 90, 95th percentile 450, limit 1,024) and random tokens. One epoch each, in
turn, every system from the same weights; ratios are of medians over rounds, of wall time and of this process's own CPU
time (which other processes disturb less). First it is checked that every document's loss is the same in each layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from frostline.anatomy import read_anatomy
from frostline.data import Batch, Example, FlatRows, PackedRows, PaddedRows, RowSource, Store, cut, rows_at
from frostline.engine import next_token_loss, step
from frostline.engine.documents import use_document_attention
from frostline.engine.stage_switch import set_modes, switch
from frostline.model import load_model
from frostline.plan.trace import update
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

MODEL = {
    "architecture": "llama",
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LIMIT = 1024
BATCH = 8
"""Documents per step; packed rows have about as many tokens in a step."""


def lengths(n: int, *, seed: int = 0) -> np.ndarray:
    """Tokens of `n` documents: lognormal with median 90 and 95th percentile 450."""
    drawn = np.random.default_rng(seed).standard_normal(n)
    return np.clip(90 * np.exp(np.log(450 / 90) / 1.645 * drawn), 2, LIMIT).astype(int)


def documents(n: int) -> Store:
    """Documents of random tokens."""
    generator = np.random.default_rng(1)
    made = [generator.integers(3, MODEL["vocab_size"], size) for size in lengths(n)]
    learns = [np.arange(len(ids)) > 0 for ids in made]
    return Store.of(Example(i.astype(np.int32), m, 0, "random") for i, m in zip(made, learns, strict=True))


def build(*, calls: bool) -> nn.Module:
    """The same weights every time."""
    model = load_model(ScratchModel(**MODEL), seed=0)
    if calls:
        use_document_attention(model)
    return model


class System:
    """One way of laying documents into batches, with a model of its own."""

    def __init__(self, name: str, rows: RowSource, batch: int, learn: str, *, calls: bool) -> None:
        self.name, self.rows, self.size = name, rows, batch
        self.model = build(calls=calls)
        anatomy = read_anatomy(self.model)
        spec = StageSpec(learn=learn, steps=1, lr=1e-4)
        (stage,) = Schedule.of([("stage", spec, select(anatomy, learn))]).stages
        self.active = switch(dict(self.model.named_parameters()), anatomy, stage, memory={}, leaving=None)
        set_modes(self.model, stage)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def batches(self, seed: int) -> list[Batch]:
        """One epoch."""
        n = len(self.rows)
        order = rows_at(0, seed=seed, n_rows=n, batch=n)
        return [self.rows.batch(order[at : at + self.size]) for at in range(0, n, self.size)]

    def epoch(self, seed: int, *, timed: bool) -> int:
        """Train one epoch; returns the tokens that were computed."""
        batches = self.batches(seed)
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            step(self.model, [batch], next_token_loss, seed=0, device=torch.device("cpu"))
            update(self.active)
        if timed:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)
        return sum(b.input_ids.numel() for b in batches)

    def losses(self) -> dict[tuple[int, ...], float]:
        """Loss of every document at its present weights, by the document's first tokens."""
        found = {}
        with torch.no_grad():
            for batch in self.batches(0):
                logits = self.model(**batch.inputs, use_cache=False).logits
                for row, (start, end) in spans(batch):
                    ids, labels = batch.input_ids[row, start:end], batch.labels[row, start:end]
                    loss = functional.cross_entropy(logits[row, start:end], labels, ignore_index=-100)
                    found[tuple(ids[:8].tolist())] = loss.item()
        return found


def spans(batch: Batch) -> list[tuple[int, tuple[int, int]]]:
    """(row, (start, end)) of every document in a batch."""
    if batch.documents is not None:
        return [(r, s) for r in range(len(batch.input_ids)) for s in batch.documents.spans(r)]
    assert batch.attention_mask is not None
    return [(r, (0, int(n))) for r, n in enumerate(batch.attention_mask.sum(1))]


def alone(store: Store) -> dict[tuple[int, ...], float]:
    """Loss of every document computed by itself, by plain transformers."""
    model, pieces, found = build(calls=False), cut(store, LIMIT, "truncate"), {}
    model.eval()
    with torch.no_grad():
        for i in range(len(pieces)):
            ids, labels = pieces.piece(i)
            loss = functional.cross_entropy(model(input_ids=ids[None]).logits[0], labels)
            found[tuple(ids[:8].tolist())] = loss.item()
    return found


def systems(store: Store, learn: str) -> list[System]:
    """Default collation; packed behind a dense mask; packed, calls; flat."""
    pieces = cut(store, LIMIT, "truncate")
    mean = float(pieces.lengths.mean())
    packed: Callable[[str], PackedRows] = lambda kept: PackedRows.of(pieces, LIMIT, seed=0, kept_by=kept)  # noqa: E731
    rows = max(1, round(BATCH * mean / LIMIT))
    return [
        System("padded", PaddedRows(pieces), BATCH, learn, calls=False),
        System("packed, mask", packed("mask"), rows, learn, calls=False),
        System("packed, calls", packed("calls"), rows, learn, calls=True),
        System("flat", FlatRows(pieces, "calls"), BATCH, learn, calls=True),
    ]


def agreement(found: Sequence[System], reference: dict[tuple[int, ...], float]) -> dict[str, float]:
    """System → the largest relative difference of a document's loss from that of it alone."""
    out = {}
    for s in found:
        losses = s.losses()
        assert losses.keys() == reference.keys()
        out[s.name] = max(abs(losses[k] / reference[k] - 1) for k in reference)
    return out


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learn", default="ffn")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    store = documents(given.documents)
    tokens = int(np.minimum(store.lengths - 1, LIMIT).sum())
    all_systems = systems(store, given.learn)
    off = agreement(all_systems, alone(store))
    computed = {s.name: s.epoch(0, timed=False) for s in all_systems}  # a warm-up
    for seed in range(1, given.rounds + 1):
        for s in all_systems if seed % 2 else all_systems[::-1]:
            s.epoch(seed, timed=True)
    wall = {s.name: statistics.median(s.wall) for s in all_systems}
    cpu = {s.name: statistics.median(s.cpu) for s in all_systems}
    rows = [
        {
            "system": name,
            "epoch_s": round(wall[name], 3),
            "cpu_s": round(cpu[name], 3),
            "tokens_per_s": round(tokens / wall[name]),
            "filled": round(tokens / computed[name], 3),
            "flat_is_faster_by": round(wall[name] / wall["flat"], 3),
            "flat_is_faster_by_cpu": round(cpu[name] / cpu["flat"], 3),
            "loss_off": off[name],
        }
        for name in wall
    ]
    print(json.dumps({**vars(given), "tokens": tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
