"""A training of the Trainer's that stopped goes on from its checkpoint to the same bytes, and so does the evidence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from trainers import same, trainer, values
from transformers import Trainer, TrainerCallback

from frostline.errors import RunFolderError
from frostline.integrations import TrainerRun, attach

DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}


class Stop(TrainerCallback):
    """Ends the training as an error does, or leaves copies of its folders as a kill at that moment would."""

    def __init__(self, after: int, copies: dict[Path, Path] | None = None) -> None:
        self.after, self.copies = after, copies

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self.after:
            if self.copies is None:
                raise RuntimeError("the power is gone")
            for of, to in self.copies.items():
                shutil.copytree(of, to)


def begin(folder: Path, learn: Any, *callbacks: TrainerCallback, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """A Trainer with its run; both write into `folder`."""
    model = tiny.model("gpt2", seed=seed, **DROPOUT)
    usual = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "gradient_accumulation_steps": 2}
    under = trainer(model, folder / "out", callbacks=callbacks, **(usual | settings))
    return under, attach(under, learn, out=folder / "run")


def stopped(folder: Path, learn: Any = "ffn", after: int = 5, **settings: Any) -> Path:
    """The newest checkpoint of a training that stopped."""
    under, _ = begin(folder, learn, Stop(after), **settings)
    with pytest.raises(RuntimeError, match="power"):
        under.train()
    return max((folder / "out").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


RECORDS = ("metrics.jsonl", "schedule.json", "status.json", "evidence/gradients.jsonl", "evidence/boundary-1.json")

LEARN: dict[str, Any] = {
    "whole tensors": "ffn",
    "parts of tensors": "attn.heads[1] | layers[0].ffn.neurons[3:9]",
    "in the second stage": [("attn.heads[1]", 3), "attn.heads[1] | ffn"],
    "where two stages meet": [("attn.heads[1]", 4), "attn.heads[1] | ffn"],
}


@pytest.mark.parametrize("learn", LEARN.values(), ids=LEARN)
def test_after_an_error_it_goes_on_to_the_same_weights_and_the_same_records(tmp_path: Path, learn: Any) -> None:
    whole, _ = begin(tmp_path / "whole", learn)
    whole.train()
    checkpoint = stopped(tmp_path / "cut", learn)
    assert checkpoint.name == "checkpoint-4"
    again, run = begin(tmp_path / "cut", learn, seed=1)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)
    for name in RECORDS:
        assert (tmp_path / "cut/run" / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes(), name
    verdict = run.audit()
    assert verdict.passed, [e for e in verdict.evidence if not e.passed]


def test_so_it_does_after_a_kill(tmp_path: Path) -> None:
    learn = "attn.heads[1]"
    killed = {tmp_path / "whole" / name: tmp_path / "killed" / name for name in ("out", "run")}
    whole, _ = begin(tmp_path / "whole", learn, Stop(7, killed))
    whole.train()
    again, run = begin(tmp_path / "killed", learn)
    assert not run.audit().passed
    again.train(resume_from_checkpoint=str(tmp_path / "killed/out/checkpoint-4"))
    assert same(again.model, whole.model)
    assert run.audit().passed
    for name in RECORDS:
        assert (tmp_path / "killed/run" / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes(), name


def test_a_finished_training_goes_on_for_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    constant = {"lr_scheduler_type": "constant"}
    longer, _ = begin(tmp_path / "longer", "ffn", **constant)
    longer.train()
    short, _ = begin(tmp_path / "short", "ffn", max_steps=6, **constant)
    short.train()
    again, run = begin(tmp_path / "short", "ffn", **constant)
    again.train(resume_from_checkpoint=str(tmp_path / "short/out/checkpoint-4"))
    assert "had finished after step 6 and goes on after step 4" in caplog.text
    assert same(again.model, longer.model)
    assert run.audit().passed


def test_a_run_that_is_there_is_not_started_again(tmp_path: Path) -> None:
    stopped(tmp_path)
    under, _ = begin(tmp_path, "ffn")
    with pytest.raises(RunFolderError, match=r"failed after step 5: trainer\.train\(resume_from_checkpoint"):
        under.train()


def refused(under: Trainer, checkpoint: Path, said: str) -> None:
    """Refused: no byte of the run folder changes."""
    run = Path(under.args.output_dir).parent / "run"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match=said):
        under.train(resume_from_checkpoint=str(checkpoint))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"} == {
        p: b for p, b in before.items() if p.name != "lock"
    }


def test_a_checkpoint_from_which_nothing_exact_can_go_on_is_refused(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)
    under, _ = begin(tmp_path, "ffn")
    (checkpoint / "frostline.json").rename(tmp_path / "kept.json")
    refused(under, checkpoint, "was not finished when the run ended; resume from another: checkpoint-2")
    shutil.move(tmp_path / "kept.json", checkpoint / "frostline.json")
    (checkpoint / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    refused(under, checkpoint, "save_only_model")
    shutil.move(tmp_path / "optimizer.pt", checkpoint / "optimizer.pt")
    (checkpoint / "frostline.json").write_text('{"schema": 1, "run": "x"}')
    refused(under, checkpoint, "frostline.json: its records are damaged")


def test_a_checkpoint_of_a_bare_trainer_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    under, run = begin(tmp_path / "bare", "ffn")
    run.detach()
    under.train()
    under, _ = begin(tmp_path, "ffn")
    refused(under, tmp_path / "bare/out/checkpoint-4", "not saved in a run that Frostline was attached to")


@pytest.mark.parametrize("tensor", ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"])
def test_other_weights_than_those_saved_are_refused(tmp_path: Path, tensor: str) -> None:
    checkpoint = stopped(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights[tensor][0, 0] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    under, _ = begin(tmp_path, "ffn")
    refused(under, checkpoint, "not the one that was saved after step 4")


def test_another_folder_or_another_selection_is_refused(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)
    other, _ = begin(tmp_path, "attn")
    refused(other, checkpoint, "the run learned ffn, and is to go on with attn")
    under = trainer(tiny.model("gpt2", **DROPOUT), tmp_path / "out")
    attach(under, "ffn", out=tmp_path / "new")
    refused(under, checkpoint, "is not there")
    stopped(tmp_path / "second")
    attach(under, "ffn", out=tmp_path / "second" / "run")
    refused(under, checkpoint, "not the folder of the run that the checkpoint was saved in")


def test_other_software_is_noted_in_the_folder(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)
    path = tmp_path / "run/environment.json"
    environment = json.loads(path.read_text())
    environment["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    under, run = begin(tmp_path, "ffn")
    under.train(resume_from_checkpoint=str(checkpoint))
    (noted,) = json.loads(path.read_text())["resumed_inexactly"]
    assert noted["differences"] == [f"packages.torch: 1.0 → {torch.__version__}"]
    assert any("packages.torch: 1.0" in e.measured for e in run.audit().evidence)


def test_what_a_checkpoint_is_loaded_into_need_not_be_what_the_run_began_with(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)
    under, run = begin(tmp_path, "ffn", seed=5)
    before = values(under.model)
    under.train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(under.model.get_parameter("transformer.wpe.weight"), before["transformer.wpe.weight"])
    assert isinstance(run, TrainerRun)
    assert run.audit().passed
