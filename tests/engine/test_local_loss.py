"""Local losses: every block learns as if it were trained alone, and what they share learns from all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import route_families as families
import tiny
import torch
from route_families import differing, relative_difference, route
from torch import nn
from torch.nn import functional

from frostline.anatomy import find_blocks, module_of, read_anatomy
from frostline.data import Batch
from frostline.engine import Points, loss_of, place, set_routes
from frostline.engine.local_loss import local_loss
from frostline.engine.recompute import recompute_blocks
from frostline.errors import RouteError
from frostline.recipe import StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

IDS = torch.randint(3, families.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
BATCH = Batch(input_ids=IDS[:, :-1], labels=IDS[:, 1:])
WITH_LOGITS_OF_THEIR_TAIL = [
    n if n in ("llama", "gpt2", "neox-parallel", "bloom", "mixtral") else pytest.param(n, marks=pytest.mark.slow)
    for n in families.FAMILIES
    if n not in ("cohere", "gemma2", "minicpm3", "gpt1")
]


def blocks_of(name: str, **fields: Any) -> tuple[nn.Module, Points, list[str]]:
    """A model whose blocks are cut apart, its points, and the blocks' names."""
    model = families.build(name, dtype=torch.float32, **fields)
    points = place(model, read_anatomy(model), local_losses=True)
    set_routes(points, [route("block.in", (1, 2))])
    return model, points, [n for n, _ in find_blocks(model)]


def gradients_of(model: nn.Module, loss: torch.Tensor) -> families.Gradients:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def loss_of_block(model: nn.Module, index: int) -> torch.Tensor:
    """The loss of one block's output alone, read from a plain model with a hook."""
    anatomy = read_anatomy(model)
    given: list[torch.Tensor] = []
    hook = find_blocks(model)[index][1].register_forward_hook(lambda _m, _a, out: given.append(families.first(out)))
    model(input_ids=BATCH.input_ids, use_cache=False)
    hook.remove()
    logits = module_of(model, anatomy, "head")(module_of(model, anatomy, "final_norm")(given[0]))
    return functional.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), reduction="sum")


@pytest.mark.parametrize("name", WITH_LOGITS_OF_THEIR_TAIL)
def test_a_blocks_own_gradients_are_bitwise_those_of_training_it_alone(name: str) -> None:
    model, points, names = blocks_of(name)
    plain = families.build(name, dtype=torch.float32)
    found = gradients_of(model, local_loss(points)(model, BATCH))
    for index, block in enumerate(names):
        for n, p in plain.named_parameters():
            p.requires_grad_(n.startswith(f"{block}."))
        alone = gradients_of(plain, loss_of_block(plain, index))
        own = {n: g for n, g in alone.items() if n.startswith(f"{block}.") and g is not None}
        assert own, block
        assert not differing({n: found[n] for n in own}, own), block


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "bloom", "mixtral", "olmo2"])
def test_what_the_blocks_share_has_the_sum_of_their_gradients(name: str) -> None:
    model, points, names = blocks_of(name)
    plain = families.build(name, dtype=torch.float32)
    anatomy = read_anatomy(plain)
    found = gradients_of(model, local_loss(points)(model, BATCH))
    tail = {s.tensor for c in anatomy.components if c.name.split(".")[0] in ("final_norm", "head") for s in c.slices}
    tail = {anatomy.ties.get(n, n) for n in tail} & found.keys()
    assert len(tail) >= 2
    total: dict[str, torch.Tensor] = {}
    for index, block in enumerate(names):
        for n, p in plain.named_parameters():  # what lies before a block, the embedding too, has no part in its loss
            p.requires_grad_(n in tail or n.startswith(f"{block}."))
        if index and anatomy.ties:
            embedding = plain.get_input_embeddings()  # type: ignore[operator]
            hook = embedding.register_forward_hook(lambda _m, _a, out: out.detach())
        else:
            hook = None
        alone = gradients_of(plain, loss_of_block(plain, index))
        if hook is not None:
            hook.remove()
        for n in tail:
            gradient = alone[n]
            assert gradient is not None
            total[n] = total[n] + gradient if n in total else gradient
    for n in tail:
        assert relative_difference(found[n], total[n]) <= 1e-6, n


