"""Whole runs with bf16 weights: what is saved, what it costs, what is told, and what the audit makes of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import frostline
from frostline.deltas import apply_deltas, export_delta, read_delta
from frostline.engine import Chose, Noted, StageEnded, stage_switch
from frostline.engine.optimizers import Optimizers
from frostline.errors import CompileError, ModelError, RecipeError
from frostline.feed import get_tokenizer
from frostline.model import load_model, save_model
from frostline.planning import plan_recipe
from frostline.recipe import ScratchModel, dump_yaml, recipe_from_dict
from frostline.run import RunResult
from frostline.weights import Weights

ROUNDINGS = ["masters", "stochastic", "nearest"]


def run(
    folder: Path, architecture: str = "llama", *, observers: Any = (), planned: bool = False, **overrides: Any
) -> RunResult:
    """A short run; without a plan, which takes most of its time, unless the plan is what a test is about."""
    folder.mkdir(exist_ok=True)
    recipe = tiny.recipe(folder, architecture, **({"precision": "bf16"} | overrides))
    with nullcontext() if planned else patch("frostline.ready.plan_of", lambda *_, **__: None):
        return frostline.train(recipe, out=folder / "run", observers=observers)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_run_in_bf16_passes_its_audit_costs_what_its_plan_says_and_saves_bf16(tmp_path: Path, rounding: str) -> None:
    result = run(tmp_path, rounding=rounding, planned=True)
    assert result.audit.passed
    verdicts = {(r.component, r.stage): r.verdict for r in result.audit.rows}
    assert verdicts["layers[0].ffn.up", "ffn"] == "moved"
    assert verdicts["layers[0].attn.q", "ffn"] == "unchanged"
    assert [c.flops_agree for c in result.checks] == [True, True]
    assert all(0 <= c.measured_peak_bytes - c.planned_peak_bytes < 4096 for c in result.checks)  # the batch itself
    weights = Weights(result.folder / "model")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert json.loads((result.folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    entry = Weights(result.folder / "evidence" / "entry-1.safetensors")
    assert {t.dtype for t in entry.values()} == {torch.bfloat16}


def test_a_frozen_bf16_parameter_saves_its_master_its_gradient_and_its_state(tmp_path: Path) -> None:
    """Bytes per parameter beside its 2 of weight: fp32 master, gradient and two moments; in fp32 the last three."""
    for precision, rounding, expected in (
        ("bf16", None, 4 + 4 + 8),
        ("bf16", "stochastic", 2 + 8),
        ("bf16", "nearest", 2 + 4),
        ("fp32", None, 4 + 8),
    ):
        values = tiny.recipe_dict(tmp_path, precision=precision, rounding=rounding)
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe_from_dict(values).as_dict()))
        stage = plan_recipe(tmp_path / "recipe.yaml").plan.stages[1]
        cost, n = stage.cost, stage.n_learning
        assert cost.copy_bytes == (4 * n if precision == "bf16" and rounding is None else 0)
        assert cost.gradient_bytes + cost.copy_bytes + cost.state_bytes == expected * n


def test_masters_follow_fp32_closer_than_the_nearest_number_and_chance_lies_between(tmp_path: Path) -> None:
    stages = [{"name": "ffn", "learn": "ffn", "steps": 30, "lr": 1e-4}]
    reference = run(tmp_path / "fp32", precision="fp32", stages=stages)
    start = load_model(tiny.recipe(tmp_path).model)
    trained = load_model(str(reference.folder / "model"))
    truth = {n: (p - start.get_parameter(n)).detach() for n, p in trained.named_parameters() if "mlp" in n}
    cosine = {}
    for rounding in ROUNDINGS:
        result = run(tmp_path / rounding, rounding=rounding, stages=stages)
        found = load_model(str(result.folder / "model"))
        moved = [(found.get_parameter(n) - start.get_parameter(n).bfloat16().float()).detach() for n in truth]
        flat, true = (torch.cat([t.reshape(-1) for t in ts]) for ts in (moved, truth.values()))
        cosine[rounding] = torch.nn.functional.cosine_similarity(flat, true, dim=0).item()
    assert cosine["masters"] > 0.9
    assert cosine["masters"] > cosine["stochastic"]
    assert cosine["masters"] > cosine["nearest"] + 0.02


def test_the_share_of_lost_updates_is_told_at_the_first_step_and_kept(tmp_path: Path) -> None:
    events: list[Any] = []
    stages = [{"name": s, "learn": "ffn", "steps": 4, "lr": lr} for s, lr in (("slow", 1e-6), ("fast", 1e-2))]
    result = run(tmp_path, rounding="nearest", stages=stages, observers=[events.append])
    warnings = [e.text for e in events if isinstance(e, Noted) and e.is_warning]
    assert len(warnings) == 1  # at first nothing is lost of the fast stage
    assert "stage slow: 9" in warnings[0]
    slow, fast = (e.lost_updates for e in events if isinstance(e, StageEnded))
    assert slow is not None
    assert fast is not None
    assert slow > 0.9 > fast + 0.3
    endings = [json.loads(line) for line in (result.folder / "endings.jsonl").read_text().splitlines()]
    assert [e["lost_updates"] for e in endings] == [slow, fast]
    (evidence,) = [e for e in result.audit.evidence if "lost to bf16" in e.claim]
    assert evidence.passed
    assert f"{100 * slow:.0f} % (stage slow), {100 * fast:.0f} % (stage fast)" == evidence.measured
    for rounding in ("masters", "stochastic"):
        told: list[Any] = []
        quiet = run(tmp_path / rounding, rounding=rounding, stages=stages, observers=[told.append])
        assert not [e for e in told if isinstance(e, Noted)]
        assert not [e for e in quiet.audit.evidence if "lost to bf16" in e.claim]


# --- why a learning part did not move: each reason planted, none taken for another ------------------------------------


def reasons(result: RunResult) -> dict[str, str]:
    return {r.component: r.verdict for r in result.audit.rows}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_updates_too_small_for_bf16_are_lost_to_rounding_and_nothing_else_is(tmp_path: Path, rounding: str) -> None:
    """Norm weights are 1, where bf16's numbers lie 2^-8 and 2^-7 apart: two steps of 1e-6 do not show."""
    rates = {"norm": 1e-6, "rest": 1e-2}
    stages = [{"name": "only", "learn": "all", "steps": 2, "lr": rates, "optimizer": {"weight_decay": 0.0}}]
    found = reasons(run(tmp_path, rounding=rounding, stages=stages))
    assert {v for c, v in found.items() if "norm" in c} == {"lost to rounding"}
    assert {v for c, v in found.items() if "norm" not in c and c != "position"} == {"moved"}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_an_optimizer_that_forgets_a_part_is_not_excused_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    original = stage_switch.make_optimizer

    def build(owned: Any, *args: Any, **kwargs: Any) -> Optimizers:
        skipped = [o.value for o in owned if o.piece.tensor == "model.layers.1.mlp.up_proj.weight"]
        optimizer = original(owned, *args, **kwargs)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not skipped[0]]
        return optimizer

    monkeypatch.setattr(stage_switch, "make_optimizer", build)
    result = run(tmp_path, rounding=rounding)
    failed = {(r.component, r.stage): r.verdict for r in result.audit.failures}
    assert failed == {("layers[1].ffn.up", s): "LEARNING BUT UNMOVED" for s in ("joint", "ffn")}


