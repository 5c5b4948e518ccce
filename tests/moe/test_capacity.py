"""Capacity and jitter: closed forms, who they reach, and that they are the same however a step is divided."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import frostline
from frostline.anatomy import find_blocks, read_anatomy
from frostline.cli import app
from frostline.data import Batch
from frostline.engine import loss_of, next_token_loss, step
from frostline.engine.dispatch import set_dispatch, take_dropped
from frostline.engine.recompute import recompute_blocks
from frostline.engine.stage_switch import set_modes
from frostline.errors import ModelError, RecipeError
from frostline.moe import capacity_of, choice_of, find_sites, kept, logits_of, watch_routers
from frostline.recipe import StageSpec, recipe_from_dict
from frostline.schedule import Schedule
from frostline.selection import select

CPU = torch.device("cpu")

# --- closed forms


@pytest.mark.parametrize(
    ("factor", "length", "chosen", "n", "room"),
    [
        (1.0, 128, 2, 8, 32),
        (1.25, 128, 2, 8, 40),
        (2.0, 128, 2, 8, 64),
        (1.0, 10, 1, 4, 3),  # 2.5, rounded up
        (1.25, 10, 1, 4, 4),  # 3.125
        (2.0, 10, 1, 4, 5),
        (1.1, 100, 1, 10, 11),  # 11 exactly, which floating point makes 12
        (0.01, 4, 1, 4, 1),
        (1.3333333333333333, 300_000, 8, 128, 25_000),  # with all its digits it leaves 64 bits
        (10_000.0, 1_000_000, 8, 8, 10_000_000_000),
    ],
)
def test_an_expert_takes_its_equal_share_times_the_factor_rounded_up(factor, length, chosen, n, room):
    assert capacity_of(factor, lengths=torch.tensor([length, 0]), chosen=chosen, n_experts=n).tolist() == [room, 0]


@pytest.mark.parametrize("capacity", [0, 1e-320, 1e308, 10**30])
def test_a_capacity_that_no_expert_can_have_is_refused_by_its_name(capacity):
    stages = [{"learn": "router", "steps": 1, "lr": 1e-3, "moe": {"capacity": capacity}}]
    with pytest.raises(RecipeError, match=r"stages\[0\]\.moe\.capacity"):
        recipe_from_dict({"model": tiny.config("mixtral"), "data": {"train": "text.txt"}, "stages": stages})


def routing(seed, rows, length, n, k):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(n, generator=generator) * 2
    return (torch.randn(rows * length, n, generator=generator) + bias).topk(k).indices


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.integers(2, 6), st.integers(1, 7))
def test_dropped_are_the_choices_beyond_each_experts_capacity(seed, rows, length, n, room):
    index = routing(seed, rows, length, n, k=min(2, n))
    keep = kept(index, n_experts=n, capacity=torch.full((rows,), room))
    expected = 0
    for row in index.view(rows, length, -1):
        expected += sum(max(0, int((row == e).sum()) - room) for e in range(n))
    assert int((~keep).sum()) == expected


def test_the_first_tokens_of_a_row_are_taken():
    index = torch.tensor([[0], [0], [1], [0], [1], [1]])
    assert kept(index, n_experts=2, capacity=torch.tensor([2]))[:, 0].tolist() == [True, True, True, False, True, False]
    assert kept(index, n_experts=2, capacity=torch.tensor([1, 1]))[:, 0].tolist() == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]


def test_what_follows_in_a_row_changes_nothing_before_it():
    index, room = routing(0, 1, 12, 4, 2), torch.tensor([3])
    for cut in range(1, 12):
        whole = kept(index, n_experts=4, capacity=room)
        assert torch.equal(kept(index[:cut], n_experts=4, capacity=room), whole[:cut])


def test_choices_of_experts_that_compute_nothing_are_never_dropped():
    index = torch.tensor([[2], [2], [3], [0], [0]])
    assert kept(index, n_experts=2, capacity=torch.tensor([1]))[:, 0].tolist() == [True, True, True, True, False]


# --- in a model


def rows(n=8, length=12):
    ids = torch.randint(tiny.VOCABULARY, (n, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())


def model_of(architecture="mixtral"):
    model = tiny.model(architecture)
    with torch.no_grad():
        for site in find_sites(model, read_anatomy(model)):
            site.router.weight.mul_(30)  # preferences, so that something is dropped
    return model


def stage_of(model, learn="experts | router", **moe):
    spec = StageSpec(learn=learn, steps=1, lr=1.0, moe=moe or None)
    return Schedule.of([("s", spec, select(read_anatomy(model), learn))]).stages[0]


def gradients(model, stage, batches, seed=0):
    model.zero_grad(set_to_none=True)
    set_modes(model, stage)
    loss = step(model, batches, loss_of(stage, None), seed=seed, device=CPU).loss
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def same(first, second):
    return all(torch.equal(second[n], g) if g is not None else second[n] is None for n, g in first.items())


def test_dropped_choices_are_counted_layer_by_layer():
    model, batch = model_of(), rows()
    stage, sites = stage_of(model, capacity=1.0), find_sites(model, read_anatomy(model))
    set_modes(model, stage)
    with watch_routers(sites) as seen:
        next_token_loss(model, batch)
    room = 6  # 12 tokens of 2 choices over 4 experts
    expected = {}
    for site in sites:
        per_row = choice_of(seen[site.name], site).view(8, -1)
        loads = torch.stack([torch.bincount(r, minlength=4) for r in per_row])
        expected[site.name] = int((loads - room).clamp(min=0).sum())
    assert take_dropped(model) == expected
    assert sum(expected.values()) > 0
    assert take_dropped(model) == {}


def test_a_dropped_choice_adds_nothing_to_its_token():
    model = model_of()
    sites = find_sites(model, read_anatomy(model))
    set_modes(model, stage_of(model, capacity=0.01))  # one choice per expert and row
    with watch_routers(sites[:1]) as seen:
        outputs = []
        handle = sites[0].experts.register_forward_hook(lambda *a: outputs.append(a[2]))
        next_token_loss(model, rows(n=1))
        handle.remove()
    index = choice_of(seen[sites[0].name], sites[0])
    keep = kept(index, n_experts=4, capacity=torch.tensor([1]))
    assert not outputs[0].flatten(0, -2)[~keep.any(1)].any()
    assert outputs[0].flatten(0, -2)[keep.any(1)].any(1).all()


def test_with_room_for_everything_nothing_changes():
    model, batch = model_of(), rows()
    plain = gradients(model, stage_of(model, z=0.0), [batch])
    roomy = gradients(model, stage_of(model, capacity=4.0), [batch])
    assert (plain[0], same(plain[1], roomy[1])) == (roomy[0], True)
    assert not any(take_dropped(model).values())


def test_capacity_does_not_depend_on_accumulation():
    model, batch = model_of(), rows()
    stage = stage_of(model, capacity=1.0)
    whole = gradients(model, stage, [batch])
    dropped = take_dropped(model)
    parts = gradients(model, stage, batch.split(4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert take_dropped(model) == dropped
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_padding_takes_no_room_and_is_not_dropped():
    model, batch = model_of(), rows(n=2)
    stage = stage_of(model, capacity=1.0)
    set_modes(model, stage)
    short = replace(batch, input_ids=batch.input_ids[:, :8], labels=batch.labels[:, :8])
    next_token_loss(model, short)
    expected = take_dropped(model)
    mask = (torch.arange(12) < 8).long().expand(2, -1)
    next_token_loss(model, replace(batch, attention_mask=mask))
    assert take_dropped(model) == expected
    assert sum(expected.values()) > 0


@pytest.mark.parametrize("moe", [{"capacity": 1.0}, {"jitter": 0.1}])
def test_a_recomputed_block_drops_and_jitters_as_it_did(moe):
    plain, again = model_of(), model_of()
    recompute_blocks([block for _, block in find_blocks(again)])
    first, second = (gradients(m, stage_of(m, **moe), [rows()]) for m in (plain, again))
    assert (first[0], same(first[1], second[1])) == (second[0], True)
    assert take_dropped(plain) == take_dropped(again)


@pytest.mark.parametrize("moe", [{"capacity": 0.5}, {"jitter": 0.3}])
def test_measurements_and_later_stages_know_nothing_of_it(moe):
    model, batch = model_of(), rows()
    with torch.no_grad():
        before = next_token_loss(model.eval(), batch)
        set_modes(model, stage_of(model, **moe))
        trained = next_token_loss(model, batch)
        assert trained != before
        assert next_token_loss(model.eval(), batch) == before
        set_modes(model, stage_of(model))
        assert next_token_loss(model, batch) == before
        set_modes(model, stage_of(model, **moe))
        set_dispatch(model, None)
        assert next_token_loss(model, batch) == before


def test_jitter_reaches_the_routers_input_and_nothing_else():
    model, batch = model_of(), rows()
    sites = find_sites(model, read_anatomy(model))
    inputs = {"router": [], "experts": []}
    first = sites[0]
    hook = first.experts.register_forward_pre_hook(lambda _m, args: inputs["experts"].append(args[0].clone()))
    logits = []
    for moe in ({}, {"jitter": 0.2}):
        set_modes(model, stage_of(model, **moe))
        torch.manual_seed(0)
        with torch.no_grad(), watch_routers([first]) as seen:
            next_token_loss(model, batch)
        logits.append(logits_of(seen[first.name], first))
    hook.remove()
    assert torch.equal(*inputs["experts"])
    assert not torch.equal(*logits)
    x = inputs["experts"][0]
    bound = 0.2 * (x.abs() @ first.router.weight.abs().T)
    assert ((logits[1] - logits[0]).abs() <= bound + 1e-5).all()


def test_jitter_is_a_function_of_seed_step_and_micro_batch():
    model, batch = model_of(), rows()
    stage = stage_of(model, jitter=0.2)
    first, again, other = (gradients(model, stage, batch.split(2), seed=s) for s in (1, 1, 2))
    assert (first[0], same(first[1], again[1])) == (again[0], True)
    assert first[0] != other[0]
    drawn = []
    site = find_sites(model, read_anatomy(model))[0]
    equal = Batch(input_ids=batch.input_ids[:1].repeat(2, 1), labels=batch.labels[:1].repeat(2, 1))
    hook = site.router.register_forward_hook(lambda *a: drawn.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    gradients(model, stage, equal.split(2), seed=1)
    hook.remove()
    assert not torch.equal(*drawn)  # equal rows, two micro-batches


def test_a_model_that_cannot_do_it_says_so():
    dense = tiny.model("llama")
    with pytest.raises(ModelError, match="has no router"):
        set_modes(dense, stage_of(dense, "ffn", capacity=1.0))


# --- in runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity")
    stages = [
        {"learn": "experts", "steps": 3, "lr": 1e-3, "accumulate": 2, "moe": {"capacity": 1.0, "jitter": 0.05}},
        {"learn": "experts", "steps": 2, "lr": 1e-3, "moe": {"z": 0.001}},
    ]
    return folder, frostline.train(tiny.recipe(folder, "mixtral", stages=stages), out=folder / "run")


def test_dropped_choices_of_every_step_are_written_down(run):
    lines = [json.loads(line) for line in (run[0] / "run" / "evidence" / "load.jsonl").read_text().splitlines()]
    assert [sorted(line.get("dropped", [])) for line in lines] == [[f"layers[{i}].ffn" for i in range(3)]] * 3 + [
        []
    ] * 2
    for line in lines[:3]:
        for site, n in line["dropped"].items():
            assert 0 <= n < sum(line["load"][site]) == 4 * 32 * 2
    assert run[1].audit.passed


def test_the_plan_counts_what_such_a_step_computes(run):
    assert all(c.flops_agree for c in run[1].checks)


def test_the_same_run_has_the_same_bytes(run, tmp_path):
    again = CliRunner().invoke(app, ["train", str(run[0] / "run" / "recipe.yaml"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    for name in ("model/model.safetensors", "evidence/load.jsonl", "metrics.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (run[0] / "run" / name).read_bytes()


@pytest.mark.parametrize(("key", "value"), [("capacity", 0), ("capacity", -1.0), ("jitter", 1.0), ("jitter", -0.1)])
def test_settings_that_make_no_sense_are_refused(tmp_path, key, value):
    stages = [{"learn": "experts", "steps": 1, "lr": 1e-3, "moe": {key: value}}]
    with pytest.raises(frostline.errors.RecipeError, match=key):
        tiny.recipe(tmp_path, "mixtral", stages=stages)
