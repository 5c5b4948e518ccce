"""Whole runs with gradient routes: audited, switched between stages, planned to the byte, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import frostline
import frostline.ready
from frostline.anatomy import Anatomy, read_anatomy
from frostline.audit import Audit, audit
from frostline.engine import Points, place
from frostline.engine.events import StageStarted
from frostline.engine.route_points import RoutePoint
from frostline.errors import RecipeError, RouteError
from frostline.model import load_fake, load_model, load_skeleton
from frostline.plan import StageCost, trace_stage
from frostline.recipe import ScratchModel, StageSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule
from frostline.selection import select

ROWS, LENGTH = 2, 24
STOP = [{"stop": "attn.out"}]


def stages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"learn": "all", "steps": 2, "lr": 3e-3, **settings} for settings in given]


def past_stops(found: Audit) -> list[tuple[str, bool]]:
    return [(e.measured, e.passed) for e in found.evidence if e.claim == "gradients that passed a stop"]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "learn", "routes"),
    [
        ("llama", "ffn", STOP),
        ("gpt2", "all - attn - attn_norm", [{"stop": "attn.out"}, {"stop": "ffn.skip", "layers": 1}]),
        ("mixtral", "attn", [{"stop": "ffn.out", "layers": "1:"}, {"remove": "ffn.skip", "layers": 0}]),
        ("gpt_neox", "layers[1:] | final_norm | head", [{"stop": "block.in", "layers": 1}, {"stop": "embed.out"}]),
    ],
)
def test_a_run_with_routes_passes_its_audit(
    tmp_path: Path, architecture: str, learn: str, routes: list[dict[str, Any]]
) -> None:
    recipe = tiny.recipe(tmp_path, architecture, stages=stages({"learn": learn, "routes": routes}))
    result = frostline.train(recipe, out=tmp_path / "run")
    assert result.audit.passed, result.audit.failures
    assert past_stops(result.audit) == [("none", True)]
    assert all(c.flops_agree for c in result.checks)
    assert len(RunFolder.open(tmp_path / "run").read_lines(tmp_path / "run" / "evidence" / "flow.jsonl")) == 2


def test_a_run_without_routes_says_nothing_of_stops(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, stages=stages({"routes": [{"remove": "ffn.skip", "layers": 1}]}))
    assert past_stops(frostline.train(recipe, out=tmp_path / "run").audit) == []
    assert not (tmp_path / "run" / "evidence" / "gradients.jsonl").read_text().count("NaN")


def test_parts_that_a_stop_cuts_off_do_not_move_and_the_audit_knows_why(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, stages=stages({"routes": STOP}))
    result = frostline.train(recipe, out=tmp_path / "run")
    rows = {r.component: r for r in result.audit.rows}
    assert rows["layers[1].ffn.up"].verdict == "moved"
    assert rows["layers[1].attn.q"].verdict != "moved"
    samples = RunFolder.open(tmp_path / "run").read_gradients()
    assert samples
    for sample in samples:
        for piece, norm in sample.norms.items():
            cut = "self_attn." in piece or "input_layernorm" in piece
            assert (norm is None) == cut, piece


@pytest.fixture(scope="module")
def routed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, each with a stop of another kind."""
    folder = tmp_path_factory.mktemp("routed")
    given = ([{"stop": "attn.out", "layers": 1}], [{"stop": "ffn.out"}], [{"stop": "block.in", "layers": 2}])
    recipe = tiny.recipe(folder, stages=stages(*({"routes": routes} for routes in given)))
    result = frostline.train(recipe, out=folder / "run")
    assert past_stops(result.audit) == [("none", True)]
    return folder / "run"


def edited(run: Path, stage: int, part: str, norm: float) -> Audit:
    """The audit after someone wrote a norm for a tensor into a sample of one stage."""
    lines = (run / "evidence" / "gradients.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    sample = next(s for s in samples if s["stage"] == stage)
    sample["norms"][next(p for p in sample["norms"] if part in p)] = norm
    text = "\n".join(json.dumps(s) for s in samples)
    (run / "evidence" / "gradients.jsonl").write_text(f"{text}\n", encoding="utf-8")
    return audit(run)


@pytest.mark.parametrize(
    ("stage", "part", "named"),
    [
        (0, "layers.1.self_attn.q_proj", "layers[1].attn.q (stage stage-1)"),
        (1, "layers.2.mlp.down_proj", "layers[2].ffn.down (stage stage-2)"),
        (2, "layers.0.mlp.up_proj", "layers[0].ffn.up (stage stage-3)"),
        (2, "layers.1.input_layernorm", "layers[1].attn_norm (stage stage-3)"),
    ],
)
def test_a_gradient_behind_a_stop_fails_the_audit_by_name(
    routed_run: Path, tmp_path: Path, stage: int, part: str, named: str
) -> None:
    run = Path(shutil.copytree(routed_run, tmp_path / "run"))
    found = edited(run, stage, part, 1e-9)
    assert past_stops(found) == [(named, False)]
    assert not found.passed


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        (0, "layers.0.self_attn.q_proj"),  # another layer
        (1, "layers.1.self_attn.q_proj"),  # another branch
        (2, "layers.2.mlp.up_proj"),  # past the stop
    ],
)
def test_a_gradient_beside_a_stop_does_not_fail_the_audit(
    routed_run: Path, tmp_path: Path, stage: int, part: str
) -> None:
    run = Path(shutil.copytree(routed_run, tmp_path / "run"))
    assert past_stops(edited(run, stage, part, 0.5)) == [("none", True)]


