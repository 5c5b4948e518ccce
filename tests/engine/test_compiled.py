"""Compiled blocks train what the model itself would: through switches, routes, slices, accumulation and recomputation.

Most tests run the graphs without making code of them (`aot_eager`): what is right or wrong is decided in the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

import frostline
from frostline.engine import StageCompiled, StepDone
from frostline.engine import compiled as module
from frostline.errors import CompileError, RecipeError
from frostline.model import load_model
from frostline.recipe import ScratchModel
from frostline.run import RunResult

SLOW = pytest.mark.slow
STAGES: list[dict[str, Any]] = [
    {"name": "joint", "learn": "all", "steps": 2, "lr": 3e-3},
    {"name": "ffn", "learn": "ffn", "steps": 2, "lr": 3e-3},
    {"name": "back", "learn": "attn | layers[0]", "steps": 2, "lr": 3e-3},
    {"name": "again", "learn": "ffn", "steps": 2, "lr": 3e-3},
]


@contextmanager
def backend(name: str) -> Iterator[None]:
    with patch.object(module, "BACKEND", name):
        yield


def run(folder: Path, architecture: str = "llama", *, observers: Any = (), **overrides: Any) -> RunResult:
    folder.mkdir(exist_ok=True)
    recipe = tiny.recipe(folder, architecture, **overrides)
    with patch("frostline.ready.plan_of", lambda *_, **__: None), backend("aot_eager"):
        return frostline.train(recipe, out=folder / "run", observers=observers)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r]


def held_against_eager(tmp_path: Path, architecture: str, within: float = 1e-5, **overrides: Any) -> list[Any]:
    """The events of a compiled run whose losses, movements and audit are those of the same run uncompiled."""
    events: list[Any] = []
    plain = run(tmp_path / "plain", architecture, **overrides)
    compiled = run(tmp_path / "compiled", architecture, compile="blocks", observers=[events.append], **overrides)
    assert losses(compiled.folder) == pytest.approx(losses(plain.folder), rel=within)
    assert compiled.audit.passed
    for a, b in zip(compiled.audit.rows, plain.audit.rows, strict=True):
        assert (a.component, a.stage, a.verdict, a.declared) == (b.component, b.stage, b.verdict, b.declared)
    return [e for e in events if isinstance(e, StageCompiled)]


@pytest.mark.parametrize("architecture", ["llama", *(pytest.param(a, marks=SLOW) for a in ("gpt2", "mixtral"))])
def test_what_thaws_after_compilation_learns_and_what_freezes_again_stops(tmp_path: Path, architecture: str) -> None:
    """pytorch 139476: a graph made while attention was frozen must not be used when it is not, nor the other way."""
    extra = {"ties": "together"} if architecture == "gpt2" else {}
    proofs = held_against_eager(tmp_path, architecture, stages=STAGES, **extra)
    assert [p.stage.name for p in proofs] == ["joint", "ffn", "back", "again"]
    new = [p.proof.n_graphs for p in proofs]
    assert new[0] == 1  # blocks that are alike share a graph
    assert new[1] >= 1
    assert new[2] >= 1
    assert new[3] == 0  # a pattern that was there before needs no new one
    assert [p.n_graphs for p in proofs] == [sum(new[: i + 1]) for i in range(4)]
    timing = [json.loads(r) for r in (tmp_path / "compiled/run/timing.jsonl").read_text().splitlines()]
    assert [r["n_graphs"] for r in timing if r.get("event") == "compiled"] == new
    assert "compiled" not in (tmp_path / "compiled/run/metrics.jsonl").read_text()


ROUTES: list[list[dict[str, Any]]] = [
    [{"stop": "attn.out", "layers": "1"}],
    [{"stop": "ffn.skip", "layers": "1:"}, {"stop": "attn.out", "layers": "2"}],
    [{"stop": "block.in", "layers": "2"}],
    [{"remove": "ffn.skip", "layers": "1"}],
]


def test_routes_of_single_layers_are_in_force_although_identical_layers_share_a_graph(tmp_path: Path) -> None:
    stages = [
        {"name": f"r{i}", "learn": "all", "steps": 1, "lr": 1e-3, "routes": r} for i, r in enumerate([*ROUTES, []])
    ]
    proofs = held_against_eager(tmp_path, "llama", stages=stages, evidence={"flow_every": 100})
    assert all(p.proof.n_graphs >= 1 for p in proofs[:-1])
    (attention,) = [
        s
        for s in frostline.audit(tmp_path / "compiled/run").rows
        if s.component == "layers[1].attn.q" and s.stage == "r0"
    ]
    assert attention.verdict == "no gradient"


def test_slices_accumulation_local_losses_and_recomputation_are_as_uncompiled(tmp_path: Path) -> None:
    stages = [
        {"name": "slices", "learn": "attn.heads[1] | ffn.neurons[3:9] | head.rows[2:5]", "steps": 2, "lr": 1e-3,
         "accumulate": 2},
        {"name": "local", "learn": "ffn | norm", "steps": 2, "lr": 1e-3, "local_loss": "shared",
         "routes": [{"stop": "block.in", "layers": "1:"}]},
    ]  # fmt: skip
    held_against_eager(tmp_path, "llama", stages=stages, recompute="blocks", evidence={"flow_every": 100})


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), pytest.param("bf16", 1e-2, marks=pytest.mark.slow)])
def test_single_experts_learn_alone_under_compilation(tmp_path: Path, precision: str, within: float) -> None:
    stages = [{"name": "one", "learn": "experts[1] | router", "steps": 3, "lr": 1e-2}]
    held_against_eager(tmp_path, "mixtral", within, stages=stages, precision=precision)
    said = [[s for s in settings(tmp_path / name) if "weight gradients" in s] for name in ("plain", "compiled")]
    assert not said[0]
    assert len(said[1]) == 1
    assert "compiled" in said[1][0]


def settings(folder: Path) -> list[str]:
    """What a run says of its settings."""
    rows = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    return [f"{r['setting']}: {r['value']} ({r['why']})" for r in rows if r.get("event") == "setting"]


def test_dropout_draws_the_same_numbers_compiled(tmp_path: Path) -> None:
    model = tiny.config("gpt2", resid_pdrop=0.5)
    held_against_eager(tmp_path, "gpt2", model=model, ties="together", stages=STAGES[:1])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("bf16-mixed", marks=SLOW)])
def test_bf16_weights_and_autocast_run_compiled(tmp_path: Path, precision: str) -> None:
    held_against_eager(tmp_path, "llama", within=1e-2, stages=STAGES[:2], precision=precision)


def test_more_than_eight_patterns_stay_compiled(tmp_path: Path) -> None:
    """torch's limit is 8 graphs per function; what is beyond it would run uncompiled."""
    parts = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down", "attn", "ffn"]
    stages = [{"name": f"s{i}", "learn": p, "steps": 1, "lr": 1e-3} for i, p in enumerate(parts)]
    events: list[Any] = []
    counters.clear()
    model = tiny.config("llama", num_hidden_layers=1)
    result = run(tmp_path, model=model, compile="blocks", stages=stages, observers=[events.append])
    assert result.audit.passed
    made = [e.proof.n_graphs for e in events if isinstance(e, StageCompiled)]
    assert sum(made) > 8
    assert all(n >= 1 for n in made)


