"""What the peers of the benchmark are given is the same computation: rows, order, masks, and what learns."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "systems")]

import bare  # noqa: E402
import llamafactory_  # noqa: E402
import swift_  # noqa: E402
from absent import hide_what_does_not_load  # noqa: E402
from cells import MODELS, WIDE, Cell, workload  # noqa: E402
from hugging import Watch, documents  # noqa: E402
from job import Job, Meter, learns, load_model  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 320}  # fmt: skip

loads_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def small_job(tmp_path: Path, *, learn: str = "ffn", lengths: str = "24") -> Job:
    model, tokens = workload(Cell(learn=learn, model="llama-8k", lengths=lengths), tmp_path, rows=6, sizes=SMALL)
    return Job(model=model, tokens=tokens, learn=learn, batch=2, epochs=2, threads=torch.get_num_threads(), lr=1e-3)


@pytest.mark.parametrize("model", ["llama-8k", "mixtral-8k", "qwen3_moe-8k"])
@pytest.mark.parametrize("learn", ["all", "ffn", "attn", "last-2", "last-1", "head", "experts"])
def test_swifts_regular_expression_says_the_job(learn: str, model: str) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(**{**WIDE, **MODELS[model]})
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    said = swift_.freezing(learn, config.num_hidden_layers).get("trainable_parameters_regex", "")
    asked = [name for name in names if learns(name, learn, config.num_hidden_layers)]
    if learn == "experts" and model == "llama-8k":
        assert not asked
    else:
        assert asked
    assert [name for name in names if re.search(said, name)] == asked


def test_a_job_that_a_peer_cannot_say_is_refused_by_its_name(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    job.learn = "norms"
    with pytest.raises(ValueError, match="LLaMA-Factory's freeze has no way to say 'norms'"):
        llamafactory_.freezing(job)
    with pytest.raises(ValueError, match="'norms' has no regular expression"):
        swift_.freezing("norms", 3)


@loads_inductor
def test_a_packed_row_for_llamafactory_has_the_loss_of_its_documents(tmp_path: Path) -> None:
    job = small_job(tmp_path, lengths="instructions")
    model, first = load_model(job), bare.run(job).losses[0]
    row = llamafactory_.examples(documents(job), job.batch, packed=True)[0]
    assert len(row["input_ids"]) % 8 == 0
    packed = {key: torch.tensor([values]) for key, values in row.items()}
    number = packed.pop("attention_mask")[0]
    same = (
        (number[:, None] == number[None, :])
        & (number[:, None] > 0)
        & torch.ones(len(number), len(number)).tril().bool()
    )
    mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)[None, None]
    assert model(**packed, attention_mask=mask).loss.item() == pytest.approx(first, rel=1e-6)


def test_a_peers_rows_are_the_jobs_in_its_order(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    rows = torch.load(job.tokens)
    flat = torch.tensor(documents(job)).split(job.batch)
    assert all(torch.equal(mine, rows[theirs]) for mine, theirs in zip(flat, job.order(len(rows)), strict=True))


@loads_inductor
def test_the_watch_keeps_every_steps_loss_and_leaves_the_trainer_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(tmp_path)
    model = load_model(job)
    losses = iter([torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)])
    monkeypatch.setattr(Trainer, "training_step", lambda *_: next(losses))
    before = Trainer.training_step
    with Watch(Meter(job), job) as watch:
        watch.on_train_begin(model=model)
        for _ in range(2):
            assert Trainer.training_step(None, model, {}).requires_grad
            watch.on_step_end()
        watch.on_train_end()
    found = watch.result()
    assert Trainer.training_step is before
    assert (found.losses, len(found.seconds), len(found.cpu_seconds)) == ([3.0, 2.0], 2, 2)
    assert found.n_learning == sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert (found.tokens, found.notes) == ([48] * 6, {"gradient_checkpointing": False})


def test_a_module_that_does_not_load_is_as_if_it_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken_one", "broken_two", "sound_one"):
        (tmp_path / f"{name}.py").write_text("" if name == "sound_one" else "raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_one", "broken_two", "sound_one"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        hide_what_does_not_load(name, stand_in=name == "broken_two")
    assert importlib.util.find_spec("broken_one") is None
    assert importlib.import_module("broken_two").__spec__.origin is None
    assert importlib.import_module("sound_one").__file__ == str(tmp_path / "sound_one.py")
    hide_what_does_not_load("never_installed")
    assert "never_installed" not in sys.modules
    for name in ("broken_one", "broken_two", "sound_one"):
        del sys.modules[name]
