"""Gradient routes: bitwise the gradients of a model in which the stopped tensors are constants, on every family."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import route_families as families
import tiny
import torch
from route_families import EACH, FAMILIES, FEW, differing, gradients, replayed, route
from torch import nn
from torch.nn import functional

from frostline.anatomy import find_blocks, part_modules, prove_model, read_anatomy, take
from frostline.data import Batch
from frostline.engine import loss_of, next_token_loss, place, set_routes, step
from frostline.engine.place import confirmed_wirings
from frostline.engine.recompute import recompute_blocks, recomputing
from frostline.engine.route_points import SETTINGS, RoutePoint
from frostline.engine.route_trial import tried
from frostline.engine.routes import Points, Signature, Wiring, placed, route_points, signature_of, wire
from frostline.engine.stage_switch import switch
from frostline.errors import RouteError
from frostline.recipe import StageSpec
from frostline.schedule import Route, Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")


def pair(name: str, **fields: Any) -> tuple[nn.Module, Points, nn.Module]:
    """A model with points, the points, and a plain model of the same weights."""
    model = families.build(name, **fields)
    plain = families.build(name, **fields)
    return model, families.with_points(model, name), plain


def stage_of(model: nn.Module, learn: str, **settings: Any) -> Stage:
    anatomy = read_anatomy(model)
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, **settings})
    return Schedule.of([("only", spec, select(anatomy, learn, ties="together"))]).stages[0]


def settings_of(points: Points) -> list[dict[str, Any]]:
    return [{name: getattr(point, name) for name in SETTINGS} for point in points.every()]


def is_exact(name: str, r: Route) -> bool:
    """Whether the reference does not round: its correction is not scaled, and falls where the block adds the skip."""
    return not r.point.endswith(".skip") or (FAMILIES[name].scale == 1 and name != "neox-parallel")


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_a_stop_keeps_every_bit_of_the_logits_and_gives_the_gradient_with_constants_in_its_place(name: str) -> None:
    model, points, plain = pair(name)
    logits, true = gradients(model)
    plain_logits, plain_true = gradients(plain)
    assert torch.equal(logits, plain_logits)
    assert not differing(true, plain_true), "placing alone changed a gradient"
    for r in families.every_route(name):
        if r.mode == "remove":
            continue
        set_routes(points, [r])
        same, found = gradients(model)
        assert torch.equal(same, logits), r
        with replayed(plain, name, r):
            _, wanted = gradients(plain)
        assert not differing(found, wanted, tolerance=0 if is_exact(name, r) else 1e-12), r
        assert differing(found, true, tolerance=1e-6), f"{r} has no effect"
    set_routes(points, ())
    logits_again, again = gradients(model)
    assert torch.equal(logits_again, logits)
    assert not differing(again, true), "without routes the true gradient is back, bitwise"


@pytest.mark.parametrize("name", EACH)
def test_a_removed_residual_is_a_model_that_never_adds_it(name: str) -> None:
    model, points, plain = pair(name)
    logits, true = gradients(model)
    for r in families.every_route(name):
        if r.mode == "stop":
            continue
        set_routes(points, [r])
        other, found = gradients(model)
        with replayed(plain, name, r):
            wanted_logits, wanted = gradients(plain)
        assert families.relative_difference(other, wanted_logits) <= 1e-10, r
        assert not differing(found, wanted, tolerance=1e-10), r
        assert families.relative_difference(other, logits) > 1e-3, f"{r} has no effect"
    set_routes(points, ())
    assert not differing(gradients(model)[1], true)


def check_directions(name: str, *, routes: list[Route], n_directions: int = 8) -> None:
    model, points, plain = pair(name)
    size = 1e-4 if FAMILIES[name].has_experts else 1e-3
    for r in routes:
        set_routes(points, [r])
        _, found = gradients(model)
        with replayed(plain, name, r) as choice:
            group, error = families.worst_direction(plain, found, choice, n_directions=n_directions, step=size)
        assert error <= 1e-6, f"{r}: {group}"


def in_all_layers(name: str) -> list[Route]:
    return [r for r in families.every_route(name) if len(r.layers) != 1]


@pytest.mark.parametrize("name", ["neox-parallel"])
def test_directional_derivatives_are_those_of_the_model_with_constants(name: str) -> None:
    check_directions(name, routes=in_all_layers(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "neox-parallel"])
def test_directional_derivatives_are_those_of_the_model_with_constants_on_every_family(name: str) -> None:
    check_directions(name, routes=in_all_layers(name))


def test_differences_see_a_stop_that_is_not_there() -> None:
    """The check can fail: the true gradient is not the derivative of the model with constants."""
    model, _, plain = pair("llama")
    _, true = gradients(model)
    with replayed(plain, "llama", route("attn.out")) as choice:
        group, error = families.worst_direction(plain, true, choice, n_directions=1, step=1e-3)
    assert error > 0.1, group


def test_several_routes_at_once_are_several_constants_at_once() -> None:
    for name, several in {
        "llama": [route("attn.out", (0, 2)), route("ffn.skip", (1,)), route("block.in", (2,))],
        "gpt2": [route("attn.skip", (1,)), route("attn.out", (2,)), route("embed.out")],
        "bloom": [route("attn.out", (0,)), route("ffn.out", (0,)), route("attn.skip", (2,))],
        "neox-parallel": [route("block.skip", (0,)), route("ffn.out", (2,))],
        "gemma2": [route("attn.skip", (0, 1, 2), "remove"), route("ffn.out", (1,))],
    }.items():
        model, points, plain = pair(name)
        set_routes(points, several)
        logits, found = gradients(model)
        with replayed(plain, name, *several):
            wanted_logits, wanted = gradients(plain)
        assert families.relative_difference(logits, wanted_logits) <= 1e-12, name
        assert not differing(found, wanted, tolerance=1e-12), name


@pytest.mark.parametrize("name", FEW)
def test_with_a_skip_and_all_beside_it_stopped_nothing_below_learns(name: str) -> None:
    model, points, _ = pair(name)
    _, true = gradients(model)
    beside = ("attn.out", "ffn.out", "block.skip") if name == "neox-parallel" else ("attn.out", "attn.skip")
    set_routes(points, [route(p, (1,)) for p in beside])
    _, found = gradients(model)
    anatomy = read_anatomy(model)
    below = {s.tensor for c in anatomy.components if c.name.startswith("layers[0].") for s in c.slices}
    assert below
    assert all(found[n] is None for n in below)
    after = [s.tensor for c in anatomy.components if c.name.startswith("layers[2].") for s in c.slices]
    assert not differing({n: found[n] for n in after}, {n: true[n] for n in after})


def test_without_both_residuals_a_llama_is_the_chain_of_its_branches() -> None:
    """Held against a forward pass written here, without any hook or correction."""
    model, points, plain = pair("llama")
    set_routes(points, [route("attn.skip", mode="remove"), route("ffn.skip", mode="remove")])

    def chain(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return self.mlp(self.post_attention_layernorm(attention))  # type: ignore[no-any-return]

    for _, block in find_blocks(plain):
        block.forward = chain.__get__(block)
    logits, found = gradients(model)
    wanted_logits, wanted = gradients(plain)
    assert torch.equal(logits, wanted_logits)
    assert not differing(found, wanted)


# --- what learns and what does not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "point", "blocked"),
    [
        ("llama", "attn.out", ("attn.", "attn_norm")),
        ("llama", "ffn.out", ("ffn.", "ffn_norm")),
        ("gpt2", "attn.out", ("attn.", "attn_norm")),
        ("mixtral", "ffn.out", ("ffn.", "ffn_norm")),
        ("olmo2", "attn.out", ("attn.",)),  # the norm after attention lies past the stop
        ("gemma2", "ffn.out", ("ffn.", "ffn_norm")),
        ("cohere", "attn.out", ("attn.",)),  # its norm feeds the FFN as well
        ("neox-parallel", "ffn.out", ("ffn.", "ffn_norm")),
        ("bloom", "attn.out", ("attn.", "attn_norm")),
    ],
)
def test_what_lies_behind_a_stop_has_no_gradient_at_all_and_everything_else_has_one(
    name: str, point: str, blocked: tuple[str, ...]
) -> None:
    model, points, _ = pair(name)
    _, true = gradients(model)
    set_routes(points, [route(point, (1,))])
    _, found = gradients(model)
    anatomy = read_anatomy(model)
    cut = {
        s.tensor
        for c in anatomy.components
        for s in c.slices
        if c.name.startswith(tuple(f"layers[1].{part}" for part in blocked))
    }
    assert cut
    assert {n for n, g in found.items() if g is None} == cut | {n for n, g in true.items() if g is None}


@pytest.mark.parametrize("name", FEW)
def test_freezing_is_not_stopping(name: str) -> None:
    """With attention frozen all others have their true gradients; with its output stopped they have others."""
    model, points, _ = pair(name)
    _, true = gradients(model)
    anatomy = read_anatomy(model)
    attention = {s.tensor for c in anatomy.components if ".attn." in c.name for s in c.slices}
    for n, p in model.named_parameters():
        p.requires_grad_(n not in attention)
    logits, frozen = gradients(model)
    assert all(frozen[n] is None for n in attention)
    others = [n for n in true if n not in attention]
    assert not differing({n: frozen[n] for n in others}, {n: true[n] for n in others})
    set_routes(points, [route("attn.out")])
    same_logits, stopped = gradients(model)
    assert torch.equal(same_logits, logits)
    assert all(stopped[n] is None for n in attention)
    changed = differing({n: stopped[n] for n in others}, {n: true[n] for n in others}, tolerance=1e-3)
    embedding = next(s.tensor for c in anatomy.components if c.name == "embed" for s in c.slices)
    assert embedding in changed
    ffn = {s.tensor for c in anatomy.components if c.name.startswith("layers[0].ffn.") for s in c.slices}
    assert ffn <= set(changed)


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_a_stopped_branch_that_is_frozen_makes_no_graph_and_changes_no_gradient(name: str) -> None:
    model, points, _ = pair(name)
    anatomy = read_anatomy(model)
    attention = {s.tensor for c in anatomy.components if ".attn." in c.name for s in c.slices}
    set_routes(points, [route("attn.out")])
    logits, learning = gradients(model)
    for n, p in model.named_parameters():
        p.requires_grad_(n not in attention)
    set_routes(points, [route("attn.out")])
    assert all(b.parts["attn"].graphless for b in points.blocks)
    seen: list[bool] = []
    projection = next(m for n, m in points.blocks[1].parts["attn"].named_modules() if isinstance(m, nn.Linear))
    handle = projection.register_forward_hook(lambda _m, _a, out: seen.append(out.requires_grad))
    same_logits, frozen = gradients(model)
    handle.remove()
    assert seen == [False]
    assert torch.equal(logits, same_logits)
    assert not differing(frozen, learning)


def test_block_in_leaves_the_layers_from_there_on_and_nothing_before() -> None:
    model, points, _ = pair("llama")
    set_routes(points, [route("block.in", (1,))])
    _, found = gradients(model)
    assert {n for n, g in found.items() if g is None} == {
        n for n in found if n.startswith(("model.embed_tokens.", "model.layers.0."))
    }


def test_a_tied_embedding_whose_output_is_stopped_learns_as_a_head_only() -> None:
    tied, points, _ = pair("gpt2", tie_word_embeddings=True)
    apart = families.build("gpt2", tie_word_embeddings=False)
    apart.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.state_dict()["transformer.wte.weight"]})
    _, whole = gradients(tied)
    _, wanted = gradients(apart)
    set_routes(points, [route("embed.out")])
    _, found = gradients(tied)
    head, embedding = wanted["lm_head.weight"], wanted["transformer.wte.weight"]
    learned, both = found["transformer.wte.weight"], whole["transformer.wte.weight"]
    assert head is not None
    assert embedding is not None
    assert learned is not None
    assert both is not None
    assert torch.equal(learned, head)
    assert families.relative_difference(both, head + embedding) <= 1e-14
    assert found["transformer.wpe.weight"] is not None  # positions are added afterwards


def test_a_slice_learns_what_the_whole_would_have_brought_it() -> None:
    """`attn.heads[0]` under a stop at the FFN: the leaves' gradients are that part of the reference's."""
    model = tiny.model("llama").eval()
    plain = tiny.model("llama").eval()
    points = place(model, read_anatomy(model))
    stage = stage_of(model, "attn.heads[0]", routes=[{"stop": "ffn.out"}])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, read_anatomy(model), stage, memory={}, leaving=None)
    set_routes(points, stage.routes)
    ids = torch.randint(tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    hooks = [b.mlp.register_forward_hook(lambda _m, _a, out: out.detach()) for _, b in find_blocks(plain)]
    plain(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(hooks) == 3
    assert active.ownership.owned
    for o in active.ownership.owned:
        whole = plain.get_parameter(o.piece.tensor).grad
        assert whole is not None
        assert o.value.grad is not None
        assert o.value.numel() < whole.numel()
        assert torch.equal(o.value.grad.reshape(o.piece.shape), take(whole, o.piece)), o.piece
    assert all(p.grad is None for p in model.parameters())
    active.ownership.release()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_points_of_its_layout_and_says_why_it_has_no_others(name: str) -> None:
    model = families.build(name)
    points = place(model, read_anatomy(model))
    wanted = families.POINTS[FAMILIES[name].layout]
    assert all(set(b.wiring.points) == set(wanted) for b in points.blocks)
    shown = route_points(points)
    for point in families.EVERY_POINT:
        if point in wanted:
            assert shown[point] == "3 of 3 layers"
            continue
        with pytest.raises(RouteError, match=rf"^stop {point} in layer 1: \w+") as caught:
            set_routes(points, [route(point, (1,))])
        assert str(caught.value).endswith(shown[point])


@pytest.mark.parametrize(
    ("name", "point", "reason"),
    [
        ("gptj", "attn.skip", "attention and FFN are parallel and share one skip: it is block.skip"),
        ("neox-parallel", "ffn.skip", "attention and FFN are parallel and share one skip: it is block.skip"),
        ("gpt1", "attn.skip", "the stream itself is normalised after the sum"),
        ("gpt1", "ffn.skip", "the stream itself is normalised after the sum"),
        ("opt", "ffn.out", "ffn is no module of its own in this block"),
        ("opt", "ffn.skip", "the FFN is no module of its own in this block"),
        ("llama", "block.skip", "every branch has a skip of its own: attn.skip, ffn.skip"),
        ("llama", "ssm.out", "there is none here; there are block.in, attn.out, ffn.out, attn.skip, ffn.skip"),
    ],
)
def test_a_point_that_a_block_does_not_have_is_refused_with_the_reason_and_nothing_changes(
    name: str, point: str, reason: str
) -> None:
    model, points, _ = pair(name)
    set_routes(points, [route("attn.out", (0,))])
    before, (_, gradient) = settings_of(points), gradients(model)
    with pytest.raises(RouteError) as caught:
        set_routes(points, [route("block.in", (1, 2)), route("embed.out"), route(point, (2,))])
    assert str(caught.value) == f"stop {point} in layer 2: {reason}"
    assert settings_of(points) == before
    assert not differing(gradients(model)[1], gradient)


def test_a_block_that_the_tiny_model_does_not_have_is_refused() -> None:
    model = families.build("llama")
    points = placed(model, read_anatomy(model), {})
    with pytest.raises(RouteError, match="layer 0: the tiny model has no block of this kind"):
        set_routes(points, [route("attn.out")])


def test_points_must_be_placed_before_blocks_are_recomputed() -> None:
    model = tiny.model("llama")
    recompute_blocks([block for _, block in find_blocks(model)])
    with pytest.raises(RouteError, match="routes must be placed first"):
        place(model, read_anatomy(model))


def test_placing_twice_is_placing_once() -> None:
    model = families.build("llama")
    first = place(model, read_anatomy(model))
    classes = {n: type(m) for n, m in model.named_modules()}
    second = place(model, read_anatomy(model))
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert [id(p) for p in first.every()] == [id(p) for p in second.every()]


# --- the trial --------------------------------------------------------------------------------------------------------


def read_wirings(name: str) -> tuple[nn.Module, dict[Signature, Wiring]]:
    """A fresh model and its wirings as they were read, not yet tried."""
    model = families.build(name, dtype=torch.float32)
    anatomy, proof = read_anatomy(model), prove_model(model)
    found = {}
    for block in proof.blocks:
        modules = part_modules(model, anatomy, block.layer)
        found[signature_of(modules)] = wire(block, modules, anatomy)
    return model, found


@pytest.mark.parametrize("name", FEW)
def test_a_sound_wiring_passes_its_trial_unchanged(name: str) -> None:
    model, found = read_wirings(name)
    assert tried(model, read_anatomy(model), found) == found


def planted(name: str, **changes: Any) -> Wiring:
    """What is left of a family's wiring after something in it was made wrong and tried."""
    model, found = read_wirings(name)
    ((kind, wiring),) = found.items()
    return tried(model, read_anatomy(model), {kind: replace(wiring, **changes)})[kind]


