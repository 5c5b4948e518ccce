"""What the run of one strategy and seed came to, read from its run folder. Read `measured`.

FLOPs are those of a step as the run metered them (as planned, where it metered none), times the steps of every stage;
held-out losses and evidence are not in them, nor what a cache of frozen blocks spared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frostline.environment import MATTERS
from frostline.recipe import keys_of
from frostline.run_folder import RunFolder, StageRecord, damaged_records

State = Literal["finished", "interrupted", "failed", "not run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measurement of the held-out loss."""

    step: int
    flops: int | None
    """Spent in training until then; None where the model has no plan."""
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """What the seed does not determine."""

    seconds: float
    """Of all training steps."""
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What a run folder says of one run."""

    steps: int
    skipped: int
    """Of the steps, because something in them was not finite."""
    tokens: int
    """That the loss was of."""
    curve: tuple[Point, ...]
    learning: tuple[int, ...]
    """Parameters that learn, by stage."""
    flops: int | None
    planned_flops: int | None
    """For the steps that were done."""
    peak_bytes: int | None
    """The most of tensors that a metered step held; the largest over the stages."""
    planned_peak_bytes: int | None
    made_with: dict[str, str]
    """Software and machine, as far as they may change the bits."""
    clock: Clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the run of one strategy and seed ended."""

    strategy: str
    seed: int
    state: State
    audit: Literal["passed", "failed", "interrupted"] | None
    """None where there is nothing to audit."""
    why: str = ""
    """What went wrong, in words."""
    final: bool = False
    """Whether trying again would only repeat the failure."""
    measures: Measures | None = None

    @property
    def counts(self) -> bool:
        """Whether it is part of the statistics: finished, and its audit passed."""
        return self.state == "finished" and self.audit == "passed" and bool(self.measures and self.measures.curve)


def measured(path: Path) -> Measures:
    """The numbers of a finished or interrupted run. Raises `RunFolderError` for damaged records."""
    folder = RunFolder.open(path)
    with damaged_records(path):
        return _measured(folder)


def _measured(folder: RunFolder) -> Measures:
    stages, metrics, steps = folder.read_schedule(), folder.read_lines(folder.metrics), folder.read_status()["step"]
    plan = folder.read_json("plan.json") if (folder.path / "plan.json").exists() else None
    checks = {c["stage"]: c for c in plan["checks"]} if plan else {}
    planned = {s["name"]: s["step"]["total_flops"] for s in plan["stages"]} if plan else {}
    real = {name: checks[name]["measured_flops"] if name in checks else flops for name, flops in planned.items()}
    peaks = [c["measured_peak_bytes"] for c in checks.values() if c["measured_peak_bytes"] is not None]
    targets = {row["step"]: row["n_targets"] for row in metrics if "n_targets" in row}
    return Measures(
        steps=steps,
        skipped=sum(bool(row.get("skipped")) for row in metrics),
        tokens=sum(targets.values()),
        curve=tuple(
            Point(step=r["step"], flops=spent(stages, real, r["step"]), loss=r["held_out_loss"])
            for r in metrics
            if r.get("held_out_loss") is not None
        ),
        learning=tuple(s.n_learning for s in stages),
        flops=spent(stages, real, steps),
        planned_flops=spent(stages, planned, steps),
        peak_bytes=max(peaks, default=None),
        planned_peak_bytes=max((c["planned_peak_bytes"] for c in checks.values()), default=None),
        made_with=_made_with(folder.read_json("environment.json")),
        clock=_clock(folder, targets),
    )


def _made_with(environment: dict[str, Any]) -> dict[str, str]:
    return {k: str(v) for k, v in keys_of({k: environment.get(k) for k in MATTERS}).items()}


def spent(stages: list[StageRecord], per_step: dict[str, int], step: int) -> int | None:
    """FLOPs of the first `step` steps; None where a stage that they reach has no number."""
    total = 0
    for stage in stages:
        n = min(step, stage.end) - stage.start
        if n > 0 and stage.name not in per_step:
            return None
        total += max(n, 0) * per_step.get(stage.name, 0)
    return total if per_step else None


def _clock(folder: RunFolder, targets: dict[int, int]) -> Clock:
    rows: list[dict[str, Any]] = [r for r in folder.read_lines(folder.timing) if "seconds" in r and r.get("step")]
    times = {r["step"]: r["seconds"] for r in rows}  # a step that was done again counts once
    seconds = sum(times.values())
    n = sum(targets.get(step, 0) for step in times)
    return Clock(seconds=seconds, tokens_per_s=n / seconds if seconds else None)
