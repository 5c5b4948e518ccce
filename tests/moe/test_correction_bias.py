"""The routers' correction bias moves by its rule, where it is asked for, and nowhere else; the audit knows it."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch

from frostline.anatomy import read_anatomy
from frostline.audit import audit, rewind
from frostline.engine import StepDone
from frostline.errors import RecipeError
from frostline.model import load_model
from frostline.moe import choice_of, find_sites, watch_routers
from frostline.prepared import prepare
from frostline.ready import load_weights
from frostline.recipe import recipe_from_dict
from frostline.resume import resume
from frostline.run import train
from frostline.run_folder import RunFolder

DEEPSEEK = {
    "architecture": "deepseek_v3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


def recipe(folder, *stages, **others):
    values = tiny.recipe_dict(folder, stages=[{"lr": 1e-2, "steps": 3, **s} for s in stages])
    return recipe_from_dict({**values, "model": DEEPSEEK, **others})


def biases(model):
    buffers = dict(model.named_buffers())
    return {layer: buffers[BIAS.format(layer)].clone() for layer in (1, 2)}


ASKED = ({"learn": "router", "moe": {"bias": 0.01}}, {"learn": "router"}, {"learn": "experts", "moe": {"z": 0.1}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bias")
    return train(recipe(folder, *ASKED), out=folder / "run")


def test_one_step_moves_every_bias_against_its_load(tmp_path):
    one = recipe(tmp_path, {"learn": "router", "steps": 1, "moe": {"bias": 0.01}})
    prepared = prepare(one)
    model = load_weights(prepared)
    sites = find_sites(model, read_anatomy(model))
    rows = train(one, out=tmp_path / "run")
    load = json.loads((rows.folder / "evidence" / "load.jsonl").read_text())["load"]
    after = biases(load_model(str(rows.folder / "model")))
    for site in sites:
        counts = torch.tensor(load[site.name], dtype=torch.float64)
        expected = 0.01 * (counts.mean() - counts).sign()
        torch.testing.assert_close(after[site.layer].double(), expected, rtol=0, atol=1e-8)
        assert expected.unique().numel() > 1


def test_it_moves_in_the_stage_that_asks_and_in_no_other(run):
    verdicts = {(r.stage, r.component): r for r in run.audit.rows if r.component.endswith("router")}
    for layer in (1, 2):
        first, second, third = (verdicts[f"stage-{i}", f"layers[{layer}].ffn.router"] for i in (1, 2, 3))
        assert any("e_score_correction_bias" in d and d.endswith("moved by rule") for d in first.details)
        assert not any("moved by rule" in d for d in second.details)
        assert third.verdict == "unchanged"
    assert run.audit.passed
    start, *_, end = RunFolder.open(run.folder).read_boundaries()
    name = next(n for n in start.hashes if "layers.1" in n and "correction_bias" in n)
    hashes = [b.hashes[name] for b in RunFolder.open(run.folder).read_boundaries()]
    assert hashes[0] != hashes[1] == hashes[2] == hashes[3] == end.hashes[name]


def test_a_bias_that_moves_without_being_asked_fails_the_audit(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    text = (copy / "recipe.yaml").read_text()
    assert "bias: 0.01" in text
    (copy / "recipe.yaml").write_text(text.replace("bias: 0.01", "bias:"))
    failed = [e.claim for e in audit(copy).evidence if not e.passed]
    assert failed == ["stages that the recipe asks for otherwise than they were scheduled"]


def test_it_does_not_depend_on_accumulation_or_recomputation(run, tmp_path):
    stages = [{**s, "accumulate": 4} for s in ASKED]
    again = train(recipe(tmp_path, *stages, recompute="blocks"), out=tmp_path / "run")
    for one, other in zip(
        (run.folder / "evidence" / "load.jsonl").read_text().splitlines()[:1],
        (again.folder / "evidence" / "load.jsonl").read_text().splitlines()[:1],
        strict=True,
    ):
        assert json.loads(one)["load"] == json.loads(other)["load"]
    first = RunFolder.open(run.folder).read_boundaries()[1].hashes
    second = RunFolder.open(again.folder).read_boundaries()[1].hashes
    same = [n for n in first if "correction_bias" in n and first[n] == second[n]]
    assert len(same) == 2


def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path):
    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    asked = recipe(tmp_path, *ASKED, checkpoint={"every": 1})
    with pytest.raises(KeyboardInterrupt):
        train(asked, out=tmp_path / "run", observers=[stop])
    done = resume(tmp_path / "run")
    assert done.audit.passed
    for name in ("model/model.safetensors", "evidence/load.jsonl", "metrics.jsonl"):
        assert (done.folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_a_run_can_be_taken_back_to_before_it_moved(run):
    model = load_model(str(run.folder / "model"))
    assert any(b.any() for b in biases(model).values())
    rewind(model, RunFolder.open(run.folder), 0)
    assert not any(b.any() for b in biases(model).values())


def test_the_bias_balances_a_router_that_prefers_some_experts(tmp_path):
    asked = recipe(tmp_path, {"learn": "router", "steps": 40, "lr": 1e-8, "moe": {"bias": 0.001}})
    model = load_weights(prepare(asked))
    site = find_sites(model, read_anatomy(model))[0]
    with torch.no_grad(), watch_routers([site]) as seen:
        model.eval()(input_ids=torch.randint(5, 300, (4, 32), generator=torch.Generator().manual_seed(0)))
    uneven = torch.bincount(choice_of(seen[site.name], site).flatten(), minlength=8).max() / 256
    train(asked, out=tmp_path / "run")
    lines = (tmp_path / "run" / "evidence" / "load.jsonl").read_text().splitlines()
    last = [json.loads(line)["load"][site.name] for line in lines[-8:]]
    totals = [sum(step[e] for step in last) for e in range(8)]
    assert max(totals) / sum(totals) - 1 / 8 < 0.5 * (uneven - 1 / 8)


def test_where_nothing_has_such_a_bias_or_the_router_is_frozen_it_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\[0\]\.moe\.bias: no router that learns"):
        prepare(recipe(tmp_path, {"learn": "experts", "moe": {"bias": 0.01}}))
    with pytest.raises(RecipeError, match="correction bias"):
        prepare(
            tiny.recipe(
                tmp_path, "mixtral", stages=[{"learn": "router", "steps": 1, "lr": 1e-3, "moe": {"bias": 0.01}}]
            )
        )


def test_a_delta_carries_it(run, tmp_path):
    from frostline.deltas import export_delta, read_delta

    more = recipe(tmp_path, ASKED[0], model=str(run.folder / "model"))
    folder = train(more, out=tmp_path / "run").folder
    values = read_delta(export_delta(folder, tmp_path / "delta.safetensors")).values
    assert sorted(s.tensor for s in values if "correction" in s.tensor) == [BIAS.format(1), BIAS.format(2)]
