"""Runs whose selections are decided by use or by a file: measured once, kept, checked, and gone on with."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from typer.testing import CliRunner

from frostline.audit import audit
from frostline.choices import FILE, read_choice
from frostline.cli import app
from frostline.engine import StepDone
from frostline.errors import RecipeError, RunFolderError
from frostline.prepared import prepare, unresolved
from frostline.recipe import dump_yaml, load_recipe
from frostline.resume import resume
from frostline.run import train
from frostline.run_folder import RunFolder
from frostline.selection import select

RANKED = "experts[top 1 by tokens] | layers[0].ffn.experts[cover 0.6 by gate]"


def recipe(folder, *learn):
    stages = [{"learn": text, "steps": 2, "lr": 1e-2} for text in learn]
    return tiny.recipe(folder, "mixtral", stages=stages)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    return train(recipe(folder, "router", RANKED), out=folder / "run")


def choice_of(run):
    return json.loads((run.folder / FILE).read_text())


def failed(run_folder):
    return [e.claim for e in audit(run_folder).evidence if not e.passed]


def test_a_ranking_is_measured_on_the_training_data_and_kept_as_a_plain_selection(run):
    choice = choice_of(run)
    sites = {s["site"]: s for s in choice["measurement"]["sites"]}
    busiest = {name: max(range(4), key=lambda e, s=s: (s["load"][e], -e)) for name, s in sites.items()}
    first = " | ".join(f"{name}.experts[{e}]" for name, e in busiest.items())
    assert choice["plain"][RANKED].startswith(f"({first}) | (layers[0].ffn.experts[")
    assert choice["measurement"]["n_tokens"] == sum(sites["layers[0].ffn"]["load"]) // 2


def test_exactly_the_chosen_experts_learn(run):
    stage = RunFolder.open(run.folder).read_schedule()[1]
    wanted = select(run.anatomy, choice_of(run)["plain"][RANKED])
    assert stage.learn == wanted.expression
    moved = {r.component for r in run.audit.rows if r.stage == "stage-2" and r.verdict == "moved"}
    assert moved == {c.name for c, _ in wanted.by_component()}
    assert run.audit.passed


def test_the_measurement_is_the_models_as_it_was_loaded(run, tmp_path):
    again = train(recipe(tmp_path, RANKED), out=tmp_path / "run")
    assert choice_of(again)["measurement"] == choice_of(run)["measurement"]


def test_a_changed_measurement_is_not_believed(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    data = json.loads((copy / FILE).read_text())
    data["measurement"]["sites"][0]["load"][0] += 1
    (copy / FILE).write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match="was changed"):
        audit(copy)


def test_a_selection_that_does_not_follow_from_its_measurement_fails_the_audit(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    data = json.loads((copy / FILE).read_text())
    data["plain"][RANKED] = "experts"
    (copy / FILE).write_text(json.dumps(data))
    assert "selections that do not follow from their measurement or file" in failed(copy)


def test_a_resumed_run_goes_on_with_the_kept_selection(run, tmp_path, monkeypatch):
    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, "router", RANKED), out=tmp_path / "run", observers=[stop])
    monkeypatch.setattr("frostline.ready.choose", lambda *_, **__: pytest.fail("measured again"))
    done = resume(tmp_path / "run")
    assert done.audit.passed
    assert choice_of(done) == choice_of(run)


def test_a_run_that_lost_its_choice_is_not_resumed(tmp_path):
    def stop(event):
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, RANKED), out=tmp_path / "run", observers=[stop])
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(RunFolderError, match="which experts it chose"):
        resume(tmp_path / "run")


def test_a_plan_says_that_a_ranking_needs_a_measurement(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\[0\]\.learn: .*nothing was measured"):
        prepare(recipe(tmp_path, RANKED))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe(folder, "router", RANKED).as_dict()))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("command", ["schedule", "why"])
def test_what_waits_for_a_measurement_is_shown_as_it_is_written_and_said(written, command, monkeypatch):
    found = CliRunner().invoke(app, [command, str(written), "--json"])
    assert found.exit_code == 0, found.output
    assert [bool(s["unresolved"]) for s in json.loads(found.stdout)["stages"]] == [False, True]
    if command == "why":  # its costs, which take long, are not what this is about
        monkeypatch.setattr("frostline.why._reasons", lambda *_: ())
    shown = CliRunner().invoke(app, [command, str(written)]).output
    said = " ".join("".join(c if c not in "│┃" else " " for c in shown).split())
    assert "experts[top 1 by tokens] | layers[0].ffn.experts[cover 0.6 by gate]" in said
    assert "is unresolved until tokens and gate per expert are measured, when training starts, on " in said


def test_what_stands_for_a_ranking_has_the_size_of_what_is_measured(written):
    prepared = prepare(load_recipe(written), stand_in=True)
    assert set(unresolved(prepared)) == {1}
    alone = prepare(recipe(written.parent, "experts[top 1 by tokens]"), stand_in=True).schedule.stages[0].selection
    assert alone.n_elements == 3 * 3 * 32 * 48  # one expert in each of three layers, three tensors each
    stand_in = {c.name for c, _ in prepared.schedule.stages[1].selection.by_component()}
    in_first = {c for c in stand_in if c.startswith("layers[0]")}
    assert {c.partition(".experts")[2][:3] for c in in_first} == {"[0]", "[1]", "[2]"}  # three of four cover 0.6
    assert {c.partition(".experts")[2][:3] for c in stand_in - in_first} == {"[0]"}


def test_a_run_has_a_measurement_and_nothing_unresolved(run, tmp_path):
    kept = read_choice(RunFolder.open(run.folder))
    assert unresolved(prepare(recipe(tmp_path, "router", RANKED), choice=kept)) == {}


def test_a_dense_model_cannot_be_ranked(tmp_path):
    with pytest.raises(RecipeError, match="no router"):
        train(tiny.recipe(tmp_path, stages=[{"learn": RANKED, "steps": 1, "lr": 1.0}]), out=tmp_path / "run")


def esft(folder, **data):
    (folder / "esft.json").write_text(json.dumps({"experts": {"0": [1], "2": [0, 3]}} | data))


def test_a_recipe_takes_a_file_of_esft_beside_it_and_keeps_its_text(tmp_path):
    esft(tmp_path)
    values = tiny.recipe_dict(tmp_path, "mixtral", stages=[{"learn": 'esft("esft.json")', "steps": 1, "lr": 1e-3}])
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    esft(tmp_path, experts={"1": [0]})  # what the file says later does not matter
    audited = audit(tmp_path / "run")
    assert audited.passed
    moved = {r.component.rpartition(".")[0] for r in audited.rows if r.verdict == "moved"}
    assert moved == {"layers[0].ffn.experts[1]", "layers[2].ffn.experts[0]", "layers[2].ffn.experts[3]"}
    assert CliRunner().invoke(app, ["plan", str(path)]).exit_code == 0


def test_a_file_that_is_not_there_or_makes_no_sense_is_named(tmp_path):
    learn = f'esft("{tmp_path}/none.json")'
    with pytest.raises(RecipeError, match=r"stages\[0\]\.learn: .*none\.json cannot be read"):
        prepare(recipe(tmp_path, learn))
    esft(tmp_path, experts={"7": [1]})
    with pytest.raises(RecipeError, match="layer 7, which has no experts"):
        prepare(recipe(tmp_path, f'esft("{tmp_path}/esft.json")'))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.write_text(folder / "text.txt")
    done = train(recipe(folder, "router"), out=folder / "run")
    esft(folder)
    return done.folder, folder


def selected(saved, *words):
    return CliRunner().invoke(app, ["select", str(saved[0]), *map(str, words)])


def test_select_measures_a_text_and_prints_the_experts_by_number(saved):
    found = selected(saved, "experts[top 1 by tokens]", "--data", saved[1] / "text.txt", "--length", 32, "--json")
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["expression"].count("ffn.experts[") == 3
    assert data["n_elements"] == 3 * 3 * 32 * 48


def test_select_reads_a_file_of_esft(saved):
    found = selected(saved, f'esft("{saved[1]}/esft.json")', "--json")
    assert json.loads(found.stdout)["expression"] == "(layers[0].ffn.experts[1] | layers[2].ffn.experts[0,3])"


def test_select_says_what_is_missing(saved):
    for words, said in (
        (["experts[top 1 by tokens]"], "nothing was measured"),
        (["experts", "--data", saved[1] / "text.txt"], "ranked: experts[top 4 by"),
    ):
        found = selected(saved, *words)
        assert (found.exit_code, said in found.output) == (2, True)
