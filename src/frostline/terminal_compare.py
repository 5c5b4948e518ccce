"""What a person sees of a comparison: its plan, its runs while they go on, what it came to. Renders; never computes.

Read `print_comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from frostline.engine import Event, Noted, RolledBack, RunStarted, StageEnded, StepDone
from frostline.experiment.compare import RunBegins, Told
from frostline.experiment.compare_measures import Outcome
from frostline.experiment.compare_results import Compared, Outlook
from frostline.experiment.compare_words import agreed, cost, interval, learning, mean_sd, run_line, verdict
from frostline.units import format_bytes, format_count, format_duration, format_flops

HOW = {"new": "", "finished": ", there already", "unfinished": ", going on", "failed": ", failed before"}


class ComparisonLines:
    """An observer of the runs of a comparison: the plan first, a bar on a terminal, one line per run everywhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.fields[run]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=None, run="", numbers="")
        self.outlooks: list[Outlook] = []
        self.begun: RunBegins | None = None
        self.n_steps = 0

    def __enter__(self) -> ComparisonLines:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, told: Told) -> None:
        """Show what `compare` tells."""
        match told:
            case Outlook():
                self.outlooks.append(told)
            case RunBegins():
                if self.begun is None:
                    self.console.print(plan_table(self.outlooks))
                self.begun = told
                text = f"{told.number} of {told.of}  {told.strategy}, seed {told.seed}"
                self.progress.reset(self.task, total=None, run=text, numbers="")
            case Outcome():
                assert self.begun is not None
                style = "red" if told.state == "failed" or told.audit == "failed" else None
                self.console.print(_outcome_line(told, self.begun), style=style, highlight=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        """Move the bar."""
        match event:
            case RunStarted():
                self.n_steps = event.schedule.n_steps
                self.progress.update(self.task, total=self.n_steps, completed=event.done)
            case StepDone():
                speed = f"{event.n_targets / event.seconds:,.0f} tokens/s" if event.seconds else ""
                self.progress.update(self.task, completed=event.step, numbers=f"loss {event.loss:.3f}  {speed}")
            case Noted() if event.is_warning:
                self._warn(event.text.strip())
            case RolledBack():
                self._warn(f"{event.why}: back to step {event.to}")
            case StageEnded():
                self.n_steps -= event.n_skipped
                self.progress.update(self.task, total=self.n_steps)

    def _warn(self, text: str) -> None:
        run = f"{self.begun.strategy}, seed {self.begun.seed}: " if self.begun else ""
        self.console.print(run + text, style="yellow", highlight=False, soft_wrap=True)


def _outcome_line(outcome: Outcome, begun: RunBegins) -> str:
    width = len(str(begun.of))
    where = f"[{begun.number:>{width}}/{begun.of}] {outcome.strategy}, seed {outcome.seed}"
    return f"{where}: {run_line(outcome)}{HOW[begun.standing]}"


def plan_table(outlooks: Sequence[Outlook]) -> Table:
    """What each strategy trains, and what that will cost."""
    table = Table(title="strategies", title_justify="left", title_style="")
    table.add_column("strategy", overflow="fold")
    table.add_column("learns", overflow="fold")
    for column in ("steps", "learning parameters", "FLOPs planned", "peak planned"):
        table.add_column(column, justify="right")
    for o in outlooks:
        shown = o.stages[:4]
        more = [f"… {len(o.stages) - 4} more stages"] if len(o.stages) > 4 else []
        table.add_row(
            o.name,
            "\n".join([learn for _, learn, _, _ in shown] + more),
            "\n".join(f"{n:,}" for _, _, n, _ in shown),
            "\n".join(format_count(n) for _, _, _, n in shown),
            format_flops(o.planned_flops) if o.planned_flops else "–",
            format_bytes(o.planned_peak_bytes) if o.planned_peak_bytes else "–",
        )
    return table


def print_comparison(console: Console, compared: Compared) -> None:
    """What a comparison came to."""
    console.print(_loss_table(compared))
    if any(s.equal_flops or s.equal_steps for s in compared.strategies):
        console.print(_equal_table(compared))
    console.print(_cost_table(compared))
    if compared.budget:
        console.print(f"budget: {compared.budget}", soft_wrap=True, highlight=False)
    for note in compared.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    for outcome in (o for s in compared.strategies for o in s.outcomes if o.why):
        text = f"{outcome.strategy}, seed {outcome.seed}: {outcome.why}"
        console.print(text, style="red", soft_wrap=True, highlight=False)


def _loss_table(compared: Compared) -> Table:
    table = Table(title=f"held-out loss at the end, against {compared.baseline}", title_justify="left", title_style="")
    table.add_column("strategy", overflow="fold")
    table.add_column("runs", justify="right")
    table.add_column("mean ± sd", justify="right")
    table.add_column("by seed", justify="right", overflow="fold")
    table.add_column("best on the way", justify="right")
    table.add_column("difference, 95 % interval", justify="right")
    table.add_column("")
    for s in compared.strategies:
        by_seed = " ".join(f"{s.losses[seed]:.4f}" if seed in s.losses else "–" for seed in compared.seeds)
        table.add_row(
            s.outlook.name,
            f"{s.loss.n} of {len(s.outcomes)}",
            mean_sd(s.loss),
            by_seed,
            mean_sd(s.best),
            interval(s.difference),
            verdict(s, compared),
        )
    return table


def _equal_table(compared: Compared) -> Table:
    title = "held-out loss when both had spent what the cheaper one spent in all"
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("strategy", overflow="fold")
    table.add_column("at", justify="right")
    table.add_column("mean ± sd", justify="right")
    table.add_column(compared.baseline, justify="right")
    table.add_column("difference, 95 % interval", justify="right")
    table.add_column("")
    for s in compared.strategies:
        for equal in (s.equal_steps, s.equal_flops):
            if equal is not None:
                row = (mean_sd(equal.own), mean_sd(equal.baseline), interval(equal.difference))
                table.add_row(s.outlook.name, cost(equal), *row, equal.difference.verdict)
    return table


def _cost_table(compared: Compared) -> Table:
    table = Table(title="cost of one run, measured", title_justify="left", title_style="")
    table.add_column("strategy", overflow="fold")
    for column in (
        "learning parameters",
        "tokens",
        "FLOPs",
        "as planned",
        "peak of tensors",
        "of planned",
        "time",
        "tokens/s",
    ):
        table.add_column(column, justify="right")
    for s in compared.strategies:
        table.add_row(
            s.outlook.name,
            learning(s.outlook),
            format_count(round(s.tokens)) if s.tokens else "–",
            format_flops(s.flops) if s.flops else "–",
            agreed(s),
            format_bytes(s.peak_bytes) if s.peak_bytes else "–",
            f"{s.peak_ratio:.3f}" if s.peak_ratio else "–",
            format_duration(s.seconds.mean) if s.seconds.mean is not None else "–",
            f"{s.tokens_per_s.mean:,.0f}" if s.tokens_per_s.mean is not None else "–",
        )
    return table
