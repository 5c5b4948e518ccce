"""The Trainer of transformers under Frostline: what was named learns, exactly as the Trainer would have trained it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from trainers import RECOMPUTE, InOrder, Overflows, arguments, rows, same, trainer, values
from transformers import Trainer, TrainerCallback
from typer.testing import CliRunner

import frostline
from frostline.anatomy import put, read_anatomy, take
from frostline.cli import app
from frostline.errors import FrostlineError, RunFolderError, SelectionError
from frostline.integrations import attach
from frostline.run_folder import RunFolder


def freeze_by_hand(model: nn.Module, *inside: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in inside))
    return model


def logged(run: Path, key: str) -> list[float]:
    return [row[key] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in row]


SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 3},
    "bf16": {"bf16": True},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "adafactor": {"optim": "adafactor"},
    "recomputed": {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": False}},
    "recomputed, reentrant": {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": True}},
    "warm-up, cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "no clipping": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whole_tensors_are_trained_to_the_bytes_of_a_bare_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    mine, plain = tiny.model("llama"), freeze_by_hand(tiny.model("llama"), ".mlp.", "layernorm")
    under = trainer(mine, tmp_path / "mine", **settings)
    run = attach(under, "ffn | layers[:].norm", out=tmp_path / "run")
    under.train()
    bare = trainer(plain, tmp_path / "plain", **settings)
    bare.train()
    assert same(mine, plain)
    assert not same(mine, tiny.model("llama"))
    assert logged(tmp_path / "run", "gradient_norm") == [r["grad_norm"] for r in bare.state.log_history[:-1]]
    assert run.audit().passed


def test_with_dropout_left_on_so_are_models_that_have_it(tmp_path: Path) -> None:
    dropout = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
    mine, plain = tiny.model("gpt2", **dropout), freeze_by_hand(tiny.model("gpt2", **dropout), ".mlp.")
    under = trainer(mine, tmp_path / "mine")
    attach(under, "ffn", out=tmp_path / "run", frozen_dropout=True)
    under.train()
    trainer(plain, tmp_path / "plain").train()
    assert same(mine, plain)


@pytest.mark.parametrize("learn", ["layers[1].ffn", "layers[2].norm", "layers[1].attn.heads[1]"])
def test_recomputing_in_either_way_changes_nothing_where_backward_stops_early(tmp_path: Path, learn: str) -> None:
    models = [tiny.model("llama") for _ in range(3)]
    for i, settings in enumerate(({}, SETTINGS["recomputed"], SETTINGS["recomputed, reentrant"])):
        under = trainer(models[i], tmp_path / f"out-{i}", **settings)
        run = attach(under, learn, out=tmp_path / f"run-{i}")
        under.train()
        assert run.audit().passed
    assert same(models[0], models[1])
    assert same(models[0], models[2])


@pytest.mark.parametrize("frozen_dropout", [True, False])
def test_frozen_blocks_are_recomputed_as_learning_ones_are(tmp_path: Path, frozen_dropout: bool) -> None:
    model = tiny.model("llama")
    calls = [0, 0]
    for i, layer in enumerate((0, 2)):
        module = model.get_submodule(f"model.layers.{layer}.mlp.up_proj")
        module.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    under = trainer(model, tmp_path / "out", max_steps=2, **SETTINGS["recomputed"])
    attach(under, [("layers[0].ffn", 1), "layers[0].attn"], out=tmp_path / "run", frozen_dropout=frozen_dropout)
    under.train()
    assert calls == [4, 4]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize(("learn", "steps"), [("ffn", 1), ("attn.heads[1]", 1), ("attn.heads[1]", 2)])
def test_in_fp16_a_step_that_the_scaler_skips_counts_and_leaves_nothing_behind(
    tmp_path: Path, learn: str, steps: int, optim: str
) -> None:
    mine, plain = tiny.model("llama"), freeze_by_hand(tiny.model("llama"), ".mlp.")
    under = trainer(mine, tmp_path / "mine", kind=Overflows, fp16=True, optim=optim)
    run = attach(under, [(learn, steps), learn], out=tmp_path / "run")
    under.train()
    skipped = [row["step"] for row in run.folder.read_lines(run.folder.metrics) if row.get("skipped")]
    assert skipped == [1]
    assert all(0 < n < 10 for n in logged(tmp_path / "run", "gradient_norm"))
    verdict = run.audit()
    assert verdict.passed
    assert {(r.stage, r.verdict) for r in verdict.rows if r.declared != "frozen"} == {
        ("stage-1", "every step skipped" if steps == 1 else "moved"),
        ("stage-2", "moved"),
    }
    if learn == "ffn":
        trainer(plain, tmp_path / "plain", kind=Overflows, fp16=True, optim=optim).train()
        assert same(mine, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of torch's own, where it cuts
@pytest.mark.parametrize("stages", ["ffn", [("attn.heads[1]", 3), "ffn"]])
def test_compiled_training_is_that_of_the_compiled_bare_trainer_and_switches_too(tmp_path: Path, stages: Any) -> None:
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.5, "embd_pdrop": 0.0}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    models = [tiny.model("gpt2", **dropout) for _ in range(2)]
    for i, settings in enumerate((compiled, {} if isinstance(stages, list) else compiled)):
        torch._dynamo.reset()
        under = trainer(models[i], tmp_path / f"out-{i}", **settings)
        if i == 0 or isinstance(stages, list):
            run = attach(under, stages, out=tmp_path / f"run-{i}", frozen_dropout=stages == "ffn")
        else:
            freeze_by_hand(models[i], ".mlp.")
        under.train()
        assert run.audit().passed
    assert same(*models)


PARTS = [
    ("gpt2", "attn.heads[1] | layers[0].ffn.neurons[3:9]"),
    ("mixtral", "experts[1] | router"),
    ("llama", "embed.rows[10:20] | layers[1].attn.heads[0:2]"),
]


@pytest.mark.parametrize(("architecture", "learn"), PARTS)
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_of_parts_of_tensors_only_those_move_under_weight_decay(
    tmp_path: Path, architecture: str, learn: str, optim: str
) -> None:
    model = tiny.model(architecture)
    before = values(model)
    under = trainer(model, tmp_path / "out", optim=optim, weight_decay=0.5)
    run = attach(under, learn, out=tmp_path / "run")
    under.train()
    allowed = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in before.items()}
    for s in run.selections[0].slices:
        put(allowed[s.tensor], s, torch.ones(s.shape, dtype=torch.bool))
    for name, p in model.named_parameters():
        changed = p.detach() != before[name]
        assert not bool((changed & ~allowed[name]).any()), name
        assert bool(changed.any()) == bool(allowed[name].any()), name
    verdict = run.audit()
    assert verdict.passed, [e for e in verdict.evidence if not e.passed]


def by_hand(model: nn.Module, learn: str, *, clip: float, decay: float, n_steps: int, micro: int) -> list[float]:
    """The same training of parts of tensors, written out with nothing of Frostline's but the slices; returns norms."""
    slices = frostline.select(read_anatomy(model), learn).slices
    parameters = dict(model.named_parameters())
    leaves = [nn.Parameter(take(parameters[s.tensor].detach(), s).clone()) for s in slices]
    optimizer = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=decay)
    data, norms = rows(), []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / n_steps)
        model.zero_grad()
        for m in range(micro):
            batch = data[4 * (step * micro + m) :][:4]
            ids = torch.stack([r["input_ids"] for r in batch])
            (model(input_ids=ids, labels=ids).loss / micro).backward()
        for leaf, s in zip(leaves, slices, strict=True):
            gradient = parameters[s.tensor].grad
            assert gradient is not None
            leaf.grad = take(gradient, s).clone()
        norm = torch.sqrt(sum(leaf.grad.double().square().sum() for leaf in leaves))  # type: ignore
        for leaf in leaves:
            leaf.grad *= min(1.0, clip / (norm.item() + 1e-6))  # type: ignore[operator]
        optimizer.step()
        with torch.no_grad():
            for leaf, s in zip(leaves, slices, strict=True):
                put(parameters[s.tensor], s, leaf.detach())
        norms.append(norm.item())
    return norms


