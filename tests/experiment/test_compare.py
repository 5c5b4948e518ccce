"""Comparisons: what is refused before anything is trained, what a second call does, and whether the statistics are."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

import frostline
from frostline.cli import app
from frostline.engine import StepDone
from frostline.errors import FrostlineError, RecipeError, RunFolderError
from frostline.experiment.compare import RunBegins, compare
from frostline.experiment.compare_measures import Clock, Measures, Outcome, Point, measured
from frostline.experiment.compare_results import Compared, Outlook, equal_cost, evaluate
from frostline.experiment.compare_words import comparison_markdown
from frostline.experiment.comparison_page import write_comparison
from frostline.experiment.statistics import paired, t_quantile
from frostline.recipe import Comparison, dump_yaml, load_comparison, shipped_comparisons

SMALL = {**tiny.SMALL, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}


def base(folder: Path) -> dict[str, Any]:
    """A recipe of one short stage, its text in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "model": {"architecture": "llama", **SMALL},
        "data": {"train": str(tiny.write_text(folder / "text.txt", n_words=1500)), "length": 16, "batch": 4},
        "stages": [{"learn": "all", "steps": 4, "lr": 3e-3}],
        "eval": {"batches": 2, "every": 2},
        "device": "cpu",
    }


FFN = {"stages[0].learn": "ffn"}


def write(folder: Path, strategies: Any = None, **more: Any) -> Path:
    """A comparison file beside its recipe."""
    (folder / "base.yaml").write_text(dump_yaml(base(folder)))
    strategies = {"all": [], "ffn": FFN} if strategies is None else strategies
    values = {"recipe": "base.yaml", "seeds": 2, "strategies": strategies, **more}
    (folder / "compared.yaml").write_text(json.dumps(values, indent=1))  # which is YAML too
    return folder / "compared.yaml"


@pytest.fixture(autouse=True)
def _no_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_plans" not in request.keywords:  # they take most of so short a run's time
        for module in ("frostline.ready", "frostline.experiment.compare"):
            monkeypatch.setattr(f"{module}.plan_of", lambda *_, **__: None)


def determined(compared: Compared) -> dict[str, Any]:
    """What the seeds determine of a comparison: all but the clocks."""
    data = json.loads(json.dumps(compared.to_json()))
    for s in data["strategies"]:
        for key in ("seconds", "tokens_per_s"):
            del s[key]
        for outcome in s["outcomes"]:
            outcome["measures"].pop("clock")
    return data  # type: ignore[no-any-return]


# --- the statistics, against closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_students_quantile_is_that_of_the_closed_forms(confidence: float) -> None:
    c = confidence
    four = math.cos(math.acos(math.sqrt(1 - c * c)) / 3) / math.sqrt(1 - c * c)  # Shaw (2006), four degrees of freedom
    assert t_quantile(c, 1) == pytest.approx(math.tan(math.pi * c / 2), rel=1e-9)
    assert t_quantile(c, 2) == pytest.approx(c * math.sqrt(2 / (1 - c * c)), rel=1e-9)
    assert t_quantile(c, 4) == pytest.approx(2 * math.sqrt(four - 1), rel=1e-9)
    z = statistics.NormalDist().inv_cdf((1 + c) / 2)
    assert t_quantile(c, 9999) == pytest.approx(z + (z**3 + z) / (4 * 9999), rel=1e-7)


