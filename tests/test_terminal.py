"""What a person reads is what was said: the lines of a run, and texts that look like a terminal's own language."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import tiny
from rich.console import Console
from rich.table import Table

from frostline.cli.app import make_console
from frostline.engine import StageStarted
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select
from frostline.terminal_progress import ProgressLines


def stage_line(**optimizer: Any) -> str:
    """What is printed when a stage begins."""
    spec = StageSpec(learn="ffn", steps=3, lr=1e-3, optimizer={"name": "adamw", **optimizer})
    stage = Schedule.of([("only", spec, select(tiny.anatomy("llama"), "ffn"))]).stages[0]
    said = StringIO()
    with ProgressLines(Console(file=said, width=300)) as lines:
        lines(StageStarted(stage=stage, n_restored=0, n_owned=1))
    return said.getvalue()


def test_a_stages_line_says_where_its_optimizer_works() -> None:
    assert "  3 steps, adamw in the host's memory (device: cpu), lr 0.001, " in stage_line(device="cpu")
    assert "  3 steps, adamw, lr 0.001, " in stage_line()


def test_what_is_printed_stays_as_it_is_in_lines_and_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["experts[top 4 by tokens]", "heads[i] | x[/a]", "data/[old]/:smile:.txt", "a[red]"]
    console = make_console()
    table = Table("part")
    for text in texts:
        console.print(text, highlight=False)
        table.add_row(text)
    console.print(table)
    said = capsys.readouterr().out
    assert [said.count(text) for text in texts] == [2] * len(texts)