def test_too_many_graphs_are_an_error_and_not_silence(tmp_path: Path) -> None:
    original = module.Compiled.__init__

    def few(self: Any, blocks: Any, **settings: Any) -> None:
        original(self, blocks, **settings)
        self.limit = 1

    with (
        patch.object(module.Compiled, "__init__", few),
        pytest.raises(CompileError, match="more than 1 graphs"),
    ):
        run(tmp_path, compile="blocks", stages=STAGES)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


# --- planted faults: the comparison with the model itself can fail ----------------------------------------------------


def test_a_graph_that_ignores_a_route_is_found_before_a_step_is_made(tmp_path: Path) -> None:
    """Guards switched off, as torch does for hooks: the graph of the first stage is used for every one."""
    stages = [
        {"name": "free", "learn": "all", "steps": 1, "lr": 1e-3},
        {"name": "stopped", "learn": "all", "steps": 1, "lr": 1e-3, "routes": [{"stop": "attn.out", "layers": "1"}]},
    ]
    original = torch.compile

    def careless(function: Any, **settings: Any) -> Any:
        return original(function, **settings | {"options": {"guard_filter_fn": lambda guards: [False] * len(guards)}})

    done: list[Any] = []
    with (
        patch.object(torch, "compile", careless),
        pytest.raises(CompileError, match=r"compiled, .* uncompiled") as found,
    ):
        run(tmp_path, compile="blocks", stages=stages, observers=[done.append], evidence={"flow_every": 100})
    assert [e.step for e in done if isinstance(e, StepDone)] == [1]
    assert found.value.exit_code == 1  # 2 would say that nothing was started
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("failed", 1, str(found.value))