def test_each_stage_has_its_own_routes_and_the_model_has_none_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []
    original = frostline.ready.load_weights

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        models.append(original(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr("frostline.ready.load_weights", load)
    seen: dict[str, list[str]] = {}

    def observe(event: object) -> None:
        if isinstance(event, StageStarted):
            seen[event.stage.name] = stopped()

    def stopped() -> list[str]:
        return [
            n for n, m in models[0].named_modules() if isinstance(m, RoutePoint) and (m.stop_output or m.stop_input)
        ]

    recipe = tiny.recipe(
        tmp_path,
        stages=stages(
            {"name": "a", "routes": [{"stop": "attn.out", "layers": 0}]},
            {"name": "b"},
            {"name": "c", "routes": [{"stop": "ffn.out", "layers": 2}, {"stop": "block.in", "layers": 1}]},
        ),
    )
    result = frostline.train(recipe, out=tmp_path / "run", observers=[observe])
    assert result.audit.passed
    assert seen == {
        "a": ["model.layers.0.self_attn"],
        "b": [],
        "c": ["model.layers.1", "model.layers.2.mlp"],
    }
    assert stopped() == []
    blocked: dict[int, set[str]] = {}
    for sample in RunFolder.open(tmp_path / "run").read_gradients():
        blocked.setdefault(sample.stage, set()).update(
            p.split(".weight")[0] for p, norm in sample.norms.items() if norm is None
        )
    assert blocked[0] == {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"} | {"model.layers.0.input_layernorm"}
    assert blocked[1] == set()
    assert {"model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"} <= blocked[2]
    assert "model.layers.1.mlp.up_proj" not in blocked[2]


def test_a_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = tiny.recipe(tmp_path, stages=stages({"routes": STOP}))
    frostline.train(recipe, out=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not any(isinstance(m, RoutePoint) for m in model.modules())


def test_a_run_with_local_losses_trains_every_block_and_passes_its_audit(tmp_path: Path) -> None:
    settings = {"learn": "all", "routes": [{"stop": "block.in", "layers": "1:"}], "local_loss": "shared"}
    result = frostline.train(tiny.recipe(tmp_path, stages=stages(settings)), out=tmp_path / "run")
    assert result.audit.passed
    assert all(r.verdict == "moved" for r in result.audit.rows if r.component.startswith("layers"))
    assert past_stops(result.audit) == [], "a layer before a stop learns from its own loss"
    assert all(c.flops_agree for c in result.checks)


@pytest.mark.slow
def test_two_runs_with_the_same_routes_end_with_the_same_bytes_and_with_others_do_not(tmp_path: Path) -> None:
    for name, routes in (("a", STOP), ("b", STOP), ("c", [])):
        recipe = tiny.recipe(tmp_path, stages=stages({"learn": "ffn | embed", "routes": routes}))
        frostline.train(recipe, out=tmp_path / name)
    saved = [(tmp_path / n / "model" / "model.safetensors").read_bytes() for n in "abc"]
    assert saved[0] == saved[1]
    assert saved[0] != saved[2]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "routes", "words"),
    [
        ("gpt_neox", [{"stop": "attn.skip"}], "parallel and share one skip: it is block.skip"),
        ("llama", [{"stop": "ssm.out"}], "there is none here; there are block.in, attn.out"),
        ("llama", [{"stop": "attn.out"}, {"remove": "block.skip", "layers": 2}], "layer 2: every branch has a skip"),
    ],
)
def test_a_point_that_the_model_does_not_have_is_refused_by_stage_before_anything_is_written(
    tmp_path: Path, architecture: str, routes: list[dict[str, Any]], words: str
) -> None:
    recipe = tiny.recipe(tmp_path, architecture, stages=stages({}, {"routes": routes}))
    with pytest.raises(RecipeError) as caught:
        frostline.train(recipe, out=tmp_path / "run")
    assert str(caught.value).startswith("stages[1].routes: ")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ([{"stop": "attn.out", "layers": 3}], "layers 3: the model has layers 0 to 2"),
        ([{"stop": "attn.out"}, {"stop": "attn.out", "layers": 1}], "two routes at attn.out in layer 1"),
    ],
)
def test_layers_that_are_not_there_or_cut_twice_are_refused_before_anything_is_written(
    tmp_path: Path, routes: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        frostline.train(tiny.recipe(tmp_path, stages=stages({"routes": routes})), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loop_of_ones_own_needs_points_for_routes(tmp_path: Path) -> None:
    from frostline.engine import LoopSettings, next_token_loss, train_loop

    model = tiny.model("llama")
    spec = StageSpec.model_validate({"learn": "all", "steps": 1, "lr": 1e-3, "routes": STOP})
    schedule = Schedule.of([("s", spec, select(read_anatomy(model), "all"))])
    with pytest.raises(RouteError, match="no points were placed"):
        train_loop(
            model, read_anatomy(model), schedule, lambda *_: [], next_token_loss,
            folder=RunFolder.create(tmp_path / "run"), settings=LoopSettings(),
        )  # fmt: skip


# --- the plan ---------------------------------------------------------------------------------------------------------


def cost(source: ScratchModel, learn: str, *, real: bool, **settings: Any) -> StageCost:
    """A stage's step, on real tensors or on fake ones."""
    model, mode = (load_model(source), None) if real else load_fake(source)
    anatomy: Anatomy = read_anatomy(load_skeleton(source))
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, **settings})
    stage = Schedule.of([("only", spec, select(anatomy, learn, ties="together"))]).stages[0]
    points: Points = place(model, anatomy, local_losses=spec.local_loss != "none")
    return trace_stage(
        model, anatomy, stage, rows=ROWS, length=LENGTH, n_vocabulary=tiny.VOCABULARY, points=points, mode=mode
    )  # type: ignore[arg-type]