def test_the_interval_of_three_seeds_is_that_of_the_closed_form() -> None:
    own, baseline = {0: 4.0, 1: 5.0, 2: 6.5}, {2: 6.0, 0: 3.9, 1: 4.8}
    found = paired(own, baseline)
    mean, sd = 0.8 / 3, math.sqrt(((0.1 - 0.8 / 3) ** 2 + (0.2 - 0.8 / 3) ** 2 + (0.5 - 0.8 / 3) ** 2) / 2)
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * sd / math.sqrt(3)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert found.verdict == "not told apart", "the seeds agree about the sign, and the interval still holds zero"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        seeds = rng.normal(5, 1, 4)  # what seeds share is gone from paired differences
        found = paired(dict(enumerate(seeds + rng.normal(0.3, 0.1, 4))), dict(enumerate(seeds)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


@pytest.mark.parametrize(
    ("differences", "verdict", "why"),
    [
        ((0.5, 0.5001), "not told apart", "2 pairs of seeds: too few"),
        ((0.5,), "not told apart", "1 pair of seeds: too few"),
        ((0.5, 0.5, 0.5), "not told apart", "no spread"),
        ((0.5, 0.51, 0.49), "worse", ""),
        ((-0.5, -0.51, -0.49), "better", ""),
        ((0.5, -0.4, 0.3), "not told apart", ""),
    ],
)
def test_nothing_is_told_apart_by_too_few_seeds_or_by_an_interval_that_holds_zero(
    differences: tuple[float, ...], verdict: str, why: str
) -> None:
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert found.verdict == verdict
    assert why in found.why
    assert (found.low is None) == bool(why)


def outcome(name: str, seed: int, per_step: int, losses: list[float]) -> Outcome:
    """A run that measured a loss at every step."""
    curve = tuple(Point(step=i, flops=i * per_step, loss=v) for i, v in enumerate(losses))
    flops = (len(losses) - 1) * per_step
    measures = Measures(
        steps=len(losses) - 1,
        skipped=0,
        tokens=8,
        curve=curve,
        learning=(1,),
        flops=flops,
        planned_flops=flops,
        peak_bytes=1,
        planned_peak_bytes=1,
        made_with={"torch": "2.10"},
        clock=Clock(seconds=1, tokens_per_s=8),
    )
    return Outcome(strategy=name, seed=seed, state="finished", audit="passed", measures=measures)


def test_at_equal_flops_the_dearer_one_stands_between_two_of_its_measurements() -> None:
    spread = (0.0, 0.001, -0.001)
    cheap = [outcome("cheap", i, 2, [5, 4 + s, 3.5 + s]) for i, s in enumerate(spread)]
    dear = [outcome("dear", i, 3, [5, 3.9, 2.9]) for i in range(3)]
    found = equal_cost(cheap, dear, "flops")
    assert found is not None
    assert (found.spent, found.between) == (4, (3, 6))
    assert found.baseline.mean == pytest.approx(3.9 - 1 / 3)
    assert found.difference.mean == pytest.approx(3.5 - (3.9 - 1 / 3))
    assert found.difference.verdict == "not told apart", "against 3.9 it is better, against 2.9 worse"
    assert "between two measurements" in found.difference.why
    clear = equal_cost([outcome("cheap", i, 2, [5, 4, 1 + s]) for i, s in enumerate(spread)], dear, "flops")
    assert clear is not None
    assert clear.difference.verdict == "better"
    assert equal_cost(cheap, dear, "steps") is None, "they have the same number of steps"


def test_runs_that_failed_are_left_out_and_said_so() -> None:
    looks = [
        Outlook(name=n, changes=(), stages=(("s", "all", 2, 1),), planned_flops=1, planned_peak_bytes=1, held_out=h)
        for n, h in (("a", "x"), ("b", "x"), ("c", "y"))
    ]
    runs = {(n, s): outcome(n, s, 1, [5, 4 + s / 10 + k]) for k, n in enumerate("abc") for s in range(3)}
    elsewhere = runs["a", 0].measures
    assert elsewhere is not None
    runs["a", 0] = replace(runs["a", 0], measures=replace(elsewhere, made_with={"torch": "2.9"}))
    runs["b", 1] = replace(runs["b", 1], audit="failed", why="audit failed: …")
    found = evaluate(looks, runs, name="x", baseline="a", seeds=(0, 1, 2))
    b, c = found.of("b"), found.of("c")
    assert b.difference is not None
    assert (b.loss.n, sorted(b.difference.by_seed)) == (2, [0, 2])
    assert (b.difference.low, b.difference.verdict) == (None, "not told apart")
    assert c.difference is None
    assert not found.sound
    said = " ".join(found.notes)
    assert "not all made alike: torch (2.9, 2.10)" in said
    assert "b: 1 of 3 runs are not in the statistics" in said
    assert "c is measured on other held-out tokens" in said


# --- the file -------------------------------------------------------------------------------------------------------


REFUSED = {
    "no seed": ({"seeds": []}, "compared.yaml:.*seeds: there must be at least one seed; the list is empty"),
    "zero seeds": ({"seeds": 0}, "there must be at least one seed"),
    "seeds twice": ({"seeds": [1, 2, 1]}, "1 is given twice"),
    "a negative seed": ({"seeds": [-1]}, "a seed is a whole number from 0"),
    "words for seeds": ({"seeds": "three"}, "write a list of whole numbers, or how many"),
    "another key": ({"sedes": 3}, "unknown key 'sedes'. Did you mean 'seeds'"),
    "no such baseline": ({"baseline": "al"}, "no strategy is named 'al'; there are all, ffn"),
    "no strategies": ({"strategies": {}}, "strategies"),
    "names alike": ({"strategies": {"a": [], "A": FFN}}, "'a' and 'A' differ in case alone"),
    "a name that is a path": ({"strategies": {"../a": []}}, "cannot be the name of a strategy"),
    "the same twice": ({"strategies": {"a": FFN, "b": ["stages[0].learn=ffn"]}}, "'a' and 'b' are the same recipe"),
    "changes of no kind": ({"strategies": {"a": 3}}, "'a': write keys to change"),
    "a wrong key": ({"strategies": {"a": {"stages[0].lern": "ffn"}}}, r"'a': .*compared.yaml:\d+.*'stages\[0\].lern'"),
    "no such stage": ({"strategies": {"a": ["stages[3].lr=1"]}}, r"'a': .*:\d+: stages\[3\].lr=1: index 3 is out of"),
    "a wrong value": ({"strategies": {"a": {"stages[0].lr": -1}}}, r"'a': .*compared.yaml:\d+"),
    "a seed of its own": ({"strategies": {"a": ["seed=3"]}}, "the seeds are those of the comparison"),
    "no such recipe": ({"recipe": "bse.yaml"}, "no recipe at"),
    "no such file": ({"strategies": {"a": "other.yaml"}}, "'a': no recipe at"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_comparison_is_refused_with_the_place(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_comparison(write(tmp_path, **changes), out=tmp_path / "out")
    assert re.search(said, str(caught.value)), str(caught.value)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text("recipe: base.yaml\nstrategies:\n  a: []\n  a: ['stages[0].learn=ffn']\n")
    with pytest.raises(RecipeError, match=r"compared.yaml:4.*duplicate key"):
        load_comparison(path, out=tmp_path / "out")


def test_keys_a_list_and_a_recipe_of_its_own_say_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, {"keys": FFN, "other": []})
    stages = [{"learn": "ffn", "steps": 4, "lr": 3e-3}]
    (tmp_path / "own.yaml").write_text(dump_yaml({**base(tmp_path), "stages": stages}))
    wanted = load_comparison(path, out=tmp_path).strategies[0].recipe
    for written in (["stages[0].learn=ffn"], "own.yaml", {"stages": stages}):
        path = write(tmp_path, {"x": written, "other": []})
        assert load_comparison(path, out=tmp_path).strategies[0].recipe == wanted


def test_a_schedule_stands_in_place_of_stages_and_a_set_comes_before_a_strategy(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"turns": {"schedule": {"name": "alternate", "every": 1, "steps": 2, "lr": 1e-3}}, "b": {"data.batch": 2}},
        set={"data.batch": 8},
    )
    turns, b = load_comparison(path, out=tmp_path, overrides=["eval.batches=1"]).strategies
    assert turns.recipe.schedule is not None
    assert (turns.recipe.stages, turns.recipe.data.batch) == ((), 8)
    assert (b.recipe.data.batch, b.recipe.eval.batches) == (2, 1)


def test_paths_are_relative_to_the_file_and_those_of_set_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, {"a": {"data.train": "text.txt"}, "b": {"data.train": "../x.txt"}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    a, b = load_comparison(path, out=tmp_path, overrides=["data.held_out=[here.txt]"]).strategies
    assert a.recipe.data.train == (str(tmp_path / "text.txt"),)
    assert b.recipe.data.train == (str(tmp_path.parent / "x.txt"),)
    assert a.recipe.data.held_out == (str(tmp_path / "elsewhere" / "here.txt"),)


def test_the_packages_comparisons_are_read_and_train_on_a_corpus_beside_the_runs(tmp_path: Path) -> None:
    assert "scratch-ffn" in shipped_comparisons()
    for name in shipped_comparisons():
        found = load_comparison(name, out=tmp_path / "out", seeds=[4])
        assert found.corpus == tmp_path / "out" / "corpus"
        assert {s.recipe.data.train for s in found.strategies} == {(str(found.corpus),)}
        assert (found.seeds, found.strategies[0].recipe.seed) == ((4,), 4)
        assert load_comparison(name, out=tmp_path, overrides=["data.train=mine.txt"]).corpus is None


# --- the runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compared, list[Any]]:
    """A comparison over two seeds, planned, with everything that was told of it."""
    folder = tmp_path_factory.mktemp("whole")
    told: list[Any] = []
    found = compare(write(folder), out=folder / "out", tell=told.append)
    return folder, found, told


@pytest.mark.with_plans
def test_runs_are_ordinary_ones_and_seeds_take_turns_outside(whole: tuple[Path, Compared, list[Any]]) -> None:
    folder, found, told = whole
    order = [(t.strategy, t.seed) for t in told if isinstance(t, RunBegins)]
    assert order == [(n, s) for s in range(2) for n in ("all", "ffn")]
    assert found.finished
    assert found.sound
    for name, seed in order:
        run = folder / "out" / "runs" / name / f"seed-{seed}"
        assert frostline.audit(run).passed
        assert frostline.load_recipe(run / "recipe.yaml").seed == seed


@pytest.mark.with_plans
def test_the_numbers_are_those_of_the_run_folders(whole: tuple[Path, Compared, list[Any]]) -> None:
    folder, found, _ = whole
    ends: dict[str, list[float]] = {}
    for name in ("all", "ffn"):
        for seed in range(2):
            lines = (folder / "out" / "runs" / name / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
            losses = [r["held_out_loss"] for r in map(json.loads, lines) if "held_out_loss" in r]
            ends.setdefault(name, []).append(losses[-1])
    ffn = found.of("ffn")
    assert ffn.loss.mean == pytest.approx(statistics.fmean(ends["ffn"]))
    assert ffn.loss.sd == pytest.approx(statistics.stdev(ends["ffn"]))
    assert ffn.difference is not None
    assert list(ffn.difference.by_seed.values()) == pytest.approx(np.subtract(ends["ffn"], ends["all"]).tolist())
    written = json.loads((folder / "out" / "comparison.json").read_text())
    assert written["strategies"][1]["difference"]["mean"] == ffn.difference.mean


@pytest.mark.with_plans
def test_what_a_strategy_costs_is_what_the_plan_said(whole: tuple[Path, Compared, list[Any]]) -> None:
    _, found, _ = whole
    everything, ffn = found.of("all"), found.of("ffn")
    for s in (everything, ffn):
        assert s.flops_as_planned is True
        assert s.flops == s.outlook.planned_flops
        assert s.peak_ratio == pytest.approx(1, abs=0.05)
    assert ffn.flops is not None
    assert everything.flops is not None
    assert ffn.flops < everything.flops
    assert ffn.equal_flops is not None
    assert ffn.equal_flops.spent == ffn.flops
    assert ffn.equal_steps is None


@pytest.mark.with_plans
def test_the_page_is_whole_escaped_and_asks_the_network_for_nothing(
    whole: tuple[Path, Compared, list[Any]], tmp_path: Path
) -> None:
    folder, found, _ = whole
    evil = "<script>alert(1)</script>"
    shutil.copytree(folder / "out", tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    page = write_comparison(replace(found, budget=evil, name=evil), tmp_path / "out")
    assert page is not None
    text = page.read_text(encoding="utf-8")
    assert evil not in text
    assert "&lt;script&gt;" in text
    assert text.count("<svg") == text.count("</svg>") == 3
    assert not re.search(r"<(script|link|img|iframe)|(src|href)=[\"'](https?:)?//", text)
    for word in ("Every run finished and passed its audit", "At equal cost", "exactly", "seed 1", "paired by seed"):
        assert word in text


@pytest.mark.with_plans
def test_the_markdown_table_has_a_row_for_every_strategy(whole: tuple[Path, Compared, list[Any]]) -> None:
    head, rule, everything, ffn = comparison_markdown(whole[1]).splitlines()
    assert {row.count("|") for row in (head, rule, everything, ffn)} == {8}
    assert "| baseline |" in everything
    assert re.match(r"\| ffn \| 2 of 2 \| \d\.\d{4} ± \d\.\d{4} \| [+-]\d.* not told apart \|", ffn)


def test_a_second_call_trains_nothing_and_says_the_same(tmp_path: Path) -> None:
    path, steps = write(tmp_path, seeds=1), []
    first = compare(path, out=tmp_path / "out")
    told: list[Any] = []
    watch = [lambda e: steps.append(e) if isinstance(e, StepDone) else None]
    again = compare(path, out=tmp_path / "out", observers=watch, tell=told.append)
    assert again == first
    assert not steps
    assert {t.standing for t in told if isinstance(t, RunBegins)} == {"finished"}
    more = compare(path, out=tmp_path / "out", seeds=[0, 7], baseline="ffn", observers=watch)
    assert len(steps) == 2 * 4, "the new seed alone"
    assert (more.baseline, more.of("ffn").difference) == ("ffn", None)
    assert {s: v for s, v in more.of("ffn").losses.items() if s == 0} == first.of("ffn").losses


@pytest.mark.parametrize("at", [1, 6])
def test_a_comparison_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path, at: int) -> None:
    path, steps = write(tmp_path, seeds=1), []

    def interrupt(event: Any) -> None:
        steps.extend([event] if isinstance(event, StepDone) else [])
        if isinstance(event, StepDone) and len(steps) == at:
            signal.raise_signal(signal.SIGINT)

    cut = compare(path, out=tmp_path / "out", observers=[interrupt])
    assert len(steps) == at
    assert not cut.finished
    assert cut.sound
    states = [o.state for s in cut.strategies for o in s.outcomes]
    assert states.count("interrupted") == 1
    assert states.count("finished") == (at - 1) // 4
    on = compare(path, out=tmp_path / "out")
    uninterrupted = compare(path, out=tmp_path / "other")
    assert determined(on) == determined(uninterrupted)


def test_a_signal_between_two_runs_is_not_lost(tmp_path: Path) -> None:
    seen = []

    def interrupt(told: Any) -> None:
        if isinstance(told, Outcome):
            seen.append(told)
            signal.raise_signal(signal.SIGTERM)

    assert not compare(write(tmp_path), out=tmp_path / "out", tell=interrupt).finished
    assert [o.state for o in seen] == ["finished"]


def test_a_changed_recipe_is_refused_with_the_run_and_the_key_before_anything_is_trained(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=1)
    compare(path, out=tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "runs" / "ffn")
    with pytest.raises(RunFolderError) as caught:
        compare(path, out=tmp_path / "out", overrides=["stages[0].lr=1e-3"])
    assert "runs/all/seed-0 is of another recipe" in str(caught.value)
    assert "stages[0].lr: 0.003 → 0.001" in str(caught.value)
    assert not (tmp_path / "out" / "runs" / "ffn").exists()
    tiny.write_text(tmp_path / "text.txt", seed=1)
    with pytest.raises(RunFolderError, match="data or base model: other bytes"):
        compare(path, out=tmp_path / "out")


def test_a_comparison_that_was_moved_with_its_data_goes_on(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    path = write(tmp_path / "there", seeds=1)
    first = compare(path, out=path.parent / "out")
    shutil.move(path.parent, tmp_path / "here")
    recipe = base(tmp_path / "here")
    (tmp_path / "here" / "base.yaml").write_text(dump_yaml(recipe))
    assert determined(compare(tmp_path / "here" / path.name, out=tmp_path / "here" / "out")) == determined(first)


def test_a_run_that_fails_does_not_end_the_others_and_is_not_tried_again_in_vain(tmp_path: Path) -> None:
    path = write(tmp_path, {"all": [], "wild": {"stages[0].lr": 1e30, "stages[0].clip": None}}, seeds=1)
    found = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 1, found.output
    data = json.loads(found.stdout)
    everything, wild = data["strategies"]
    assert [o["state"] for o in everything["outcomes"]] == ["finished"]
    assert [o["state"] for o in wild["outcomes"]] == ["failed"]
    assert all("not finite" in o["why"] for o in wild["outcomes"])
    steps: list[Any] = []
    watch = [lambda e: steps.append(e) if isinstance(e, StepDone) else None]
    again = compare(path, out=tmp_path / "out", observers=watch)
    assert not steps
    assert [o.why for o in again.of("wild").outcomes] == [o["why"] for o in wild["outcomes"]]


def test_a_run_folder_that_was_tampered_with_fails_its_audit_and_shows(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=1)
    compare(path, out=tmp_path / "out")
    boundary = tmp_path / "out" / "runs" / "ffn" / "seed-0" / "evidence" / "boundary-1.json"
    record = json.loads(boundary.read_text())
    piece = next(n for n in record["hashes"] if "embed" in n)
    record["hashes"][piece] = "0" * 64
    boundary.write_text(json.dumps(record))
    result = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search(r"ffn, seed 0: .*audit failed: .*embed", result.output)
    assert "0 of 1" in result.output
    assert "audit failed" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_run_killed_before_it_began_is_made_anew_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    path, run = write(tmp_path, seeds=1), tmp_path / "out" / "runs" / "all" / "seed-0"
    (run / "evidence").mkdir(parents=True)
    (run / "status.json").write_text("{}")
    (tmp_path / "out" / "comparison.yaml").write_text(path.read_text())
    assert compare(path, out=tmp_path / "out").sound
    shutil.rmtree(run)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"something is there: notes\.txt"):
        compare(path, out=tmp_path / "out")


def test_what_is_wrong_with_any_strategy_is_said_before_anything_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, {"all": [], "typo": ["stages[0].learn=fnn"]})
    result = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "strategy 'typo'" in result.output
    assert "fnn" in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(RunFolderError, match="holds something else"):
        compare(write(tmp_path), out=tmp_path / "out")
    compare(write(tmp_path, {"a": []}, seeds=1), out=tmp_path / "first")
    with pytest.raises(RunFolderError, match="another comparison, of the strategies a"):
        compare(write(tmp_path, {"b": FFN}, seeds=1), out=tmp_path / "first")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_interrupted_command_ends_with_75_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.terminal_compare import ComparisonLines

    original = ComparisonLines.__call__

    def interrupt(self: Any, event: Any) -> None:
        original(self, event)
        if isinstance(event, StepDone):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ComparisonLines, "__call__", interrupt)
    result = CliRunner().invoke(app, ["compare", str(write(tmp_path)), "--out", str(tmp_path / "out")])
    assert result.exit_code == 75
    assert "go on with the same command: frostline compare" in result.output
    assert (tmp_path / "out" / "comparison.html").exists()


@pytest.mark.parametrize("seeds", ["three", "", "1,x"])
def test_seeds_on_the_command_line_are_numbers(tmp_path: Path, seeds: str) -> None:
    result = CliRunner().invoke(app, ["compare", "scratch-ffn", "--out", str(tmp_path / "out"), "--seeds", seeds])
    assert result.exit_code == 2
    assert "write how many (3), or which (0,3,7)" in result.output


def test_the_public_function_takes_what_was_loaded(tmp_path: Path) -> None:
    loaded = load_comparison(write(tmp_path, seeds=1), out=tmp_path / "out")
    assert isinstance(loaded, Comparison)
    found = frostline.compare(loaded, out=tmp_path / "out")
    assert found.of("ffn").loss.n == 1
    assert measured(tmp_path / "out" / "runs" / "ffn" / "seed-0").steps == 4
    with pytest.raises(FrostlineError, match="no comparison at"):
        frostline.compare(tmp_path / "nothing.yaml", out=tmp_path / "x")
