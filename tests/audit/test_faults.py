"""Each planted fault must fail the audit, and the audit must name the part and the stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import frostline
from frostline.audit import Audit
from frostline.engine import stage_switch
from frostline.engine.buffers import FrozenBuffers
from frostline.engine.optimizers import Optimizers
from frostline.errors import RunFolderError
from frostline.prepared import prepare
from frostline.ready import load_weights
from frostline.weights import Weights

Build = Callable[..., Optimizers]


def after_each_step(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
    """Make every optimizer do something more after its step."""
    original: Build = stage_switch.make_optimizer

    def build(*args: Any, **kwargs: Any) -> Optimizers:
        optimizer = original(*args, **kwargs)
        optimizer.parts[0].register_step_post_hook(lambda *_: fault())
        return optimizer

    monkeypatch.setattr(stage_switch, "make_optimizer", build)


def grab_model(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The model of the next run, once it is loaded."""
    grabbed: list[torch.nn.Module] = []
    original = load_weights

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        grabbed.append(original(*args, **kwargs))
        return grabbed[-1]

    monkeypatch.setattr("frostline.ready.load_weights", load)
    return grabbed


def failed_rows(audit: Audit) -> set[tuple[str, str, str]]:
    return {(r.component, r.stage, r.verdict) for r in audit.failures}


def test_a_sound_run_passes_and_says_what_moved(tmp_path: Path) -> None:
    result = frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    assert result.audit.passed
    verdicts = {(r.component, r.stage): r.verdict for r in result.audit.rows}
    assert verdicts["layers[1].attn.q", "joint"] == "moved"
    assert verdicts["layers[1].attn.q", "ffn"] == "unchanged"
    assert verdicts["layers[1].ffn.up", "ffn"] == "moved"
    assert verdicts["embed", "ffn"] == "unchanged"


def test_an_optimizer_that_decays_a_frozen_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = grab_model(monkeypatch)

    def decay() -> None:
        with torch.no_grad():
            models[0].get_parameter("model.layers.2.self_attn.k_proj.weight").mul_(0.999)

    after_each_step(monkeypatch, decay)
    result = frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    assert not result.audit.passed
    assert failed_rows(result.audit) == {("layers[2].attn.k", "ffn", "FROZEN BUT MOVED")}


def test_an_optimizer_that_skips_a_learning_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Build = stage_switch.make_optimizer

    def build(owned: Any, *args: Any, **kwargs: Any) -> Any:
        (skipped,) = (o.value for o in owned if o.piece.tensor == "model.layers.1.mlp.up_proj.weight")
        optimizer = original(owned, *args, **kwargs)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not skipped]
        return optimizer

    monkeypatch.setattr(stage_switch, "make_optimizer", build)
    result = frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    assert failed_rows(result.audit) == {
        ("layers[1].ffn.up", "joint", "LEARNING BUT UNMOVED"),
        ("layers[1].ffn.up", "ffn", "LEARNING BUT UNMOVED"),
    }
    assert not result.audit.passed


def test_a_buffer_changed_behind_the_engines_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = grab_model(monkeypatch)
    monkeypatch.setattr(FrozenBuffers, "restore", lambda _: [])

    def drift() -> None:
        models[0].get_buffer("model.rotary_emb.inv_freq").mul_(1.001)

    after_each_step(monkeypatch, drift)
    result = frostline.train(tiny.recipe(tmp_path), out=tmp_path / "run")
    assert failed_rows(result.audit) == {
        ("position", "joint", "FROZEN BUT MOVED"),
        ("position", "ffn", "FROZEN BUT MOVED"),
    }


def test_a_frozen_slice_touched_by_a_fused_optimizer_on_a_view_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hazard itself: torch's fused AdamW on a strided view writes outside the view."""
    models = grab_model(monkeypatch)
    original: Build = stage_switch.make_optimizer

    def build(owned: Any, *args: Any, **kwargs: Any) -> Optimizers:
        packed = models[0].get_parameter("transformer.h.0.attn.c_attn.weight")
        view = torch.nn.Parameter(packed.detach()[:, :32])  # q as a view of the packed tensor, not contiguous
        faulty = torch.optim.AdamW([view], lr=1e-2, weight_decay=0.1, fused=True)
        optimizer = original(owned, *args, **kwargs)

        def step_on_the_view(*_: Any) -> None:
            view.grad = torch.ones_like(view)
            faulty.step()

        optimizer.parts[0].register_step_post_hook(step_on_the_view)
        return optimizer

    monkeypatch.setattr(stage_switch, "make_optimizer", build)
    stages = [{"name": "q", "learn": "attn.q", "steps": 2, "lr": 1e-3}]
    result = frostline.train(tiny.recipe(tmp_path, "gpt2", stages=stages), out=tmp_path / "run")
    assert not result.audit.passed
    assert {r.component for r in result.audit.failures} & {"layers[0].attn.k", "layers[0].attn.v"}
    assert {r.verdict for r in result.audit.failures} == {"FROZEN BUT MOVED"}