def test_a_master_that_is_never_written_back_is_not_excused_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.engine.owned import Ownership

    monkeypatch.setattr(Ownership, "write_back", lambda _: None)
    result = run(tmp_path)
    assert not result.audit.passed
    assert {r.verdict for r in result.audit.failures} == {"LEARNING BUT UNMOVED"}


def test_no_gradient_zero_gradient_and_lost_updates_are_told_apart(tmp_path: Path) -> None:
    routes = [{"stop": "attn.out", "layers": "1"}]
    stages = [
        {"name": "only", "learn": "layers[1].attn | embed.rows[0:2] | layers[2].ffn | final_norm", "steps": 3,
         "lr": {"final_norm": 1e-6, "rest": 1e-2}, "routes": routes, "optimizer": {"weight_decay": 0.0}}
    ]  # fmt: skip
    result = run(tmp_path, stages=stages, evidence={"gradients_every": 1, "flow_every": 100})
    found = reasons(result)
    assert result.audit.passed
    assert {v for c, v in found.items() if c.startswith("layers[1].attn.")} == {"no gradient"}
    assert found["final_norm"] == "lost to rounding"
    assert found["layers[2].ffn.up"] == "moved"
    # rows 0 and 1 are special tokens that the text does not hold: their gradient is exactly zero
    (row,) = [r for r in result.audit.rows if r.component == "embed"]
    assert "zero gradient" in (row.verdict, *(d.rpartition(": ")[2] for d in row.details))


