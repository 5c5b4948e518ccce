from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner, Result

import frostline
from frostline.cli import app
from frostline.recipe import dump_yaml


def frost(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(dump_yaml(tiny.recipe_dict(folder)))
    result = frost("train", folder / "recipe.yaml", "--out", folder / "run", "--set", "stages[0].lr=1e-3")
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_train_prints_stages_losses_and_a_passing_audit(run: Path, tmp_path: Path) -> None:
    result = frost("train", run.parent / "recipe.yaml", "--out", tmp_path / "again")
    assert result.exit_code == 0
    for text in ("stage joint", "held-out loss", "frozen, 0 bytes changed", "AUDIT PASSED", str(tmp_path / "again")):
        assert text in result.output.replace("\n", "")
    assert json.loads((run / "schedule.json").read_text())["stages"][0]["settings"]["lr"] == 1e-3


def test_train_as_json_prints_only_json(run: Path, tmp_path: Path) -> None:
    result = frost("train", run.parent / "recipe.yaml", "--out", tmp_path / "run", "--json")
    data = json.loads(result.stdout)
    assert data["state"] == "finished"
    assert data["audit"]["passed"] is True


def test_parts_lists_every_component_with_tensors_and_index_ranges(run: Path) -> None:
    assert "layers[0:3].attn.q" in frost("parts", run).output
    data = json.loads(frost("parts", run, "--json").output)
    parts = {c["name"]: c for c in data["components"]}
    assert parts["layers[1].attn.k"]["n_elements"] == 16 * 32
    assert parts["layers[1].attn.k"]["slices"] == [
        {"tensor": "model.layers.1.self_attn.k_proj.weight", "index": [[[0, 16, 1]], [[0, 32, 1]]]}
    ]
    assert sum(c["n_elements"] for c in data["components"]) == data["n_parameters"]


def test_select_counts_per_term(run: Path) -> None:
    result = frost("select", run, "ffn & layers[1:]")
    assert result.exit_code == 0
    assert "2 of 3" in result.output
    data = json.loads(frost("select", run, "ffn & layers[1:]", "--json").output)
    assert [m["text"] for m in data["matches"]] == ["ffn", "layers[1:]"]
    assert len(data["components"]) == 6


def test_audit_exits_0_on_a_sound_run_and_1_on_a_broken_one(run: Path, tmp_path: Path) -> None:
    import shutil

    assert frost("audit", run).exit_code == 0
    data = json.loads(frost("audit", run, "--json").output)
    row = next(r for r in data["rows"] if r["component"] == "embed" and r["stage"] == "ffn")
    assert (row["declared"], row["bytes_changed"], row["verdict"]) == ("frozen", 0, "unchanged")
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evidence" / "boundary-2.json").unlink()
    result = frost("audit", copy)
    assert result.exit_code == 1
    assert "AUDIT FAILED" in result.output


def test_diff_compares_by_component(run: Path) -> None:
    assert json.loads(frost("diff", run, run, "--json").output)["equal"] is True
    result = frost("diff", run / "evidence" / "entry-0.safetensors", run / "model" / "model.safetensors")
    assert result.exit_code == 0


def test_generate_continues_a_prompt(run: Path) -> None:
    result = frost("generate", run, "--prompt", "north river", "--tokens", "5")
    assert result.exit_code == 0
    assert result.output.startswith("north river")


def bad_recipe(folder: Path, change: Any) -> Path:
    values = tiny.recipe_dict(folder)
    path = folder / "recipe.yaml"
    path.write_text(change if isinstance(change, str) else dump_yaml({**values, **change}))
    return path


BAD = {
    "broken YAML": ("model: [1", "not valid YAML"),
    "unknown key": ({"stagess": 1}, "Did you mean 'stages'"),
    "wrong type": ({"seed": "x"}, "'seed'"),
    "no such model": ({"model": "./nothing"}, "no such folder"),
    "unknown part": ({"stages": [{"learn": "fnn", "steps": 1, "lr": 1e-3}]}, "Did you mean 'ffn'"),
    "layer out of range": ({"stages": [{"learn": "layers[9]", "steps": 1, "lr": 1e-3}]}, "0 to 2"),
    "nothing selected": ({"stages": [{"learn": "all & position", "steps": 1, "lr": 1e-3}]}, "only buffers"),
    "tied head alone": (
        {"model": tiny.config("gpt2"), "stages": [{"learn": "head", "steps": 1, "lr": 1e-3}]},
        "ties: untie",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message_exit_code_2_and_nothing_written(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    result = frost("train", bad_recipe(tmp_path, change), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_commands_on_things_that_do_not_exist_exit_2(tmp_path: Path) -> None:
    for args in (
        ("train", tmp_path / "none.yaml", "--out", tmp_path / "run"),
        ("audit", tmp_path / "none"),
        ("parts", tmp_path / "none"),
        ("select", tmp_path / "none", "ffn"),
        ("diff", tmp_path / "none", tmp_path / "none"),
        ("generate", tmp_path / "none"),
    ):
        result = frost(*args)
        assert result.exit_code == 2, args
        assert "error:" in result.output


def test_the_installed_command_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "frostline", "audit", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_of_every_command_explains_it() -> None:
    listed = frost("--help").output
    for command in ("parts", "select", "train", "audit", "diff", "generate"):
        assert command in listed
        assert frost(command, "--help").exit_code == 0


def test_the_same_run_from_python_and_from_the_command_line_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    recipe = frostline.load_recipe(run.parent / "recipe.yaml", overrides=["stages[0].lr=1e-3"])
    frostline.train(recipe, out=tmp_path / "python")
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "python" / file).read_bytes() == (run / file).read_bytes()


@pytest.mark.parametrize(
    "command",
    [["audit", "LONG"], ["resume", "LONG"], ["plan", "LONG"], ["export", "RUN", "LONG"], ["apply", "LONG", "a", "b"]],
)
def test_a_path_that_the_system_does_not_take_is_an_error_and_no_traceback(run: Path, command: list[str]) -> None:
    long = "x" * 300
    done = frost(*({"LONG": long, "RUN": str(run)}.get(word, word) for word in command))
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert "name too long" in done.output
