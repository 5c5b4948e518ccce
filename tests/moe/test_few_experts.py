"""What few learning experts cost, counted on real and on fake tensors."""

from __future__ import annotations

import pytest
import tiny
import torch
from all_types import small_model

from frostline.anatomy import read_anatomy
from frostline.engine import loss_of, step
from frostline.engine.stage_switch import switch
from frostline.model import load_model
from frostline.model_source import quiet_transformers
from frostline.plan import Batching, make_plan
from frostline.plan.meter import Meter
from frostline.plan.trace import micro_batches
from frostline.ready import expert_gradients_for
from frostline.recipe import Recipe, ScratchModel, StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

SOURCE = ScratchModel(**tiny.config("mixtral", num_local_experts=8))


def schedule_of(anatomy, learn):
    spec = StageSpec(learn=learn, steps=1, lr=1e-3)
    return Schedule.of([("step", spec, select(anatomy, learn))])


def of_experts(cost):
    return sum(kinds["weight gradients"] for part, kinds in cost.flops.items() if "experts" in part)


def planned(learn, bf16=False):
    anatomy = read_anatomy(load_model(SOURCE))
    return make_plan(SOURCE, schedule_of(anatomy, learn), Batching(rows=4, length=32, bf16=bf16)).stages[0].cost


def counted(learn):
    """Of a real step, on 512 random tokens."""
    model = load_model(SOURCE)
    anatomy, ids = read_anatomy(model), torch.randint(5, 300, (16, 32), generator=torch.Generator().manual_seed(0))
    stage, parameters = schedule_of(anatomy, learn).stages[0], dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, anatomy, stage, memory={}, leaving=None)
    with Meter(parameters) as meter:
        step(model, micro_batches(16, 32, 1, ids), loss_of(stage, None), seed=0, device=ids.device)
    active.ownership.release()
    return sum(n for (name, kind), n in meter.flops.items() if kind == "weight gradients" and "experts" in name)


@pytest.mark.parametrize("bf16", [False, True])
def test_planned_weight_gradients_of_few_experts_are_their_share(bf16):
    whole = of_experts(planned("experts", bf16))
    assert whole == 2 * (4 * 32 * 2) * 3 * 32 * 48 * 3  # choices × three matrices × layers
    assert of_experts(planned("experts[0:2]", bf16)) == whole / 4
    assert of_experts(planned("experts[5]", bf16)) == whole / 8


def test_counted_weight_gradients_are_those_of_the_learning_experts_tokens():
    whole, few, rest = map(counted, ("experts", "experts[0:2]", "experts[2:]"))
    assert whole == 2 * (16 * 32 * 2) * 3 * 32 * 48 * 3
    assert few + rest == whole  # every choice goes to one of the two sets
    assert 0 < few <= 0.30 * whole
    assert planned("experts[0:2]").of_kind("input gradients") == planned("experts").of_kind("input gradients")


def said(model, learn, **keys):
    recipe = Recipe.model_construct(compile="off", **keys)
    schedule = schedule_of(read_anatomy(model), learn)
    return [c.why for c in expert_gradients_for(recipe, model, schedule)]


def test_a_run_says_when_weight_gradients_of_frozen_experts_are_computed():
    ours = load_model(SOURCE)
    with quiet_transformers():
        theirs = small_model("llama4_text").float()
    assert said(ours, "experts[0:2]") == []
    for learn in ("experts", "attn"):  # all or none of a tensor learns: nothing is computed in vain
        assert said(theirs, learn) == []
    (why,) = said(theirs, "experts[0]")
    assert "type's experts" in why