def test_an_expert_that_no_token_is_routed_to_has_a_zero_gradient_and_is_not_lost_to_rounding(tmp_path: Path) -> None:
    """The router's rows are a, -a, b, -b and 0: two of the first four are always positive, and two are chosen."""
    spec = ScratchModel(**tiny.config("mixtral", num_local_experts=5))
    model = load_model(spec, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            p.data[4] = 0
            p.data[1], p.data[3] = -p.data[0], -p.data[2]
    save_model(model, get_tokenizer(tiny.recipe(tmp_path)), tmp_path / "moe")
    stages = [{"name": "only", "learn": "experts", "steps": 2, "lr": 1e-2, "optimizer": {"weight_decay": 0.0}}]
    found = reasons(run(tmp_path / "run", model=str(tmp_path / "moe"), stages=stages))
    of_experts = {c: v for c, v in found.items() if "experts[" in c}
    assert {v for c, v in of_experts.items() if "experts[4]" in c} == {"zero gradient"}
    assert {v for c, v in of_experts.items() if "experts[0]" in c} == {"moved"}


def test_a_gradient_that_is_zero_by_structure_is_no_signal_in_bf16_too(tmp_path: Path) -> None:
    """The key bias of softmax attention shifts all scores of a query alike; in bf16 its gradient is rounding alone."""
    stages = [{"name": "only", "learn": "all", "steps": 4, "lr": 3e-3}]
    result = run(tmp_path, "gpt2", stages=stages, ties="together")
    details = [d for r in result.audit.rows if r.component.endswith("attn.k") for d in r.details]
    assert len(details) == 3
    assert all("c_attn.bias[32:64]: no signal" in d for d in details)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """One model saved in fp32 and in bf16, with a tokenizer."""
    recipe = tiny.recipe(tmp_path)
    tokenizer = get_tokenizer(recipe)
    out = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        save_model(load_model(recipe.model, dtype=dtype), tokenizer, tmp_path / name)
        out[name] = tmp_path / name
    return out


def test_what_happens_to_the_dtype_of_the_base_is_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    stages = [{"name": "ffn", "learn": "ffn", "steps": 1, "lr": 1e-3}]
    for stored in ("fp32", "bf16"):
        for precision in ("fp32", "bf16"):
            told: list[Any] = []
            result = run(
                tmp_path / f"{stored}-{precision}",
                model=str(folders[stored]),
                precision=precision,
                stages=stages,
                observers=[told.append],
            )
            notes = [e.text for e in told if isinstance(e, Noted)]
            assert len(notes) == (stored != precision)
            if notes:
                assert f"100.0 % {stored}" in notes[0]
                assert "rounded to bf16" in notes[0] or "trained and saved in fp32" in notes[0]
            kept = {t.dtype for t in Weights(result.folder / "model").values()}
            assert kept == {torch.bfloat16 if precision == "bf16" else torch.float32}
            assert result.audit.passed


def test_a_delta_of_a_bf16_run_goes_into_its_base_and_gives_the_runs_model(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    for stored in ("fp32", "bf16"):
        result = run(tmp_path / f"run-{stored}", model=str(folders[stored]))
        delta = export_delta(result.folder, tmp_path / f"{stored}.safetensors")
        out = apply_deltas(str(folders[stored]), [delta], tmp_path / f"applied-{stored}")
        assert frostline.diff_checkpoints(out, result.folder).equal


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_experts_of_an_odd_width_train_and_cost_what_was_planned_and_it_is_said(tmp_path: Path, precision: str) -> None:
    said: list[Any] = []
    model, stages = (
        tiny.config("mixtral", intermediate_size=44),
        [{"learn": "experts | router", "steps": 2, "lr": 1e-3}],
    )
    overrides = {"model": model, "stages": stages, "precision": precision}
    result = run(tmp_path, "mixtral", planned=True, observers=[said.append], **overrides)
    assert result.audit.passed
    assert [c.flops_agree for c in result.checks] == [True]
    (line,) = [e for e in said if isinstance(e, Chose) and e.setting == "experts"]
    assert (line.value, "width of 44" in line.why) == ("one by one", True)


def test_compiled_experts_of_an_odd_width_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny.config("mixtral", intermediate_size=44)
    with pytest.raises(CompileError, match="width 44 in bfloat16; use `precision: bf16-mixed`"):
        run(tmp_path, "mixtral", model=model, compile="blocks")
    assert not (tmp_path / "run").exists()


def test_rounding_without_bf16_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rounding is of bf16 weights, and precision is bf16-mixed"):
        tiny.recipe(tmp_path, precision="bf16-mixed", rounding="nearest")


def without_dtype(delta: Path) -> Path:
    """The delta as it was written before deltas said their dtype."""
    with safe_open(delta, framework="pt") as file:
        head = json.loads(file.metadata()["frostline_delta"])
        values = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a mapping)
    del head["dtype"]
    old = delta.with_name(f"old-{delta.name}")
    save_file(values, old, metadata={"frostline_delta": json.dumps(head)})
    return old


def still(folder: Path, base: Path) -> RunResult:
    """A run whose steps are all too small for bf16."""
    stages = [{"name": "norms", "learn": "norm", "steps": 2, "lr": 1e-9, "optimizer": {"weight_decay": 0.0}}]
    return run(folder, model=str(base), stages=stages)


def test_a_delta_of_a_bf16_run_in_which_nothing_moved_goes_into_its_base(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    for stored in ("fp32", "bf16"):
        result = still(tmp_path / f"run-{stored}", folders[stored])
        delta = export_delta(result.folder, tmp_path / f"{stored}.safetensors")
        assert not read_delta(delta).values
        out = apply_deltas(str(folders[stored]), [delta], tmp_path / f"applied-{stored}")
        assert frostline.diff_checkpoints(out, result.folder).equal


def test_an_old_delta_has_the_dtype_of_its_values_and_without_values_is_refused(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    moved = run(tmp_path / "moved", model=str(folders["fp32"]))
    old = without_dtype(export_delta(moved.folder, tmp_path / "moved.safetensors"))
    out = apply_deltas(str(folders["fp32"]), [old], tmp_path / "applied")
    assert frostline.diff_checkpoints(out, moved.folder).equal
    nothing = still(tmp_path / "still", folders["fp32"])
    old = without_dtype(export_delta(nothing.folder, tmp_path / "still.safetensors"))
    with pytest.raises(ModelError, match="an old delta without values does not say whether its run was in bf16"):
        apply_deltas(str(folders["fp32"]), [old], tmp_path / "refused")


def test_deltas_of_runs_with_weights_of_different_dtypes_are_not_applied_together(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    deltas = []
    for precision, learn in (("bf16", "ffn"), ("fp32", "attn")):
        stages = [{"name": "only", "learn": learn, "steps": 1, "lr": 1e-3}]
        result = run(tmp_path / precision, model=str(folders["bf16"]), precision=precision, stages=stages)
        deltas.append(export_delta(result.folder, tmp_path / f"{precision}.safetensors"))
    with pytest.raises(
        ModelError, match=r"bf16\.safetensors is of a run with bf16 .*fp32\.safetensors of one with fp32"
    ):
        apply_deltas(str(folders["bf16"]), deltas, tmp_path / "out")
