"""The run folder: every file name in it, and the schema of the evidence. The engine writes, the audit reads.

    recipe.yaml               the resolved recipe
    environment.json          versions, threads, dtype flags, hashes of data and base, the command
    anatomy.json              every part: tensors and index ranges
    schedule.json             stages: boundaries, settings, the slices that learn
    status.json               running, finished, interrupted or failed, and after which step
    metrics.jsonl             loss, learning rate, gradient norm per step; held-out losses: what the seed determines
    endings.jsonl             how each stage ended: when, why, what moved, buffers put back
    timing.jsonl              clocks, tokens per second, memory
    plan.json                 what the run was to cost, against a metered step of every stage
    evidence/
      boundary-0.json …       SHA-256 of every piece at the start and after each stage
      entry-0.safetensors …   the values that a stage starts to train, as they were
      gradients.jsonl         gradient norm per learning piece at sampled steps
      updates.jsonl           how much of a sampled step the weights show, when they are kept in bf16
      model-files.json        SHA-256 of every file of the saved model
      flow.jsonl              where gradients go, at sampled steps, when that was measured
      load.jsonl              choices that each expert got, and those dropped, per step, when a stage has `moe`
      likeness.jsonl          how alike the experts of each layer are, at the start and at each stage's end, then too
      choice.json             what selections by use or by a file were resolved to, and from what
    checkpoints/              where an interrupted run goes on from
    lock                      held by the process that works on the run
    model/                    the trained model; plain transformers loads it
    expansion.json            the named schedule that the stages come from, when there was one, and what it measured
    claims.json, samples.json, report.html   when they were asked for

A *piece* is a slice of one component that every stage treats as one: all of it learns, or none of it.
Read `records.py` (the schema) and `folder.py` (names, reading, writing); `rewinding.py` takes the records back to
a checkpoint.
"""

from frostline.run_folder.folder import RunFolder, checkpoint_of, damaged_records
from frostline.run_folder.records import Boundary, GradientSample, StageRecord, State, UpdateSample
from frostline.run_folder.rewinding import check_kept, record_sizes, rewind

__all__ = [
    "Boundary",
    "GradientSample",
    "RunFolder",
    "StageRecord",
    "State",
    "UpdateSample",
    "check_kept",
    "checkpoint_of",
    "damaged_records",
    "record_sizes",
    "rewind",
]
