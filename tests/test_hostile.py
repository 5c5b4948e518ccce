"""Nothing that comes as data is executed, read from outside its folder, or allowed to crash; secrets stay outside."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from frostline import audit, train
from frostline import ready as ready_module
from frostline import run as running
from frostline.checkpoints import Checkpoints
from frostline.cli import app
from frostline.deltas import apply_deltas, export_delta, read_delta
from frostline.errors import FrostlineError, ModelError, RecipeError, RunFolderError
from frostline.experiment.report import write_report
from frostline.export import export_run
from frostline.model import load_model, load_skeleton
from frostline.recipe import ScratchModel, recipe_from_dict
from frostline.resume import resume
from frostline.run_folder import RunFolder
from frostline.secrecy import command_without_secrets, find_secret, without_secrets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `run`, that a base can be taken from, and with checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_module, "plan_of", lambda *_, **__: None)
        train(tiny.recipe(folder), out=folder / "run")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)


def on(base: Path, folder: Path) -> dict[str, Any]:
    data = tiny.recipe_dict(folder, stages=[{"learn": "norm", "steps": 1, "lr": 1e-3}])
    return data | {"model": str(base)}


# --- code -------------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "executed"))


def test_a_pickle_that_is_read_would_be_noticed_here(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_weights_in_a_pickle_are_refused_and_not_read(run: Path, tmp_path: Path) -> None:
    base = run / "model"
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model\.bin\), which can run any code"):
        train(recipe_from_dict(on(base, tmp_path)), out=tmp_path / "out")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_pickles_that_lie_beside_are_never_read(run: Path, tmp_path: Path) -> None:
    for folder in (run, run / "model", run / "checkpoints", run / "evidence"):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    load_model(str(run / "model"))
    audit(run)
    write_report(run)
    RunFolder(run).write_status("running", step=0)
    assert resume(run).state == "finished"
    assert not (tmp_path / "mark").exists()


def signed(checkpoint: Path) -> None:
    """Write a checkpoint's manifest anew, so that its files count as what was written."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"] = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in checkpoint.iterdir()
        if p.name != "MANIFEST.json"
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_a_checkpoints_place_is_no_checkpoint_even_with_a_manifest(
    run: Path, tmp_path: Path, name: str
) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    signed(newest)
    RunFolder(run).write_status("interrupted", step=6)
    with pytest.raises(FrostlineError, match=r"step-|damaged"):
        resume(run)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_the_place_of_a_delta_or_of_evidence_is_none_and_is_not_read(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "delta.safetensors", RunFolder(run).entry(0)):
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ModelError, match=r"delta\.safetensors"):
        apply_deltas(str(run / "model"), [tmp_path / "delta.safetensors"], tmp_path / "out")
    with pytest.raises(RunFolderError, match="entry-0"):
        audit(run)
    assert not (tmp_path / "mark").exists()


def with_code(base: Path, mark: Path) -> None:
    """Let a model folder bring code of its own, which leaves a mark when it runs."""
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["Odd"]}
    config["auto_map"] = {"AutoConfig": "own_code.OddConfig", "AutoModelForCausalLM": "own_code.Odd"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).write_text('executed')\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class Odd(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )


def test_code_that_comes_with_a_model_runs_only_when_that_is_typed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    with_code(run / "model", tmp_path / "mark")
    for command in (["parts", str(run / "model")], ["claims", str(run / "model")]):
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2
        assert "own_code.py" in refused.output
        assert "--trust-remote-code" in refused.output
    assert not (tmp_path / "mark").exists()
    allowed = CliRunner().invoke(app, ["parts", str(run / "model"), "--trust-remote-code"])
    assert allowed.exit_code == 0, allowed.output
    assert (tmp_path / "mark").exists()


def test_code_from_a_hub_runs_only_at_a_commit(run: Path) -> None:
    for name in ("someone/model", "someone/model@main"):
        with pytest.raises(ModelError, match="someone/model@ and the 40 digits of the commit"):
            load_skeleton(name, trust_remote_code=True)
    config = json.loads((run / "model" / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "someone/model--own_code.OddConfig"}}
    (run / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"another repository \(someone/model--own_code.OddConfig\)"):
        load_skeleton(str(run / "model"), trust_remote_code=True)


# --- headers ----------------------------------------------------------------------------------------------------------