@pytest.mark.parametrize("micro", [1, 2])
def test_clipping_and_accumulation_of_parts_of_tensors_are_those_computed_by_hand(tmp_path: Path, micro: int) -> None:
    learn, clip = "layers[1].ffn.neurons[0:8] | attn.heads[1]", 0.01
    mine = tiny.model("llama")
    settings = {"gradient_accumulation_steps": micro, "max_steps": 4, "max_grad_norm": clip, "weight_decay": 0.3}
    under = trainer(mine, tmp_path / "out", kind=InOrder, **settings)
    attach(under, learn, out=tmp_path / "run")
    under.train()
    plain, unclipped = tiny.model("llama"), tiny.model("llama")
    norms = by_hand(plain, learn, clip=clip, decay=0.3, n_steps=4, micro=micro)
    by_hand(unclipped, learn, clip=1e9, decay=0.3, n_steps=4, micro=micro)
    assert min(norms) > 2 * clip
    assert logged(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=1e-5)

    def apart(other: nn.Module) -> float:
        pairs = zip(mine.parameters(), other.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert apart(plain) < 1e-5
    assert apart(unclipped) > 1e-4


def test_a_norm_without_clipping_is_that_of_the_parts_of_tensors(tmp_path: Path) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out", max_grad_norm=0.0, max_steps=2)
    attach(under, "attn.heads[1]", out=tmp_path / "run")
    under.train()
    assert all(n > 0 for n in logged(tmp_path / "run", "gradient_norm"))


def test_stages_follow_each_other_in_one_training_and_the_scheduler_goes_on(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    under = trainer(model, tmp_path / "out", lr_scheduler_type="cosine", warmup_steps=1)
    run = attach(under, [("attn.heads[1]", 2), ("ffn", 1), "attn.q | position.rows[3:5]"], out=tmp_path / "run")
    under.train()
    assert [(s.start, s.end) for s in run.folder.read_schedule()] == [(0, 2), (2, 3), (3, 6)]
    verdict = run.audit()
    assert verdict.passed, [e for e in verdict.evidence if not e.passed]
    bare = trainer(tiny.model("gpt2"), tmp_path / "bare", lr_scheduler_type="cosine", warmup_steps=1)
    bare.train()
    assert logged(tmp_path / "run", "lr") == [r["learning_rate"] for r in bare.state.log_history[:-1]]


@pytest.mark.parametrize("learn", ["ffn", "attn.heads[1] | final_norm"])
def test_a_switch_between_equal_stages_changes_no_byte_unless_state_is_reset(tmp_path: Path, learn: str) -> None:
    once, twice, reset = (tiny.model("llama") for _ in range(3))
    for model, name, stages, state in (
        (once, "once", learn, "keep"),
        (twice, "twice", [(learn, 3), learn], "keep"),
        (reset, "reset", [(learn, 3), learn], "reset"),
    ):
        under = trainer(model, tmp_path / f"out-{name}", gradient_accumulation_steps=2)
        attach(under, stages, out=tmp_path / name, state=state)
        under.train()
    assert same(once, twice)
    assert not same(once, reset)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([("ffn", 2), ("attn", 2)], r"take 2 \+ 2 steps, and the Trainer makes 6"),
        ([("ffn", 6), "attn"], r"take 6 \+ the rest steps, and the Trainer makes 6"),
    ],
)
def test_stages_that_do_not_add_up_to_the_trainers_steps_are_refused(
    tmp_path: Path, stages: list[Any], said: str
) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out")
    attach(under, stages, out=tmp_path / "run")
    with pytest.raises(FrostlineError, match=said):
        under.train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (("ffn", 10), "10 is no stage"),
        ([], "nothing is named"),
        (["ffn", "attn"], "not the last stage"),
        ([("ffn", 0), "attn"], "at least one"),
    ],
)
def test_stages_without_a_length_are_refused(tmp_path: Path, stages: list[Any], said: str) -> None:
    with pytest.raises(FrostlineError, match=said):
        attach(trainer(tiny.model("llama"), tmp_path / "out"), stages, out=tmp_path / "run")


