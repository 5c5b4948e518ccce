"""What a person sees of a run while it goes on: a bar, and lines that stay. Renders; never computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from frostline.engine import (
    Chose,
    Evaluated,
    Event,
    Noted,
    RolledBack,
    RunStarted,
    SetEvaluated,
    StageCompiled,
    StageEnded,
    StageStarted,
    StepDone,
)
from frostline.schedule import Route, Stage
from frostline.units import format_bytes, format_duration


class ProgressLines:
    """An observer that shows a run: a bar on a terminal, one line per measurement everywhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=None, stage="", numbers="")
        self.seconds, self.n_steps = 0.0, 0

    def __enter__(self) -> ProgressLines:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self.n_steps = event.schedule.n_steps
                self.progress.update(self.task, total=self.n_steps, completed=event.done)
            case StageStarted():
                self.seconds = 0.0
                self.console.print(_stage_line(event), highlight=False)
                self.progress.update(self.task, stage=f"stage {event.stage.name}")
            case StepDone():
                self.seconds += event.seconds
                speed = f"{event.n_targets / event.seconds:,.0f} tokens/s" if event.seconds else ""
                self.progress.update(self.task, completed=event.step, numbers=f"loss {event.loss:.3f}  {speed}")
                if event.skipped or event.spike:
                    self.console.print(_trouble_line(event), highlight=False)
            case RolledBack():
                first, after = event.left_out
                line = f"  {event.why}\n  back to step {event.to}; batches {first} to {after - 1} are left out"
                self.console.print(line, highlight=False, soft_wrap=True, markup=False)
                self.progress.update(self.task, completed=event.to)
            case Evaluated():
                line = _measured_line(event.step, "held-out", event.held_out_loss, event.bits_per_byte)
                self.console.print(line, highlight=False)
            case SetEvaluated():
                line = _measured_line(event.step, event.name, event.loss, event.bits_per_byte)
                self.console.print(line, highlight=False, markup=False)
            case StageCompiled():
                self.console.print(_compiled_line(event), highlight=False)
            case Noted():
                self.console.print(event.text, style="yellow" if event.is_warning else None, highlight=False)
            case Chose():
                line = f"  {event.setting}: {event.value} ({event.why})"
                self.console.print(line, highlight=False, soft_wrap=True, markup=False)
            case StageEnded():
                self.console.print(_ended_line(event, self.seconds), highlight=False)
                self.n_steps -= event.n_skipped
                self.progress.update(self.task, total=self.n_steps)


def _trouble_line(event: StepDone) -> str:
    """A step that was skipped, or whose loss jumped."""
    if event.skipped:
        return f"  step {event.step:>5}  skipped: loss {event.loss:g}, gradient norm {event.gradient_norm:g}"
    return f"  step {event.step:>5}  the loss jumped to {event.loss:.4f}"


def _stage_line(event: StageStarted) -> str:
    stage: Stage = event.stage
    spec = stage.spec
    optimizer = spec.optimizer
    decay = f"weight decay {_by_part(optimizer.weight_decay)}"
    if optimizer.weight_decay and not optimizer.decay_norms_and_biases:
        decay += " (none on norms and biases)"
    state = f", {event.n_restored} of {event.n_owned} keep their optimizer state" if stage.index else ""
    host = " in the host's memory (device: cpu)" if optimizer.device == "cpu" else ""
    at_most = " at most" if spec.plateau else ""
    routes = "".join(f"\n  {_route_line(r)}" for r in stage.routes)
    local = "\n  every block's output has a loss of its own" if spec.local_loss != "none" else ""
    return (
        f"stage {stage.name}: {stage.selection} learn{state}\n"
        f"  {stage.n_steps} steps{at_most}, {optimizer.name}{host}, lr {_by_part(spec.lr)}, {decay}, "
        f"clip {spec.clip if spec.clip is not None else 'off'}"
        f"{', dropout off where nothing learns' if spec.frozen_dropout == 'off' else ''}{routes}{local}"
        + "".join(f"\n  note: {note}" for note in event.notes)
    )


def _compiled_line(event: StageCompiled) -> str:
    proof = event.proof
    made = f"{proof.n_graphs} new graph{'s' if proof.n_graphs > 1 else ''}" if proof.n_graphs else "no new graph"
    return (
        f"  compiled: {made} ({event.n_graphs} in all), warm-up {format_duration(proof.seconds)}; to the model "
        f"uncompiled the loss differs by {proof.loss_difference:.1e}, a gradient's norm by at most "
        f"{proof.gradient_difference:.1e}"
    )


def _route_line(route: Route) -> str:
    where = f" in layers {', '.join(map(str, route.layers))}" if route.layers else ""
    if route.mode == "stop":
        return f"gradients stop at {route.point}{where}"
    return (
        f"without {route.point}{where}: the saved model has this connection again, so plain transformers computes "
        "another function than the one trained here"
    )


def _by_part(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{v:g} ({k})" for k, v in value.items())
    return f"{value:g}"


def _ended_line(event: StageEnded, seconds: float) -> str:
    """How a stage ended, in one line."""
    stage, n_learning = event.stage, event.n_moved + len(event.unmoved)
    why = " at a plateau" if event.n_skipped else ""
    line = f"  stage {stage.name} ended{why}: {stage.n_steps} steps in {format_duration(seconds)}"
    line += f", {event.n_moved} of {n_learning} pieces moved"
    reasons = Counter(reason for _, reason in event.unmoved)
    line += "".join(f", {n} not: {reason}" for reason, n in reasons.items())
    if event.buffers_restored:
        line += f", {len(event.buffers_restored)} buffers put back"
    if event.lost_updates is not None:
        line += f"; {100 * event.lost_updates:.0f} % of the measured updates LOST to bf16 rounding"
    if event.following is not None:
        line += f"; {event.following.name} needs {format_bytes(event.following_bytes)} beside the weights"
    return line


def _measured_line(step: int, name: str, loss: float, bits_per_byte: float | None) -> str:
    perplexity = f"{math.exp(loss):,.2f}" if loss < 50 else "beyond e^50"
    bits = "" if bits_per_byte is None else f", {bits_per_byte:.3f} bits per byte"
    return f"  step {step:>5}  {name} loss {loss:.4f} (perplexity {perplexity}{bits})"