@pytest.mark.parametrize("readers", [("ffn_norm",), ("attn_norm", "ffn_norm")])
def test_the_trial_refuses_a_skip_that_is_cut_at_another_branchs_reader(readers: tuple[str, ...]) -> None:
    left = planted("llama", skips={"attn.skip": readers, "ffn.skip": ("ffn_norm",)})
    assert "the probes contradict it" in left.refused["attn.skip"]
    assert set(left.points) == {"block.in", "attn.out", "ffn.out", "ffn.skip"}, "the sound one stays"


def test_the_trial_refuses_a_parallel_skip_whose_first_reader_was_taken_for_the_last() -> None:
    left = planted("neox-parallel", skips={"block.skip": ("ffn_norm", "attn_norm")})
    assert "block.skip" not in left.points
    assert "the probes contradict it" in left.refused["block.skip"]


def test_the_trial_refuses_a_parallel_skip_whose_last_reader_was_forgotten() -> None:
    left = planted("neox-parallel", skips={"block.skip": ("attn_norm",)})
    assert left.skips == {}
    assert "the probes contradict it" in left.refused["block.skip"]


def test_the_trial_refuses_a_stop_that_would_cut_the_residual_inside_the_branch() -> None:
    left = planted("bloom", residual_argument={})
    for point in ("attn.out", "ffn.out"):
        assert left.refused[point] == "a stop there cuts the residual stream"
    assert left.points == ("block.in",), "nor can the skips beside them be tried"
    assert left.refused.keys() >= {"attn.skip", "ffn.skip"}


