"""Adapters of PEFT under the Trainer: they learn as without Frostline, and the audit shows that the base did not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import same, trainer
from transformers import TrainerCallback

from frostline.errors import FrostlineError, RunFolderError
from frostline.integrations import attach

# peft asks a model of transformers 5.23 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def adapted() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    return get_peft_model(tiny.model("llama"), config)


class Stop(TrainerCallback):
    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("the power is gone")


def test_adapters_train_to_the_bytes_of_a_bare_trainer_and_go_on_from_its_checkpoints(tmp_path: Path) -> None:
    mine, plain = adapted(), adapted()
    under = trainer(mine, tmp_path / "out", **SAVED)
    run = attach(under, "adapter", out=tmp_path / "run")
    under.train()
    trainer(plain, tmp_path / "plain", **SAVED).train()
    assert same(mine, plain)
    verdict = run.audit()
    assert verdict.passed
    moved = {r.component for r in verdict.rows if r.verdict == "moved"}
    assert moved == {f"layers[{i}].adapter.{name}" for i in range(3) for name in ("attn_q", "ffn_up")}
    stopped = trainer(adapted(), tmp_path / "cut", callbacks=[Stop()], **SAVED)
    attach(stopped, "adapter", out=tmp_path / "run-cut")
    with pytest.raises(RuntimeError, match="power"):
        stopped.train()
    again = adapted()
    under = trainer(again, tmp_path / "cut", **SAVED)
    run = attach(under, "adapter", out=tmp_path / "run-cut")
    under.train(resume_from_checkpoint=True)
    assert same(again, mine)
    assert run.audit().passed


def test_what_of_the_base_learned_too_is_not_in_the_checkpoint_and_so_it_is_refused(tmp_path: Path) -> None:
    under = trainer(adapted(), tmp_path / "out", **SAVED)
    attach(under, "adapter | layers[0].ffn.down", out=tmp_path / "run")
    under.train()
    again = trainer(adapted(), tmp_path / "out", **SAVED)
    attach(again, "adapter | layers[0].ffn.down", out=tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"not the one that was saved after step 4: .*down_proj"):
        again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))


def test_keeping_the_model_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(FrostlineError, match="this is a PeftModelForCausalLM"):
        attach(trainer(adapted(), tmp_path / "out"), "adapter", out=tmp_path / "run", save=True)
