"""The main path on CUDA: the same promises as on a CPU, on the machine that most people train on.

Run with `make test-cuda` on a machine with a CUDA device; without one every test here is skipped.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import frostline
from frostline.engine import Observer, StepDone
from frostline.recipe import recipe_from_dict
from frostline.resume import resume
from frostline.run import RunResult

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the versions of a GPU machine are its own; so are their warnings
]

BIG = {
    "architecture": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip
"""90 M parameters: large enough that an allocator's rounding does not count."""


def run(
    folder: Path, architecture: str = "llama", *, out: str = "run", observers: Any = (), **fields: Any
) -> RunResult:
    made = tiny.recipe_dict(folder, architecture, **fields)
    made["device"] = "cuda"
    return frostline.train(recipe_from_dict(made), out=folder / out, observers=observers)


def stage(learn: str, **fields: Any) -> dict[str, Any]:
    return {"name": "only", "learn": learn, "steps": 3, "lr": 3e-3, **fields}


@pytest.mark.parametrize("architecture", [*tiny.FAMILIES, *tiny.PACKED])
def test_exactly_the_ffn_moves_in_its_stage_and_the_plan_is_met(tmp_path: Path, architecture: str) -> None:
    result = run(tmp_path, architecture)
    assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]
    assert result.checks
    for check in result.checks:
        assert check.flops_agree, check


@pytest.mark.parametrize("optimizer", ["adamw", "adam", {"name": "sgd", "momentum": 0.9}, "adafactor", "muon"])
@pytest.mark.parametrize("learn", ["layers[1].attn.heads[0:2]", "embed.rows[3:9] | ffn.neurons[0:5]"])
def test_slices_move_alone_under_every_optimizer(tmp_path: Path, learn: str, optimizer: Any) -> None:
    if isinstance(optimizer, str):
        optimizer = {"name": optimizer}
    result = run(tmp_path, stages=[stage(learn, optimizer={**optimizer, "weight_decay": 0.1})])
    assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]


@pytest.mark.parametrize(
    ("architecture", "learn"), [("mixtral", "experts[1]"), ("gpt2", "attn.q"), ("gpt_oss", "experts[2]")]
)
def test_one_expert_or_a_packed_projection_moves_alone(tmp_path: Path, architecture: str, learn: str) -> None:
    fields = {"precision": "bf16-mixed"} if architecture == "gpt_oss" else {}
    result = run(tmp_path, architecture, stages=[stage(learn)], **fields)
    assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bf16-mixed"},
        {"recompute": "blocks"},
        {"stages": [stage("ffn", routes=[{"stop": "attn.out"}])]},
        {"stages": [stage("all - embed", routes=[{"stop": "block.in", "layers": "1:"}], local_loss="shared")]},
        {"stages": [stage("all", accumulate=2), {**stage("ffn", state="offload"), "name": "second"}]},
        {"loss": "fused"},
        {"loss": "fused", "precision": "bf16-mixed", "stages": [stage("head.rows[3:9]")]},
        {"nonfinite": {"policy": "skip"}, "stages": [stage("all", optimizer={"name": "muon"})]},
    ],
    ids=["bf16-mixed", "recompute", "stopped", "local", "offloaded", "fused", "fused rows", "skip"],
)
def test_settings_keep_the_promise(tmp_path: Path, fields: dict[str, Any]) -> None:
    result = run(tmp_path, **fields)
    assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]