def test_one_expert_and_one_third_of_a_packed_tensor_learn_and_nothing_else(tmp_path: Path) -> None:
    optimizer = {"name": "adamw", "weight_decay": 0.1}
    for architecture, learn in (("mixtral", "experts[1]"), ("gpt2", "attn.q")):
        folder = tmp_path / architecture
        folder.mkdir()
        stages = [{"name": "some", "learn": learn, "steps": 4, "lr": 1e-2, "optimizer": optimizer}]
        recipe = tiny.recipe(folder, architecture, stages=stages)
        before = load_weights(prepare(recipe)).state_dict()
        result = frostline.train(recipe, out=folder / "run")
        assert result.audit.passed
        moved = {r.component for r in result.audit.rows if r.bytes_changed}
        wanted = {c.name for c, _ in frostline.select(tiny.anatomy(architecture), learn).by_component()}
        assert moved == wanted
        after = Weights(folder / "run" / "model", names=set(before))
        n_changed = sum(int((after[n] != before[n]).sum()) for n in before if n in after)
        assert 0 < n_changed <= frostline.select(tiny.anatomy(architecture), learn).n_elements


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    frostline.train(tiny.recipe(folder), out=folder / "run")
    return folder / "run"


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def flip_one_bit(path: Path, tensor: str) -> None:
    tensors = load_file(path)
    tensors[tensor].view(torch.int32).flatten()[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def failed_claims(audit: Audit) -> list[str]:
    return [f"{e.claim}: {e.measured}" for e in audit.evidence if not e.passed]


def test_one_bit_changed_in_the_saved_model_fails_the_audit_and_names_the_tensor(
    finished: Path, tmp_path: Path
) -> None:
    run = copy_of(finished, tmp_path)
    flip_one_bit(run / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight")
    audit = frostline.audit(run)
    assert not audit.passed
    assert any("contradict" in c and "model.layers.0.mlp.up_proj.weight" in c for c in failed_claims(audit))


def test_one_bit_changed_in_the_entry_values_fails_the_audit(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    path = run / "evidence" / "entry-1.safetensors"
    name = next(iter(load_file(path)))
    flip_one_bit(path, name)
    (claim,) = failed_claims(frostline.audit(run))
    assert name in claim


@pytest.mark.parametrize(
    "missing", ["evidence/boundary-2.json", "evidence/entry-0.safetensors", "evidence/gradients.jsonl", "model"]
)
def test_a_missing_piece_of_evidence_never_passes(finished: Path, tmp_path: Path, missing: str) -> None:
    run = copy_of(finished, tmp_path)
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert not frostline.audit(run).passed


@pytest.mark.parametrize("missing", ["anatomy.json", "status.json"])
def test_a_run_folder_without_its_records_is_said_to_be_incomplete(
    finished: Path, tmp_path: Path, missing: str
) -> None:
    run = copy_of(finished, tmp_path)
    (run / missing).unlink()
    with pytest.raises(RunFolderError, match=f"incomplete: it has no {missing}"):
        frostline.audit(run)


def test_evidence_that_names_a_learning_part_frozen_fails(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    schedule = json.loads((run / "schedule.json").read_text())
    removed = schedule["stages"][1]["learning"].pop()
    (run / "schedule.json").write_text(json.dumps(schedule))
    audit = frostline.audit(run)
    assert not audit.passed
    assert any(r.verdict == "FROZEN BUT MOVED" and r.stage == "ffn" for r in audit.failures), removed


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        frostline.audit(tmp_path)
    with pytest.raises(RunFolderError, match="no run folder"):
        frostline.audit(tmp_path / "nothing")


def test_the_key_bias_of_softmax_attention_carries_no_signal(tmp_path: Path) -> None:
    result = frostline.train(tiny.recipe(tmp_path, "gpt2"), out=tmp_path / "run")
    rows = [r for r in result.audit.rows if r.component.endswith("attn.k") and r.stage == "joint"]
    assert rows
    assert all(any("c_attn.bias[32:64]: no signal" in d for d in r.details) for r in rows)
    assert result.audit.passed


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def zero_weights_hidden_behind_good_ones(run: Path) -> None:
    good = load_file(run / "model" / "model.safetensors")
    save_file(good, run / "model" / "zz.safetensors", metadata={"format": "pt"})
    zeros = {n: torch.zeros_like(t) for n, t in good.items()}
    save_file(zeros, run / "model" / "model.safetensors", metadata={"format": "pt"})


def a_tensor_more(run: Path) -> None:
    tensors = load_file(run / "model" / "model.safetensors")
    tensors["model.extra.weight"] = torch.ones(2)
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})


def another_recipe(run: Path) -> None:
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("learn: ffn", "learn: attn"))


def no_recipe(run: Path) -> None:
    (run / "recipe.yaml").unlink()


def no_tokenizer(run: Path) -> None:
    (run / "model" / "tokenizer.json").unlink()


def a_parameter_declared_derived(run: Path) -> None:
    edit_json(run / "evidence" / "boundary-0.json", lambda d: d["derived"].append("model.embed_tokens.weight"))
    name = "model.embed_tokens.weight[0:320, 0:32]"
    edit_json(run / "evidence" / "boundary-2.json", lambda d: d["hashes"].update({name: "0" * 64}))


def another_configuration(run: Path) -> None:
    edit_json(run / "model" / "config.json", lambda d: d.update(rms_norm_eps=1.0))


@pytest.mark.parametrize(
    ("tamper", "claim"),
    [
        (zero_weights_hidden_behind_good_ones, "contradict the hash recorded at the end"),
        (a_tensor_more, "anatomy does not account for: model.extra.weight"),
        (another_recipe, "the recipe asks for otherwise than they were scheduled: ffn: learn attn"),
        (no_recipe, "the recipe asks for otherwise"),
        (a_parameter_declared_derived, "frozen parts that moved: embed (stage ffn)"),
        (another_configuration, "missing, new or changed: config.json"),
        (no_tokenizer, "missing, new or changed: tokenizer.json"),
    ],
)
def test_a_run_folder_that_was_tampered_with_fails_and_says_where(
    finished: Path, tmp_path: Path, tamper: Callable[[Path], None], claim: str
) -> None:
    run = copy_of(finished, tmp_path)
    tamper(run)
    assert any(claim in c for c in failed_claims(frostline.audit(run)))


DAMAGED = ["", "[]", "5", "null", '{"schema": 1}', '{"schema": 1, "stages": 5}', "\x00", "[" * 9999]


@pytest.mark.parametrize("file", ["anatomy.json", "schedule.json", "status.json", "evidence/boundary-0.json"])
@pytest.mark.parametrize("text", DAMAGED, ids=lambda t: repr(t[:12]))
def test_damaged_records_are_one_clear_error(finished: Path, tmp_path: Path, file: str, text: str) -> None:
    run = copy_of(finished, tmp_path)
    (run / file).write_text(text)
    with pytest.raises(RunFolderError):
        frostline.audit(run)


BAD_LINES = [
    "[]",
    "5",
    "{}",
    "x",
    '{"step": 1, "stage": 99, "norms": {}}',
    '{"step": 1, "stage": 0, "norms": {"no": 1}}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_damaged_gradients_are_one_clear_error(finished: Path, tmp_path: Path, line: str) -> None:
    run = copy_of(finished, tmp_path)
    (run / "evidence" / "gradients.jsonl").write_text(line + "\n")
    with pytest.raises(RunFolderError):
        frostline.audit(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["stages"][0].update(end=10**15),
        lambda d: d["stages"][0].update(end=None),
        lambda d: d["stages"][0].update(name="ffn"),
        lambda d: d["stages"][0].update(index=1),
        lambda d: d["stages"][1]["learning"][0].update(index=[[[0, 10**10, 2], [1, 5, 1]], [[0, 32, 1]]]),
        lambda d: d["stages"][1]["learning"][0].update(tensor="nothing"),
    ],
    ids=["far end", "no end", "two of a name", "wrong index", "endless range", "unknown tensor"],
)
def test_a_schedule_that_does_not_fit_is_refused(finished: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    run = copy_of(finished, tmp_path)
    edit_json(run / "schedule.json", change)
    with pytest.raises(RunFolderError, match=r"schedule|records are damaged"):
        frostline.audit(run)


def test_a_step_too_small_for_fp32_is_lost_to_rounding_and_said_to_be(tmp_path: Path) -> None:
    stages = [{"name": "norms", "learn": "norm", "steps": 2, "lr": 1e-9}]
    result = frostline.train(tiny.recipe(tmp_path, stages=stages), out=tmp_path / "run")
    assert {r.verdict for r in result.audit.rows if r.declared == "learns"} == {"lost to rounding"}
    assert result.audit.passed