def test_zeros_in_place_of_no_gradient_are_left_out() -> None:
    leaf = torch.nn.Parameter(torch.ones(3))
    compiled = module.Compiled([], n_stages=1)
    compiled._silent = [leaf]
    leaf.grad = torch.zeros(3)
    compiled.drop_zeros()
    assert leaf.grad is None
    leaf.grad = torch.tensor([0.0, 1e-30, 0.0])  # an expert that a later batch is routed to
    compiled.drop_zeros()
    assert leaf.grad is not None


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_error_says_so_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(CompileError, match=r"needs a C\+\+ compiler"):
        frostline.train(tiny.recipe(tmp_path, compile="blocks"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_block_that_is_no_single_graph_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return original(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(CompileError, match="cannot be compiled"):
        run(tmp_path, compile="blocks")
    assert not (tmp_path / "run").exists()


def test_balancing_losses_and_compilation_are_refused_together(tmp_path: Path) -> None:
    stages = [{"learn": "all", "steps": 1, "lr": 1e-3, "moe": {"balance": 0.01}}]
    with pytest.raises(RecipeError, match="watches routers inside the blocks"):
        tiny.recipe(tmp_path, "mixtral", compile="blocks", stages=stages)


def test_the_pass_that_proof_and_meter_make_keeps_no_more_than_the_inputs_of_blocks() -> None:
    """Uncompiled and whole, it would take the memory that compiling saves."""
    kept: dict[bool, int] = {}
    forwards: dict[bool, list[Any]] = {}
    for lean in (False, True):
        model = load_model(ScratchModel(**tiny.config("llama")), seed=0)
        blocks = list(model.model.layers)
        with backend("aot_eager"):
            made = module.Compiled(blocks, n_stages=1)
        saved: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, into=saved: into.append(t.untyped_storage().nbytes()) or t, lambda t: t
        )
        with hooks, made.lean() if lean else module.as_it_is():
            loss = model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss
        loss.backward()
        kept[lean] = sum(saved)
        forwards[lean] = [p.grad for p in model.parameters()]
        assert all(b.forward is not made._forwards[b] for b in blocks)  # compiled again afterwards
    assert kept[True] < 0.5 * kept[False]
    assert all(torch.equal(a, b) for a, b in zip(forwards[False], forwards[True], strict=True))


def test_a_compiled_runs_plan_is_checked_by_its_flops(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, compile="blocks", stages=STAGES[:2])
    with backend("aot_eager"):
        result = frostline.train(recipe, out=tmp_path / "run")
    assert [(c.flops_agree, c.measured_peak_bytes, c.peak_ratio) for c in result.checks] == [(True, None, None)] * 2
    assert all(c.measured_flops > 0 for c in result.checks)


def test_a_share_of_what_blocks_keep_is_what_they_keep_and_changes_no_gradient() -> None:
    kept: dict[float, int] = {}
    gradients: dict[float, list[torch.Tensor | None]] = {}
    for share in (1.0, 0.3):
        model = load_model(ScratchModel(**tiny.config("llama")), seed=0)
        with backend("aot_eager_decomp_partition"):
            made = module.Compiled(list(model.model.layers), n_stages=1, kept=share)
            saved: list[int] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, into=saved: into.append(t.untyped_storage().nbytes()) or t, lambda t: t
            )
            with made.running(), hooks:
                model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
        kept[share] = sum(saved)
        gradients[share] = [p.grad for p in model.parameters()]
    assert kept[0.3] < 0.8 * kept[1.0]  # weights, inputs and what is outside of blocks are kept in any case
    for a, b in zip(gradients[1.0], gradients[0.3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_run_that_keeps_a_share_trains_as_one_that_keeps_all(tmp_path: Path) -> None:
    held_against_eager(tmp_path, "llama", stages=STAGES[:2])
    assert any("recompute: 0.8" in line for line in settings(tmp_path / "compiled"))
    asked = run(tmp_path / "asked", compile="blocks", stages=STAGES[:2], recompute=0.6)
    assert asked.audit.passed
    assert losses(asked.folder) == pytest.approx(losses(tmp_path / "compiled/run"), rel=1e-5)
