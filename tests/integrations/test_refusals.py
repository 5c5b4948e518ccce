"""What would make a run under the Trainer something else than what was asked is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from trainers import trainer
from transformers import Trainer

from frostline.errors import FrostlineError, RunFolderError
from frostline.integrations import attach
from frostline.integrations.refusals import refusals


class Kind(Enum):
    FSDP = "FSDP"


def spread(t: Trainer) -> None:
    t.model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])


WRONG: dict[str, Callable[[Trainer], Any]] = {
    "auto_find_batch_size=True": lambda t: setattr(t.args, "auto_find_batch_size", True),
    "optim='galore_adamw'": lambda t: setattr(t.args, "optim", "galore_adamw"),
    "neftune_noise_alpha": lambda t: setattr(t.args, "neftune_noise_alpha", 5.0),
    "model_init": lambda t: setattr(t, "model_init", lambda: None),
    "1 processes (FSDP)": lambda t: setattr(t, "accelerator", SimpleNamespace(distributed_type=Kind.FSDP)),
    "3 GPUs in one process": lambda t: setattr(t.args, "_n_gpu", 3),
    "spread over cpu, meta": spread,
    "is a Linear, none of transformers": lambda t: setattr(t, "model", nn.Linear(2, 2)),
    "optimizers=(None, scheduler)": lambda t: setattr(t, "lr_scheduler", object()),
}


@pytest.mark.parametrize("said", WRONG)
def test_it_is_refused_at_once_with_the_reason_and_what_to_do(tmp_path: Path, said: str) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out")
    assert not [*refusals(under, n_stages=1, has_parts=False, frozen_dropout=False)]
    WRONG[said](under)
    with pytest.raises(FrostlineError) as error:
        attach(under, "ffn", out=tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_with_several_stages_what_belongs_to_one_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    given = torch.optim.SGD([p for n, p in model.named_parameters() if ".mlp." in n], lr=0.1)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    more = {"optimizers": (given, None), "eval_dataset": [{}]}
    under = trainer(model, tmp_path / "out", load_best_model_at_end=True, more=more, **settings)
    with pytest.raises(FrostlineError) as error:
        attach(under, [("ffn", 3), "ffn & layers[1:]"], out=tmp_path / "run")
    assert "load_best_model_at_end=True" in str(error.value)
    assert "optimizers=…: each stage needs" in str(error.value)


def test_settings_that_change_after_attaching_are_refused_when_training_starts(tmp_path: Path) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out")
    attach(under, "ffn", out=tmp_path / "run")
    under.args.auto_find_batch_size = True
    with pytest.raises(FrostlineError, match="auto_find_batch_size=True"):
        under.train()
    assert not (tmp_path / "run").exists()


def test_what_is_no_trainer_or_no_free_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrostlineError, match="not this Linear"):
        attach(nn.Linear(2, 2), "ffn", out=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="exists and is not empty"):
        attach(trainer(tiny.model("llama"), tmp_path / "out"), "ffn", out=tmp_path / "run")


def test_any_module_is_attached_to_with_its_parts_named(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(17, 8), nn.Linear(8, 1)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            del labels
            return {"loss": self.head(self.body(input_ids.float() / 320)).square().mean()}

    model = Net()
    body = model.body.weight.detach().clone()
    under = trainer(model, tmp_path / "out", max_steps=3)
    run = attach(under, "head", out=tmp_path / "run", parts={"body": ["body"], "head": ["head"]})
    under.train()
    assert run.audit().passed
    assert torch.equal(model.body.weight, body)
