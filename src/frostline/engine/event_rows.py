"""What each event adds to the records of a run: a line of JSON to this file or that.

`metrics.jsonl` gets what the seed determines, `timing.jsonl` clocks and memory. Read `rows_of`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frostline.engine.events import (
    Evaluated,
    Event,
    Measured,
    SetEvaluated,
    StageCompiled,
    StageEnded,
    StageStarted,
    StepDone,
)
from frostline.run_folder import RunFolder

Row = dict[str, Any]


def rows_of(event: Event, folder: RunFolder) -> Iterator[tuple[Path, Row]]:
    """(file of `folder`, its next line) of everything that an event adds; nothing for events that only inform."""
    match event:
        case StepDone():
            yield folder.metrics, _step(event)
            yield folder.timing, _step_time(event)
        case Evaluated():
            row = {"step": event.step, "stage": event.stage.name, "held_out_loss": event.held_out_loss}
            yield folder.metrics, row | _bits(event.bits_per_byte)
        case SetEvaluated():
            row = {"step": event.step, "stage": event.stage.name, "set": event.name, "set_loss": event.loss}
            yield folder.metrics, row | _bits(event.bits_per_byte)
        case Measured():
            yield folder.flow, {"step": event.step, "stage": event.stage.index, **event.flow.to_json()}
        case StageCompiled():
            row = {"event": "compiled", "stage": event.stage.name, "graphs": event.n_graphs}
            yield folder.timing, row | asdict(event.proof)
        case StageStarted():
            yield folder.timing, _memory("stage started", event.stage.name)
        case StageEnded():
            yield folder.endings, _ending(event)
            yield folder.timing, _memory("stage ended", event.stage.name)
        case _:
            pass


def _step(event: StepDone) -> Row:
    return {
        "step": event.step,
        "stage": event.stage.name,
        "loss": event.loss,
        "lr": event.lr,
        "gradient_norm": event.gradient_norm,
        "n_targets": event.n_targets,
        **({"skipped": True} if event.skipped else {}),
        **({"spike": True} if event.spike else {}),
    }


def _step_time(event: StepDone) -> Row:
    tokens_per_s = event.n_targets / event.seconds if event.seconds else None
    return {"step": event.step, "seconds": event.seconds, "tokens_per_s": tokens_per_s}


def _bits(bits_per_byte: float | None) -> Row:
    return {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}


def _ending(event: StageEnded) -> Row:
    return {
        "stage": event.stage.index,
        "step": event.step,
        "why": "plateau" if event.n_skipped else "its time",
        "moved": event.n_moved,
        "unmoved": dict(event.unmoved),
        "buffers_restored": list(event.buffers_restored),
        **({"lost_updates": event.lost_updates} if event.lost_updates is not None else {}),
    }


def _memory(what: str, stage: str) -> Row:
    return {"event": what, "stage": stage, "peak_resident_bytes": peak_resident_bytes()}


def peak_resident_bytes() -> int | None:
    """The largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