def header(fields: dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "a header longer than the file": header({"a": tensor(0, 4, [1])}, b"1234", length=1 << 20),
    "a header of 200 MB": header({"a": tensor(0, 4, [1])}, b"1234", length=200_000_000),
    "a header of 2^63 bytes": header({"a": tensor(0, 4, [1])}, b"1234", length=1 << 63),
    "tensors that overlap": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"0" * 12),
    "a shape that overflows": header({"a": tensor(0, 4, [1 << 62, 1 << 62])}, b"1234"),
    "offsets outside the file": header({"a": tensor(0, 1 << 40, [1 << 38])}, b"1234"),
    "a negative offset": header({"a": tensor(-4, 0, [1])}, b"1234"),
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "deep JSON": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "nothing": b"",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_weight_files_are_one_clear_error_wherever_they_lie(run: Path, tmp_path: Path, case: str) -> None:
    hostile = HOSTILE[case]
    base = shutil.copytree(run / "model", tmp_path / "base")
    (base / "model.safetensors").write_bytes(hostile)
    with pytest.raises(ModelError):
        train(recipe_from_dict(on(base, tmp_path)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "delta.safetensors").write_bytes(hostile)
    with pytest.raises(ModelError, match=r"delta\.safetensors"):
        read_delta(tmp_path / "delta.safetensors")
    diff = CliRunner().invoke(app, ["diff", str(base), str(run)])
    assert (diff.exit_code, "Traceback" in diff.output) == (2, False)
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / "weights.safetensors").write_bytes(hostile)
    signed(newest)
    RunFolder(run).write_status("interrupted", step=6)
    with pytest.raises(FrostlineError, match="damaged"):
        resume(run)
    RunFolder(run).entry(0).write_bytes(hostile)
    with pytest.raises(RunFolderError, match="entry-0"):
        audit(run)


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["manifest", "link"])
def test_a_checkpoint_never_leads_out_of_its_folder(run: Path, tmp_path: Path, where: str) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(newest / "weights.safetensors", outside)
    if where == "link":
        (newest / "weights.safetensors").unlink()
        (newest / "weights.safetensors").symlink_to(outside)
    else:
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        manifest["files"]["../../../outside.safetensors"] = manifest["files"].pop("weights.safetensors")
        (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    checkpoints = Checkpoints(run / "checkpoints", run=running.run_name(RunFolder(run)))
    found, (rejected,) = checkpoints.newest()
    assert found is None or found.path != newest
    assert rejected.path.name.startswith(newest.name)
    assert outside.exists()


# --- secrets ----------------------------------------------------------------------------------------------------------

HF, WANDB, HUB = "hf_" + "aB3" * 12, "0123456789abcdef" * 2 + "fedcba98", "hf_" + "Zz9" * 12
SECRETS: dict[str, str] = {
    "a token of Hugging Face": HUB,
    "a password in a URL": "https://me:hunter2secret@host/data.txt",
    "a parameter of a URL": "https://host/data.txt?access_token=abcdef123&x=1",
    "a value of the environment": f"runs/{WANDB}/data",
    "a header": "Authorization: Bearer abcdefgh12345",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-setting-that-is-not-secret")


@pytest.mark.parametrize("case", SECRETS)
@pytest.mark.usefixtures("secrets")
def test_a_recipe_that_holds_a_secret_is_refused_without_repeating_it(tmp_path: Path, case: str) -> None:
    data = tiny.recipe_dict(tmp_path)
    for change in ({"model": SECRETS[case]}, {"data": {**data["data"], "train": [SECRETS[case]]}}):
        with pytest.raises(RecipeError, match=r"(model|data\.train\[0\]).* holds a token, key or password") as caught:
            recipe_from_dict(data | change)
        assert str(find_secret(SECRETS[case])) not in str(caught.value)


@pytest.mark.usefixtures("secrets")
def test_texts_without_secrets_stay_as_they_are() -> None:
    plain = ["a-setting-that-is-not-secret", "hf_transfer", "ffn & layers[2:]", "https://host/a?page=2", "runs/sk-1"]
    assert [without_secrets(t) for t in plain] == plain
    assert not any(map(find_secret, plain))


@pytest.mark.usefixtures("secrets")
def test_no_secret_of_the_command_or_the_environment_is_written_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    base = made / "run" / "model"
    out = tmp_path / "run"
    planted = ["frostline", "train", "--api-key", "plainsecret1", f"--token={WANDB}", HF, f"x={HUB}", "https://u:pw@h/"]
    monkeypatch.setattr(sys, "argv", planted)
    train(recipe_from_dict(on(base, tmp_path)), out=out)
    write_report(out)
    export_run(out, tmp_path / "exported")
    export_delta(out, tmp_path / "delta.safetensors")
    RunFolder(out).write_status("failed", step=1, message=f"cannot reach https://me:{HF}@host/")
    found: list[tuple[str, str]] = []
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        text = path.read_bytes()
        found += [(str(path), s) for s in (HF, WANDB, HUB, "plainsecret1", "u:pw@") if s.encode() in text]
    assert found == []
    command = json.loads((out / "environment.json").read_text())["command"]
    assert command == ["frostline", "train", "--api-key", "***", "--token=***", "***", "x=***", "https://***@h/"]
    assert command_without_secrets(["frostline", "train", "r.yaml", "--out", "runs/a"])[-1] == "runs/a"


def test_a_delta_does_not_lead_out_of_the_folder_it_is_applied_into(made: Path, tmp_path: Path) -> None:
    """Names in a delta are names of tensors; none is a path."""
    base = made / "run" / "model"
    run = train(recipe_from_dict(on(base, tmp_path)), out=tmp_path / "run").folder
    data = export_delta(run, tmp_path / "delta.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].replace(b"model.norm.weight", b"../../norm.weight")
    (tmp_path / "evil.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ModelError, match=r"has no place for what .*evil\.safetensors holds: \.\./\.\./norm"):
        apply_deltas(str(base), [tmp_path / "evil.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": 30}, "hidden size (30) is not a multiple of the number of attention heads (4)"),
        ({"vocab_size": -1}, "no 'llama' can be built with this configuration: Trying to create tensor with negative"),
    ],
)
def test_a_model_that_cannot_be_built_from_its_sizes_says_which_are_wrong(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        load_skeleton(ScratchModel(**tiny.config("llama", **fields)))