def test_what_the_trial_refused_is_refused_by_name_when_asked_for() -> None:
    left = planted("bloom", residual_argument={})
    model = families.build("bloom")
    kind = signature_of(part_modules(model, read_anatomy(model), 0))
    points = placed(model, read_anatomy(model), {kind: left})
    with pytest.raises(RouteError, match=r"stop attn\.out in layer 0: a stop there cuts the residual stream"):
        set_routes(points, [route("attn.out")])


def test_a_bloom_whose_residual_is_the_normed_stream_is_not_offered_a_skip_past_attention() -> None:
    """`apply_residual_connection_post_layernorm`: the block adds what the norm gave; a cut before it does nothing."""
    model = families.build("bloom", apply_residual_connection_post_layernorm=True)
    (wiring,) = confirmed_wirings(model.config).values()
    for skip in ("attn.skip", "ffn.skip"):
        assert skip in wiring.refused


# --- with everything else ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("point", ["attn.out", pytest.param("ffn.skip", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks
@pytest.mark.usefixtures("fresh_dynamo")
def test_in_compiled_blocks_a_stop_takes_effect_in_its_layer_alone_and_can_be_taken_away(name: str, point: str) -> None:
    model = families.build(name, dtype=torch.float32)
    eager = families.build(name, dtype=torch.float32)
    points, eager_points = families.with_points(model, name), families.with_points(eager, name)
    for _, block in find_blocks(model):
        block.compile(backend="aot_eager")
    logits, true = gradients(model, wide=False)
    for _ in range(2):
        for layers in ((1,), ()):
            routes = [route(point, layers)] if layers else []
            set_routes(points, routes)
            set_routes(eager_points, routes)
            same, found = gradients(model, wide=False)
            _, wanted = gradients(eager, wide=False)
            assert torch.equal(same, logits)
            assert not differing(found, wanted, tolerance=1e-6)
            cut = {n for n, g in found.items() if g is None or not g.any()}
            without = {n for n, g in true.items() if g is None or not g.any()}
            if layers and point == "attn.out":
                assert cut > without
                assert all(".1." in n for n in cut - without)
            elif layers:  # a skip blocks nothing, but what lies below it learns otherwise
                changed = differing(found, true, tolerance=1e-3)
                assert any(".0." in n for n in changed)
                assert not any(".2." in n for n in changed)
            else:
                assert not differing(found, true)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_hook_in_a_compiled_block_would_have_been_ignored() -> None:
    """Why points are classes: the same stop as a hook does nothing once the block is compiled."""
    model = families.build("llama", dtype=torch.float32)
    blocks = [block for _, block in find_blocks(model)]
    for block in blocks:
        block.compile(backend="aot_eager")
    gradients(model, wide=False)
    hook = blocks[1].self_attn.register_forward_hook(lambda _m, _a, out: (out[0].detach(), *out[1:]))
    _, found = gradients(model, wide=False)
    hook.remove()
    assert found["model.layers.1.self_attn.q_proj.weight"] is not None