PLANNED: list[tuple[str, dict[str, Any]]] = [
    ("all", {"routes": STOP}),
    ("ffn", {"routes": STOP}),
    ("ffn", {"routes": STOP, "accumulate": 2}),
    ("attn", {"routes": [{"stop": "ffn.out"}, {"stop": "block.in", "layers": 2}]}),
    ("all", {"routes": [{"stop": "ffn.skip", "layers": 1}, {"remove": "attn.skip", "layers": 0}]}),
    ("attn.heads[1]", {"routes": [{"stop": "ffn.out"}]}),
    ("all", {"routes": [{"stop": "block.in", "layers": "1:"}], "local_loss": "shared"}),
    ("all", {"local_loss": "shared"}),
]


def test_the_plan_of_a_stage_with_routes_is_the_real_step_to_the_last_byte() -> None:
    source = ScratchModel(**tiny.config("llama"))
    for learn, settings in (PLANNED[i] for i in (1, 3, 5, 6)):
        assert cost(source, learn, real=False, **settings) == cost(source, learn, real=True, **settings), settings


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "olmo2", "qwen3"])
def test_every_plan_of_a_stage_with_routes_is_the_real_step_to_the_last_byte(architecture: str) -> None:
    source = ScratchModel(**tiny.config(architecture))
    for learn, settings in PLANNED:
        assert cost(source, learn, real=False, **settings) == cost(source, learn, real=True, **settings), settings


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_stop_beside_what_learns_saves_flops_and_bytes(architecture: str) -> None:
    """Attention frozen with its output stopped: no backward pass through it, and nothing is kept for one."""
    source = ScratchModel(**tiny.config(architecture))
    exact, stopped = (cost(source, "ffn", real=False, routes=r) for r in ([], STOP))
    assert stopped.total_flops < exact.total_flops
    assert stopped.of_kind("forward") == exact.of_kind("forward")
    assert stopped.activation_bytes < exact.activation_bytes
    assert stopped.peak_bytes < exact.peak_bytes
    attention = [part for part in stopped.flops if ".attn" in part]
    assert attention
    assert all(sum(stopped.flops[p].values()) == stopped.flops[p]["forward"] for p in attention)


def test_the_plan_names_the_parts_that_a_stop_keeps_from_learning() -> None:
    source = ScratchModel(**tiny.config("llama"))
    assert cost(source, "ffn", real=False, routes=STOP).unreached == ()
    cut = cost(source, "layers[1:]", real=False, routes=[{"stop": "attn.out", "layers": 1}]).unreached
    assert set(cut) == {f"layers[1].{p}" for p in ("attn.q", "attn.k", "attn.v", "attn.o", "attn_norm")}
    alone = cost(source, "all", real=False, routes=[{"stop": "block.in"}]).unreached
    assert {n.split(".")[0] for n in alone} == {"embed", "layers[0]", "layers[1]"}
    local = cost(source, "all", real=False, routes=[{"stop": "block.in", "layers": "1:"}], local_loss="shared")
    assert local.unreached == ()


def test_local_losses_cost_a_head_per_block() -> None:
    source = ScratchModel(**tiny.config("llama"))
    plain, local = (cost(source, "all", real=False, local_loss=how) for how in ("none", "shared"))
    assert local.flops["head"]["forward"] == 3 * plain.flops["head"]["forward"]
    assert local.logit_bytes >= 3 * ROWS * LENGTH * tiny.VOCABULARY * 4