def test_freezing_leaves_every_other_gradient_bitwise_the_same() -> None:
    model = tiny.model("llama").cuda()
    ids = torch.arange(64, device="cuda").reshape(2, 32) % tiny.VOCABULARY

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    full = gradients()
    for name, p in model.named_parameters():
        p.requires_grad_("self_attn" not in name)
    frozen = gradients()
    assert 0 < len(frozen) < len(full)
    assert all(torch.equal(frozen[n], full[n]) for n in frozen if "embed" not in n)
    assert torch.allclose(frozen["model.embed_tokens.weight"], full["model.embed_tokens.weight"], atol=1e-6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def stop_after(n: int) -> Observer:
    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == n:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_interrupted_run_ends_with_the_bytes_of_one_left_alone(tmp_path: Path, architecture: str) -> None:
    whole = run(tmp_path, architecture, out="whole")
    stopped = run(tmp_path, architecture, out="stopped", observers=[stop_after(4)])
    assert stopped.state == "interrupted"
    assert resume(stopped.folder).audit.passed
    first, second = weights(whole.folder), weights(stopped.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    names = ("metrics.jsonl", "evidence/gradients.jsonl")
    assert all((whole.folder / n).read_bytes() == (stopped.folder / n).read_bytes() for n in names)


def warm_up() -> None:
    """Let cuBLAS take its workspaces: they stay, belong to no run, and are not planned."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, device="cuda", dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(a @ a, a, a[0]).sum().backward()
    del a
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("learn", ["all", "ffn", "layers[-2:]"])
def test_planned_bytes_are_those_the_allocator_gives(tmp_path: Path, precision: str, learn: str) -> None:
    fields = {"data": {"train": str(tiny.write_text(tmp_path / "t.txt", n_words=40_000)), "length": 512, "batch": 8}}
    peaks: list[int] = []

    def watch(event: object) -> None:
        if isinstance(event, StepDone):
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    warm_up()
    before = torch.cuda.memory_allocated()
    result = run(tmp_path, model=BIG, stages=[stage(learn)], precision=precision, observers=[watch], **fields)
    (check,) = result.checks
    assert check.flops_agree, check
    measured = max(peaks[1:]) - before
    sizes = {"planned": check.planned_peak_bytes, "metered": check.measured_peak_bytes, "allocator": measured}
    print(learn, precision, *(f"{name} {n / 1e6:.0f} MB" for name, n in sizes.items()))
    assert check.planned_peak_bytes == pytest.approx(measured, rel=0.05)


OFFLOADED = {"name": "adamw", "device": "cpu"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("learn", ["ffn", "layers[1].attn.heads[0:2] | embed.rows[3:9,12]"])
def test_leaves_in_the_hosts_memory_learn_what_they_learn_beside_the_model(
    tmp_path: Path, learn: str, precision: str
) -> None:
    beside = run(tmp_path, out="beside", stages=[stage(learn)], precision=precision)
    apart = run(tmp_path, out="apart", stages=[stage(learn, optimizer=OFFLOADED)], precision=precision)
    assert apart.audit.passed, [e for e in apart.audit.evidence if not e.passed]
    first, second = weights(beside.folder), weights(apart.folder)
    within = 1e-5 if precision == "fp32" else 2e-2
    assert all(torch.allclose(first[n].float(), second[n].float(), rtol=within, atol=within) for n in first)


def test_offloaded_leaves_take_nothing_of_the_device_and_the_plan_says_so(tmp_path: Path) -> None:
    fields = {"data": {"train": str(tiny.write_text(tmp_path / "t.txt", n_words=40_000)), "length": 512, "batch": 8}}
    peaks: list[int] = []

    def watch(event: object) -> None:
        if isinstance(event, StepDone):
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    warm_up()
    before = torch.cuda.memory_allocated()
    stages = [stage("ffn", optimizer=OFFLOADED)]
    (check,) = run(tmp_path, model=BIG, stages=stages, observers=[watch], **fields).checks
    assert check.flops_agree, check
    assert check.planned_peak_bytes == pytest.approx(max(peaks[1:]) - before, rel=0.05)


def test_an_interrupted_offloaded_run_ends_with_the_bytes_of_one_left_alone(tmp_path: Path) -> None:
    stages = [stage("ffn", optimizer=OFFLOADED, steps=6)]
    whole = run(tmp_path, out="whole", stages=stages, precision="bf16")
    stopped = run(tmp_path, out="stopped", stages=stages, precision="bf16", observers=[stop_after(4)])
    assert resume(stopped.folder).audit.passed
    first, second = weights(whole.folder), weights(stopped.folder)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("layout", ["packed", "padded", "flat"])
def test_documents_are_kept_apart_in_every_layout(tmp_path: Path, layout: str, precision: str) -> None:
    """The loss of the same documents is that of rows padded to their length."""
    lines = "".join(json.dumps({"text": "frost line " * (3 + 5 * i % 17)}) + "\n" for i in range(40))
    (tmp_path / "documents.jsonl").write_text(lines, encoding="utf-8")
    data = {"train": str(tmp_path / "documents.jsonl"), "length": 64, "batch": 4, "layout": layout}
    result = run(tmp_path, data=data, precision=precision, stages=[stage("ffn")])
    assert result.audit.passed, [e for e in result.audit.evidence if not e.passed]
    padded = run(tmp_path, out="padded", data={**data, "layout": "padded"}, precision=precision, stages=[stage("ffn")])
    first = [json.loads((r.folder / "metrics.jsonl").read_text().splitlines()[0]) for r in (result, padded)]
    print(layout, precision, first)
    assert first[0].keys() == first[1].keys()


def test_a_kept_prefix_changes_nothing(tmp_path: Path) -> None:
    stages = [stage("layers[-1]", steps=60, lr=1e-3)]
    kept = run(tmp_path, out="kept", stages=stages, cache={"prefix": "on", "dir": str(tmp_path / "cache")})
    plain = run(tmp_path, out="plain", stages=stages, cache={"prefix": "off"})
    assert kept.audit.passed
    assert plain.audit.passed
    first, second = weights(kept.folder), weights(plain.folder)
    largest = max((first[n] - second[n]).abs().max().item() for n in first)
    print(f"largest difference {largest:.2e}")
    assert largest < 1e-6
