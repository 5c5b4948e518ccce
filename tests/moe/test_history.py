"""The load of experts over a run: what is read off it, what the page and the command line say of it."""

from __future__ import annotations

import json
import math

import pytest
import tiny
from typer.testing import CliRunner

import frostline
from frostline.cli import app
from frostline.experiment.experts_section import BINS, MAX_LAYERS, experts_section
from frostline.experiment.report import write_report
from frostline.moe import histories, histories_to_json
from frostline.run_folder import RunFolder


def history(loads, dropped=None):
    rows = [{"step": i + 1, "stage": 0, "load": {"layers[0].ffn": load}} for i, load in enumerate(loads)]
    for row, n in zip(rows, dropped or [], strict=False):
        row["dropped"] = {"layers[0].ffn": n}
    return histories(rows)[0]


def test_the_largest_share_is_that_of_the_last_fifth_alone():
    found = history([[4, 0, 0, 0]] * 8 + [[1, 1, 1, 1], [3, 1, 0, 0]])
    assert found.largest_share == 4 / 8
    assert found.balanced
    assert not history([[4, 0, 0, 0]] * 8 + [[1, 1, 1, 1], [4, 0, 0, 0]]).balanced
    assert history([[5, 1]]).largest_share == 5 / 6


def test_entropy_is_1_in_balance_and_0_on_one_expert():
    assert history([[2, 2, 2, 2], [8, 0, 0, 0], [4, 4, 0, 0]]).entropies() == pytest.approx(
        (1, 0, math.log(2) / math.log(4))
    )


def test_experts_never_used_and_dropped_choices_are_those_of_the_whole_run():
    found = history([[4, 0, 0, 0], [0, 4, 0, 0]], dropped=[1, 2])
    assert found.never == (2, 3)
    assert found.dropped_share == 3 / 8
    assert histories_to_json([found])[0]["dropped_share"] == 3 / 8


def test_steps_that_a_run_went_back_from_do_not_count():
    rows = [{"step": i, "load": {"a": [i, 0]}} for i in (1, 2, 3)]
    rows += [{"step": 4, "rolled_back_to": 1}, {"step": 2, "load": {"a": [0, 9]}}]
    (found,) = histories(rows)
    assert (found.steps, found.load) == ((1, 2), ((1, 0), (0, 9)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    stages = [
        {"name": "warm", "learn": "router", "steps": 2, "lr": 1e-3, "moe": {"z": 0.001}},
        {"name": "all", "learn": "experts | router", "steps": 3, "lr": 1e-2, "moe": {"capacity": 1.0}},
    ]
    frostline.train(tiny.recipe(folder, "mixtral", stages=stages), out=folder / "run")
    return folder / "run"


def test_likeness_is_written_at_the_start_and_at_every_stages_end(run):
    rows = [json.loads(line) for line in (run / "evidence" / "likeness.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 2, 5]
    assert rows[0]["sites"] == rows[1]["sites"]  # experts were frozen
    assert rows[2]["sites"] != rows[1]["sites"]
    assert {x["identical"] for r in rows for x in r["sites"].values()} == {0}


def test_the_command_prints_the_load_of_a_run(run):
    said = CliRunner().invoke(app, ["experts", str(run)])
    assert (said.exit_code, "load in training, 5 steps" in said.output) == (0, True)
    data = json.loads(CliRunner().invoke(app, ["experts", str(run), "--json"]).stdout)
    assert [s["site"] for s in data["sites"]] == [f"layers[{i}].ffn" for i in range(3)]
    assert all(sum(s["shares_last_fifth"]) == pytest.approx(1) for s in data["sites"])
    assert any(s["dropped_share"] > 0 for s in data["sites"])


def test_a_run_without_experts_has_no_load(run, tmp_path):
    frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    said = CliRunner().invoke(app, ["experts", str(tmp_path / "run")])
    assert (said.exit_code, "give a text to measure (--data)" in said.output) == (2, True)
    said = CliRunner().invoke(app, ["experts", str(run), "--top", "2"])
    assert (said.exit_code, "give --data" in said.output) == (2, True)
    assert "Who got the tokens" not in write_report(tmp_path / "run").read_text()


def test_the_page_shows_load_entropy_dropped_choices_and_likeness(run):
    page = write_report(run).read_text()
    for text in ("<h2>Experts</h2>", "Who got the tokens", "Entropy of each layer", "largest share", " %</td>"):
        assert text in page
    assert "identical to the bit" not in page


class Drawn:
    """Stands in for the figures: keeps what it is given."""

    def __init__(self):
        self.given = {}

    def load_over_time(self, sites, *, description):
        self.given["load"] = sites
        return description

    def entropy_over_time(self, sites, *, description):
        self.given["entropy"] = sites
        return description


def section(tmp_path, loads, likeness):
    folder = RunFolder.create(tmp_path / "run")
    for i, load in enumerate(loads):
        folder.append(folder.load, {"step": i + 1, "stage": 0, "load": load})
    for step, sites in likeness:
        folder.append(folder.likeness, {"step": step, "sites": sites})
    drawn = Drawn()
    return experts_section(folder, drawn), drawn.given


def alike(identical):
    return {"smallest": 1.0, "mean": 1.0, "largest": 1.0, "identical": identical}


def test_the_page_warns_of_identical_uneven_and_unused_experts(tmp_path):
    loads = [{"layers[0].ffn": [9, 1, 0, 0], "layers[1].ffn": [3, 3, 3, 1]}] * 5
    names = ("layers[0].ffn", "layers[1].ffn")
    page, _ = section(
        tmp_path, loads, [(0, dict.fromkeys(names, alike(6))), (5, {names[0]: alike(0), names[1]: alike(6)})]
    )
    identical, uneven, never = page["warnings"]
    assert identical.startswith("layers[1].ffn: experts are still identical")
    assert uneven.startswith("layers[0].ffn: one expert had more than 2/N")
    assert never.startswith("layers[0].ffn (2, 3): experts that no token")


def test_many_steps_and_layers_are_drawn_in_few_columns_and_strips(tmp_path):
    loads = [{f"layers[{i}].ffn": [2, 2] for i in range(20)}] * 130
    page, drawn = section(tmp_path, loads, [])
    assert page["hidden"] == 20 - MAX_LAYERS
    name, steps, columns = drawn["load"][-1]
    assert (name, steps, len(columns), set(columns)) == ("layers[19].ffn", (1, 130), BINS, {(1.0, 1.0)})
    assert drawn["entropy"][0][0] == "layers[0].ffn"