def check_recomputed(name: str, routes: list[Route]) -> None:
    kept = families.build(name, dtype=torch.float32).train()
    again = families.build(name, dtype=torch.float32).train()
    points, other_points = families.with_points(kept, name), families.with_points(again, name)
    recompute_blocks([block for _, block in find_blocks(again)])
    twice: list[None] = []
    for b in other_points.blocks:
        next(b.block.children()).register_forward_hook(lambda *_: twice.append(None) if recomputing() else None)
    for r in routes:
        set_routes(points, [r])
        set_routes(other_points, [r])
        torch.manual_seed(1)
        logits, wanted = gradients(kept, wide=False)
        torch.manual_seed(1)
        same, found = gradients(again, wide=False)
        assert torch.equal(same, logits), r
        assert not differing(found, wanted), r
    assert twice


@pytest.mark.parametrize("name", FEW)
def test_with_recomputed_blocks_gradients_are_bitwise_the_same(name: str) -> None:
    check_recomputed(name, [r for r in families.every_route(name) if len(r.layers) != 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_with_recomputed_blocks_gradients_are_bitwise_the_same_on_every_family(name: str) -> None:
    check_recomputed(name, families.every_route(name))


def rows_of(ids: torch.Tensor) -> Batch:
    """A micro-batch."""
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("point", ["attn.out", "ffn.out", "block.in"])
def test_in_bf16_over_two_micro_batches_bits_and_gradients_are_those_with_constants(name: str, point: str) -> None:
    model, plain = (families.build(name, dtype=torch.float32) for _ in range(2))
    points, r = families.with_points(model, name), route(point, (1,))
    batches = [rows_of(families.IDS[:1]), rows_of(families.IDS[1:])]

    def run(m: nn.Module) -> tuple[torch.Tensor, families.Gradients]:
        m.zero_grad(set_to_none=True)
        done = step(m, batches, next_token_loss, seed=0, device=CPU, bf16=True)
        return done.loss, {n: p.grad for n, p in m.named_parameters()}

    whole, true = run(plain)
    set_routes(points, [r])
    loss, found = run(model)
    assert torch.equal(loss, whole)
    block = find_blocks(plain)[1][1]
    family = FAMILIES[name]
    if point == "block.in":
        block.register_forward_pre_hook(
            lambda _m, a, k: families.with_stream(a, k, families.stream_of(a, k).detach()), with_kwargs=True
        )
    elif name == "bloom":
        # its branches add their second argument: the value, with the gradient of that argument
        part = block.get_submodule(family.attn if point == "attn.out" else family.ffn or "")
        part.register_forward_hook(
            lambda _m, a, out: families.put(out, families.first(out).detach() + (a[1] - a[1].detach()))
        )
    else:
        part = block.get_submodule(family.attn if point == "attn.out" else family.ffn or "")
        part.register_forward_hook(lambda _m, _a, out: families.put(out, families.first(out).detach()))
    same, wanted = run(plain)
    assert torch.equal(same, whole)
    assert not differing(found, wanted)
    assert differing(found, true, tolerance=1e-3)


def test_logits_keep_their_bits_in_training_with_dropout_too() -> None:
    for name in ("gpt2", "neox-sequential", "bloom", "opt", "mpt"):
        model = families.build(name, dtype=torch.float32)
        points = families.with_points(model, name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        model.train()
        torch.manual_seed(3)
        logits, _ = gradients(model, wide=False)
        for r in families.every_route(name):
            if r.mode == "stop":
                set_routes(points, [r])
                torch.manual_seed(3)
                assert torch.equal(gradients(model, wide=False)[0], logits), (name, r)


# --- the model stays what it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_names_classes_copies_and_saved_files_survive_placing(name: str, tmp_path: Path) -> None:
    model, points, plain = pair(name, dtype=torch.float32)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    for mine, other in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(mine, type(other))
    assert sum(isinstance(m, RoutePoint) for m in model.modules()) == len({id(p) for p in points.every()})
    set_routes(points, [route("attn.out", (1,))])
    _, stopped = gradients(model, wide=False)
    copied = copy.deepcopy(model)
    assert not differing(gradients(copied, wide=False)[1], stopped), "a copy keeps its routes"
    assert next(iter(copied.parameters())) is not next(iter(model.parameters()))
    thawed = pickle.loads(pickle.dumps(model))
    assert not differing(gradients(thawed, wide=False)[1], stopped)
    set_routes(points, ())
    assert not differing(gradients(copied, wide=False)[1], stopped), "routes of a copy are its own"
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    options = {"experts_implementation": "eager"} if FAMILIES[name].has_experts else {}
    again = type(plain).from_pretrained(tmp_path / "saved", attn_implementation="eager", **options).eval()  # type: ignore[attr-defined]
    assert not any(isinstance(m, RoutePoint) for m in again.modules())
    with torch.no_grad():
        assert torch.equal(again(families.IDS).logits, plain(families.IDS).logits)


def test_the_anatomy_read_again_is_the_same() -> None:
    for name in FEW:
        model, _, plain = pair(name)
        mine, other = read_anatomy(model), read_anatomy(plain)
        assert (mine.components, mine.ties) == (other.components, other.ties)


def test_the_loss_of_a_stage_without_local_losses_is_the_next_tokens() -> None:
    model = tiny.model("llama").eval()
    batch = rows_of(torch.randint(tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1)))
    loss = loss_of(stage_of(model, "all"), None)(model, batch)
    logits = model(batch.input_ids).logits.flatten(0, 1)
    wanted = functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum")
    assert torch.equal(loss, wanted)