def test_the_loss_is_the_sum_of_the_blocks_and_the_last_is_the_models_own() -> None:
    model, points, names = blocks_of("llama")
    plain = families.build("llama", dtype=torch.float32)
    each = [loss_of_block(plain, i) for i in range(len(names))]
    assert torch.equal(local_loss(points)(model, BATCH), torch.stack(each).sum())
    logits = plain(input_ids=BATCH.input_ids).logits
    own = functional.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), reduction="sum")
    assert torch.equal(each[-1], own)


def test_labels_that_count_for_nothing_count_in_no_blocks_loss() -> None:
    model, points, _ = blocks_of("llama")
    labels = BATCH.labels.clone()
    labels[1:] = -100
    masked = local_loss(points)(model, Batch(input_ids=BATCH.input_ids, labels=labels))
    one = local_loss(points)(model, Batch(input_ids=BATCH.input_ids[:1], labels=BATCH.labels[:1]))
    assert masked.item() == pytest.approx(one.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "neox-parallel"])
def test_gradients_are_bitwise_the_same_with_recomputed_blocks(name: str) -> None:
    model, points, _ = blocks_of(name)
    wanted = gradients_of(model, local_loss(points)(model, BATCH))
    again = families.build(name, dtype=torch.float32)
    again_points = place(again, read_anatomy(again), local_losses=True)
    recompute_blocks([block for _, block in find_blocks(again)])
    set_routes(again_points, [route("block.in", (1, 2))])
    assert not differing(gradients_of(again, local_loss(again_points)(again, BATCH)), wanted)


@pytest.mark.parametrize("name", ["cohere", "gemma2", "minicpm3"])
def test_models_that_scale_or_cap_their_logits_are_refused_with_the_reason(name: str) -> None:
    model = families.build(name, dtype=torch.float32)
    with pytest.raises(RouteError, match=r"not head\(final_norm\(last block\)\) \(they are scaled or capped\)"):
        place(model, read_anatomy(model), local_losses=True)


def test_a_model_without_a_final_norm_is_refused_with_the_reason() -> None:
    model = families.build("gpt1", dtype=torch.float32)
    with pytest.raises(RouteError, match="local losses need a final norm and a head"):
        place(model, read_anatomy(model), local_losses=True)


def test_finding_norm_and_head_leaves_the_model_as_it_was() -> None:
    model = families.build("llama", dtype=torch.float32).train()
    before = copy.deepcopy(model.state_dict())
    points = place(model, read_anatomy(model), local_losses=True)
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.watched or point.read is not None or point.gave is not None for point in points.every())


@pytest.mark.parametrize("name", families.FEW)
def test_cut_apart_without_local_losses_only_the_last_block_norm_and_head_learn(name: str) -> None:
    model = families.build(name)
    points = families.with_points(model, name)
    set_routes(points, [route("block.in")])
    _, found = families.gradients(model)
    anatomy = read_anatomy(model)
    learning = {
        c.name.split(".")[0]
        for c in anatomy.components
        for s in c.slices
        if s.tensor in found and found[s.tensor] is not None
    }
    wanted = {"layers[2]", "final_norm", "head"} - ({"head"} if anatomy.ties else set())
    assert learning - ({"embed"} if anatomy.ties else set()) == wanted


def stage_of(local: str) -> Stage:
    spec = StageSpec.model_validate({"learn": "all", "steps": 1, "lr": 1e-3, "local_loss": local})
    return Schedule.of([("blocks", spec, select(tiny.anatomy("llama"), "all"))]).stages[0]


def test_a_stage_with_local_losses_needs_points() -> None:
    with pytest.raises(RouteError, match="stage blocks: local losses need the points of a transformers model"):
        loss_of(stage_of("shared"), None)


def test_a_stage_with_local_losses_minimises_them_and_another_does_not() -> None:
    model, points, _ = blocks_of("llama")
    shared = loss_of(stage_of("shared"), points)(model, BATCH)
    assert torch.equal(shared, local_loss(points)(model, BATCH))
    assert loss_of(stage_of("none"), points)(model, BATCH) < shared
