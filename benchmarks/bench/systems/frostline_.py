"""Frostline: its loop with evidence, fused loss and prefix cache as they are by default. Settings: `loss`, `cache`
(auto, on, off), `cache_dir`, `plan` (false: no plan beforehand), `compile` (true: compiled blocks), `recompute`
(what these keep of what they would keep; when left out, what `recompute: auto` says)."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch, Example, FlatRows, Store, cut
from frostline.engine import LoopSettings, PrefixCache, PrefixSettings, StepDone, choose_loss, loss_of, train_loop
from frostline.engine.compiled import Compiled
from frostline.engine.documents import use_document_attention
from frostline.engine.freed_memory import kept
from frostline.levers import KEPT
from frostline.model import load_model
from frostline.plan import Batching, make_plan, why_not_worth
from frostline.recipe import OptimizerSpec, StageSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, StepSize
from frostline.selection import select

sys.path.insert(0, str(Path(__file__).parents[1]))
from job import Job, Meter, Result, main, tokens_of

EXPRESSIONS = {"experts": "experts | router"}


def expression(learn: str) -> str:
    """A job's name as a selection."""
    return f"layers[-{learn[5:]}:]" if learn.startswith("last-") else EXPRESSIONS.get(learn, learn)


def kept_of(job: Job) -> float:
    """What compiled blocks keep: as `recompute: auto` has it, or as the settings say."""
    auto = KEPT if job.dtype == "fp32" and job.device == "cpu" else 1.0
    return float(job.settings.get("recompute", auto))


def fixed(rows: Any, indices: list[int]) -> Batch:
    """Rows of one length."""
    ids = rows[indices]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return Batch(input_ids=ids, labels=labels, indices=tuple(indices))


def flat(rows: Any, indices: list[int]) -> Batch:
    """Documents one after another in one row, without padding, kept apart in attention; as `layout: flat` does."""
    examples = [Example(rows[i].numpy().astype(np.int32), np.arange(len(rows[i])) > 0, 0, "") for i in indices]
    return FlatRows(cut(Store.of(examples), 1 << 20, "truncate"), "calls").batch(range(len(indices)))


def run(job: Job) -> Result:
    """Train."""
    meter = Meter(job)
    device = torch.device(job.device)
    rows = torch.load(job.tokens)
    documents = isinstance(rows, list)
    order = job.order(len(rows))
    model = load_model(job.model).to(device)
    if documents:
        use_document_attention(model)
    anatomy = read_anatomy(model)
    spec = StageSpec(
        learn=expression(job.learn),
        steps=len(order),
        lr=job.lr,
        clip=1.0,
        optimizer=OptimizerSpec(name="adamw", weight_decay=0.0),
    )
    largest = max(tokens_of(rows, order))
    size = StepSize(tokens=largest, rows=job.batch, n_rows=len(rows))
    schedule = Schedule.of([("only", spec, select(anatomy, spec.learn))], step_size=size)

    def batches(step: int, _stage: Any) -> list[Batch]:
        return [flat(rows, order[step]).to(device) if documents else fixed(rows, order[step]).to(device)]

    how = job.settings.get("loss", "auto")
    loss = choose_loss(how, model, anatomy, n_tokens=largest).loss
    plan, said, losses = None, [], []
    if job.settings.get("plan", True) and not documents:
        batching = Batching(
            rows=job.batch,
            length=rows.shape[1],
            bf16=job.dtype == "bf16",
            loss=how,
            device=job.device,  # type: ignore[arg-type]
        )
        plan = make_plan(job.model, schedule, batching)
    blocks = [block for _, block in find_blocks(model)]
    compiled = Compiled(blocks, n_stages=1, kept=kept_of(job)) if job.settings.get("compile") else None
    running = compiled.running() if compiled else nullcontext()
    with tempfile.TemporaryDirectory() as folder, running, kept(job.settings.get("keep_freed", True)):
        cache = PrefixCache(
            model,
            anatomy,
            PrefixSettings(
                how="off" if documents else job.settings.get("cache", "auto"),
                folder=Path(job.settings.get("cache_dir", folder)) / "cache",
                limit_bytes=100_000_000_000,
                n_rows=len(rows),
                batch=lambda stage: batches(stage.start, stage)[0],
                bf16=job.dtype == "bf16",
                depends_on=dict,
                worth=lambda stage: why_not_worth(plan, schedule, stage),
                say=lambda _stage, value, why: said.append(f"{value}: {why}"),
                rows_of=lambda step: order[step] if step < len(order) else (),
            ),
        )

        def listen(event: object) -> None:
            if isinstance(event, StepDone):
                losses.append(event.loss)
                meter.tick()

        meter.start()
        train_loop(
            model,
            anatomy,
            schedule,
            cache.watched(batches),
            loss,
            folder=RunFolder.create(Path(folder) / "run"),
            settings=LoopSettings(
                bf16=job.dtype == "bf16",
                device=device,
                compiled=compiled,
                loss_of=lambda stage: loss_of(stage, None, cache.language(stage, loss)),
            ),
            observers=[listen],
        )
        cache.close()
    notes: dict[str, Any] = {"cache": said}
    if plan is not None:
        cost = plan.stages[0].cost
        notes |= {
            "planned_peak_bytes": cost.peak_bytes,
            "flops": cost.total_flops,
            "prefix_flops": cost.prefix_flops,
        }
    return Result(
        seconds=meter.seconds,
        losses=losses,
        peak_bytes=meter.peak_bytes(),
        tokens=tokens_of(rows, order),
        cpu_seconds=meter.cpu_seconds,
        n_learning=schedule.stages[0].selection.n_elements,
        notes=notes,
    )


if __name__ == "__main__":
    main(run)