def test_a_wrong_selection_and_split_ties_surface_before_training_and_write_nothing(tmp_path: Path) -> None:
    model = tiny.model("llama", tie_word_embeddings=True)
    under = trainer(model, tmp_path / "out", max_steps=2)
    for learn, said in (("ffnn", "ffnn"), ("head", "tied")):
        with pytest.raises(SelectionError, match=said):
            attach(under, learn, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = attach(under, "head", out=tmp_path / "run", ties=True)
    under.train()
    assert run.audit().passed


def test_an_optimizer_over_more_or_less_than_what_learns_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    before = values(model)
    whole = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(FrostlineError, match=r"holds model.embed_tokens.weight and \d+ more, which does not learn"):
        attach(trainer(model, tmp_path / "a", more={"optimizers": (whole, None)}), "ffn", out=tmp_path / "run-a")
    some = torch.optim.AdamW([model.get_parameter("model.layers.0.mlp.up_proj.weight")], lr=1e-2)
    under = trainer(model, tmp_path / "b", more={"optimizers": (some, None)})
    attach(under, "ffn", out=tmp_path / "run-b")
    with pytest.raises(FrostlineError, match=r"lacks model.layers.0.mlp.gate_proj.weight and 7 more"):
        under.train()
    under = trainer(model, tmp_path / "c", more={"optimizers": (whole, None)})
    attach(under, "attn.heads[1] | attn.{k,v} | all - attn", out=tmp_path / "run-c")
    with pytest.raises(FrostlineError, match="holds whole tensors of which only parts learn"):
        under.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len([p for g in whole.param_groups for p in g["params"]]) == len(before)


@pytest.mark.parametrize("more", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_of_the_users_own_over_what_learns_is_used(tmp_path: Path, more: str) -> None:
    finals = []
    for under_frostline in (True, False):
        model = freeze_by_hand(tiny.model("llama"), ".mlp.")
        learns = [p for p in model.parameters() if p.requires_grad]
        given: dict[str, Any] = {
            "optimizers": (torch.optim.RMSprop(learns, lr=1e-3), None),
            "optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3}),
        }
        under = trainer(model, tmp_path / f"{under_frostline}", more={more: given[more]})
        if under_frostline:
            attach(under, "ffn", out=tmp_path / "run")
        under.train()
        finals.append(model)
    assert same(*finals)


def test_an_optimizer_that_keeps_state_from_the_start_is_refused_for_parts_of_tensors(tmp_path: Path) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out", optim="adagrad")
    attach(under, "attn.heads[1]", out=tmp_path / "run")
    with pytest.raises(FrostlineError, match="Adagrad keeps state of whole tensors"):
        under.train()


class ScheduleFree(torch.optim.SGD):
    """Has modes, as schedule-free optimizers do: their weights are others outside of training."""

    def eval(self) -> None: ...


def test_an_optimizer_that_changes_weights_between_steps_is_refused_for_parts_of_tensors(tmp_path: Path) -> None:
    more = {"optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 0.1})}
    under = trainer(tiny.model("llama"), tmp_path / "out", more=more)
    attach(under, "attn.heads[1]", out=tmp_path / "run")
    with pytest.raises(FrostlineError, match="ScheduleFree changes weights outside of its steps"):
        under.train()


class At(TrainerCallback):
    """Does something at the beginning of a step (0-based)."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, _: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            self.what(more["model"], more["optimizer"], control)


ATTENTION = "model.layers.1.self_attn.q_proj.weight"


def unfreeze(model: nn.Module, *_: Any) -> None:
    model.get_parameter(ATTENTION).requires_grad_(True)


def move(model: nn.Module, *_: Any) -> None:
    model.get_parameter(ATTENTION).data.mul_(1.01)


@pytest.mark.parametrize("step", [1, 4])
def test_a_parameter_that_is_unfrozen_in_the_middle_fails_the_audit(tmp_path: Path, step: int) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out", callbacks=[At(step, unfreeze)])
    run = attach(under, "ffn", out=tmp_path / "run")
    under.train()
    verdict = run.audit()
    assert not verdict.passed
    assert ATTENTION in next(e.measured for e in verdict.evidence if not e.passed)


def test_a_frozen_part_that_is_moved_fails_the_audit_and_the_command_says_so(tmp_path: Path) -> None:
    under = trainer(tiny.model("llama"), tmp_path / "out", callbacks=[At(2, move)])
    run = attach(under, "ffn", out=tmp_path / "run")
    under.train()
    assert {(r.component, r.verdict) for r in run.audit().failures} == {("layers[1].attn.q", "FROZEN BUT MOVED")}
    result = CliRunner().invoke(app, ["audit", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "layers[1].attn.q" in result.output


def test_a_frozen_parameter_that_somebody_gives_to_the_optimizer_stops_the_training(tmp_path: Path) -> None:
    def add(model: nn.Module, optimizer: Any, _: Any) -> None:
        unfreeze(model)
        optimizer.add_param_group({"params": [model.get_parameter(ATTENTION)]})

    model = tiny.model("llama")
    before = values(model)
    under = trainer(model, tmp_path / "out", callbacks=[At(2, add)])
    attach(under, "ffn", out=tmp_path / "run")
    with pytest.raises(FrostlineError, match=ATTENTION):
        under.train()
    assert torch.equal(model.get_parameter(ATTENTION), before[ATTENTION])
    assert RunFolder(tmp_path / "run").read_status()["state"] == "failed"
    assert all(p.requires_grad for p in model.parameters())


def test_a_step_that_is_not_the_trainers_stops_the_training(tmp_path: Path) -> None:
    callbacks = [At(2, lambda _, optimizer, __: optimizer.step())]
    under = trainer(tiny.model("llama"), tmp_path / "out", callbacks=callbacks)
    attach(under, "ffn", out=tmp_path / "run")
    with pytest.raises(FrostlineError, match="the Trainer counts 3 steps, and its optimizer made 4 of what learns"):
        under.train()


def test_training_that_stops_early_ends_its_stage_and_misses_those_after_it(tmp_path: Path) -> None:
    def stop(_: Any, __: Any, control: Any) -> None:
        control.should_training_stop = True

    for name, learn, passes in (("one", "ffn", True), ("two", [("ffn", 4), "attn"], False)):
        under = trainer(tiny.model("llama"), tmp_path / f"out-{name}", callbacks=[At(2, stop)])
        run = attach(under, learn, out=tmp_path / name)
        under.train()
        assert run.audit().passed == passes, name
    assert [s.end for s in RunFolder(tmp_path / "one").read_schedule()] == [3]


def test_a_second_training_wants_a_run_of_its_own_and_detached_the_trainer_is_bare(tmp_path: Path) -> None:
    model = tiny.model("llama")
    under = trainer(model, tmp_path / "out")
    first = attach(under, "attn.heads[1]", out=tmp_path / "first")
    under.train()
    with pytest.raises(RunFolderError, match="finished after step 6"):
        under.train()
    second = attach(under, "ffn", out=tmp_path / "second")
    under.train()
    assert first.audit().passed
    assert second.audit().passed
    second.detach()
    before = values(model)
    under.train()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not {"_inner_training_loop", "create_optimizer", "_save_checkpoint"} & set(vars(under))
    assert "clip_grad_norm_" not in vars(under.accelerator)


def test_what_is_measured_is_logged_and_shown_and_the_model_kept_on_request(tmp_path: Path) -> None:
    model = tiny.model("llama")
    under = Trainer(
        model=model,
        args=arguments(tmp_path / "out", eval_strategy="steps", eval_steps=3),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=1),
    )
    run = attach(under, "ffn", out=tmp_path / "run", save=True)
    under.train()
    assert len(logged(tmp_path / "run", "held_out_loss")) == 2
    assert {"step", "stage", "loss", "lr", "gradient_norm"} == set(
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    )
    verdict = run.audit()
    assert verdict.passed
    assert {r.basis for r in verdict.rows if r.verdict == "moved"} == {"recomputed"}
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").exists()


def test_the_best_model_that_is_loaded_at_the_end_is_what_the_evidence_ends_with(tmp_path: Path) -> None:
    model = tiny.model("llama")
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the worst
    under = trainer(model, tmp_path / "out", more={"eval_dataset": rows(4)}, learning_rate=0.1, **often, **best)
    run = attach(under, "layers[1].attn.heads[1]", out=tmp_path / "run", save=True)
    under.train()
    assert under.state.best_model_checkpoint is not None
    chosen = load_file(Path(under.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(p, chosen[n]) for n, p in model.named_parameters())
    verdict = run.audit()
    assert verdict.passed, [e for e in verdict.evidence if not e.passed]


def test_the_trainer_of_a_subclass_with_a_loss_of_its_own_is_attached_to_as_well(tmp_path: Path) -> None:
    mine, plain = tiny.model("llama"), freeze_by_hand(tiny.model("llama"), ".mlp.")
    under = trainer(mine, tmp_path / "mine", kind=InOrder)
    attach(under, "ffn", out=tmp_path / "run")
    under.train()
    trainer(plain, tmp_path / "plain", kind=InOrder).train()
    assert same(mine, plain)
    assert under.n_losses == 6


@pytest.mark.slow
def test_without_accelerate_only_the_use_of_a_trainer_fails_and_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['accelerate'] = sys.modules['peft'] = None\n"  # peft is not there without it
        "from frostline.integrations import attach\n"
        "from transformers import TrainingArguments\n"
        "try: TrainingArguments(output_dir='nowhere')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout
    assert "accelerate" in done.stdout
