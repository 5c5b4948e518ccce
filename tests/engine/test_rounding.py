"""bf16 weights: rounding by chance against closed forms, masters through switches, and what of an update is shown."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from frostline.anatomy import put, read_anatomy, take, whole
from frostline.data import Batch
from frostline.engine.loss import next_token_loss
from frostline.engine.optimizers import Optimizers
from frostline.engine.owned import own
from frostline.engine.rounding import Rounding, n_shown, round_by_chance, update
from frostline.engine.stage_switch import Active, switch
from frostline.engine.step import step
from frostline.model import load_model
from frostline.randomness import derive_seed
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 numbers below and above (equal to the value, where bf16 holds it), by integer arithmetic of its own."""
    toward_zero = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    exact = toward_zero == values
    away = torch.where(exact, toward_zero, (toward_zero.view(torch.int32) + (1 << 16)).view(torch.float32))
    return torch.minimum(toward_zero, away), torch.maximum(toward_zero, away)


def test_rounding_by_chance_gives_one_of_the_two_neighbours_and_leaves_what_bf16_holds() -> None:
    values = torch.cat([torch.randn(4000, generator=seeded()) * s for s in (1e-30, 1e-3, 1.0, 1e20)])
    low, high = neighbours(values)
    for seed in range(8):
        rounded = round_by_chance(values, seeded(seed)).float()
        assert bool(((rounded == low) | (rounded == high)).all())
    held = values.bfloat16().float()
    assert torch.equal(round_by_chance(held, seeded()).float(), held)
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(round_by_chance(special, seeded()).float().view(torch.int32), special.view(torch.int32))
    assert bool(round_by_chance(torch.tensor([float("nan")]), seeded()).isnan().all())


@pytest.mark.parametrize("share", [1 / 65536, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_by_chance_goes_away_from_zero_as_often_as_the_binomial_law_says(share: float, sign: float) -> None:
    """Between 1 and 1 + 2^-7 lie 2^16 fp32 numbers: the k-th one is rounded up with probability k / 2^16."""
    n = 400_000
    k = round(share * 65536)
    values = torch.full((n,), sign * (1 + k * 2**-23))
    up = int((round_by_chance(values, seeded(k)).float().abs() > 1).sum())
    p = k / 65536
    assert abs(up - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1  # five standard deviations


def test_the_sum_of_many_small_steps_is_right_on_average_where_rounding_to_nearest_loses_all_of_them() -> None:
    """256 steps of 2^-11, a sixteenth of bf16's spacing above 1, on 20 000 elements: mean 1.125, and its deviation."""
    results = {}
    for rounding in ("nearest", "stochastic"):
        weight = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        ownership = own({"w": weight}, [whole("w", (20_000,))])
        sgd = Optimizers([torch.optim.SGD([o.value for o in ownership.owned], lr=1.0)])
        for i in range(256):
            weight.grad = torch.full_like(weight, -(2**-11))
            update(sgd, ownership, rounding, name="sgd", seed=i)  # type: ignore[arg-type]
            sgd.zero_grad()
        results[rounding] = weight.detach().double()
    assert bool((results["nearest"] == 1).all())
    # a step goes up by 2^-7 with probability 1/16: mean 256/16 steps, variance 256 · 1/16 · 15/16 of them
    mean, deviation = 1 + 16 * 2**-7, (15 * 2**-14) ** 0.5
    assert results["stochastic"].mean().item() == pytest.approx(mean, abs=5 * deviation / 20_000**0.5)
    assert results["stochastic"].std().item() == pytest.approx(deviation, rel=0.05)


# --- through the engine ---------------------------------------------------------------------------------------------


def one_stage(anatomy: Any, learn: str, **settings: Any) -> Stage:
    spec = StageSpec.model_validate({"learn": learn, "steps": 100, "lr": 1e-3, **settings})
    return Schedule.of([("only", spec, select(anatomy, learn))]).stages[0]


def batch(seed: int) -> Batch:
    ids = torch.randint(tiny.VOCABULARY, (4, 17), generator=seeded(seed))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])


def bf16(architecture: str) -> nn.Module:
    return load_model(ScratchModel(**tiny.config(architecture)), dtype=torch.bfloat16)


def entered(model: nn.Module, learn: str, rounding: Rounding, leaving: Active | None = None, **settings: Any) -> Active:
    anatomy = read_anatomy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stage = one_stage(anatomy, learn, **settings)
    return switch(parameters, anatomy, stage, memory={}, leaving=leaving, rounding=rounding)


def run_steps(model: nn.Module, active: Active, n: int, *, first: int = 0) -> None:
    for i in range(first, first + n):
        step(model, [batch(i)], next_token_loss, seed=i, device=CPU)
        active.optimizer.set_rate(1.0)
        active.update(seed=derive_seed(0, "update", i))
        active.optimizer.zero_grad()


def test_only_what_learns_has_a_master_and_the_weights_are_the_masters_rounded() -> None:
    model = bf16("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    active = entered(model, "ffn.down | attn.heads[1]", "masters")
    run_steps(model, active, 3)
    held = sum(o.value.numel() for o in active.ownership.owned)
    assert all(o.value.dtype == torch.float32 and o.is_master for o in active.ownership.owned)
    assert held == active.stage.selection.n_elements
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    learning = {o.piece.tensor for o in active.ownership.owned}
    for o in (o for o in active.ownership.owned if o.value.shape == o.parameter.shape):
        assert torch.equal(o.parameter.detach(), o.value.detach().bfloat16())
        assert not torch.equal(o.value.detach(), o.parameter.detach().float())  # it holds more than bf16 shows
    for name, p in model.named_parameters():
        assert name in learning or torch.equal(p.detach(), before[name])


OPTIMIZERS = ["adamw", "adam", "sgd", "adafactor", "muon", "lion", "adamw8bit"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", ["masters", "stochastic", "nearest"])
def test_every_optimizer_trains_whole_tensors_and_slices_in_bf16_and_nothing_else(name: str, rounding: Any) -> None:
    if name in ("lion", "adamw8bit"):
        pytest.importorskip("bitsandbytes")
    for architecture, learn in (("gpt2", "attn.q | layers[1].ffn"), ("mixtral", "experts[1] | router")):
        model = bf16(architecture)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        rate = 10.0 if name == "sgd" else 1e-2
        active = entered(model, learn, rounding, lr=rate, optimizer={"name": name, "weight_decay": 0.1})
        run_steps(model, active, 3)
        for tensor, old in before.items():
            now = model.get_parameter(tensor).detach()
            allowed = [s for s in active.stage.selection.slices if s.tensor == tensor]
            if allowed and "bias" not in tensor:
                assert not torch.equal(now, old), (architecture, tensor)
            outside = now.clone()
            for s in allowed:
                put(outside, s, take(old, s))
            assert torch.equal(outside, old), (architecture, tensor)


def test_a_step_by_chance_is_the_optimizers_own_step_in_fp32_rounded() -> None:
    """Against torch's AdamW over an fp32 copy: every element is one of the two neighbours of what that gives."""
    weight = nn.Parameter(torch.randn(500, generator=seeded()).bfloat16())
    copy = nn.Parameter(weight.detach().float())
    ownership = own({"w": weight}, [whole("w", (500,))])
    mine = Optimizers([torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=True)])
    reference = torch.optim.AdamW([copy], lr=1e-2, weight_decay=0.1)
    for i in range(4):
        gradient = torch.randn(500, generator=seeded(i + 1)).bfloat16()
        weight.grad, copy.grad = gradient.clone(), gradient.float()
        update(mine, ownership, "stochastic", name="adamw", seed=i)
        reference.step()
        low, high = neighbours(copy.detach())
        off = ((weight.detach().float() - copy.detach()).abs() > (high - low) + 1e-7).sum()
        assert int(off) == 0
        with torch.no_grad():
            copy.copy_(weight.float())  # what the next step starts from
    state = mine.state_of(weight)
    assert state["exp_avg"].dtype == torch.float32
    assert torch.allclose(state["exp_avg"], reference.state[copy]["exp_avg"], rtol=1e-6, atol=1e-8)


def test_the_chance_is_a_function_of_seed_step_and_tensor() -> None:
    found = []
    for seed in (0, 0, 1):
        model = bf16("llama")
        active = entered(model, "ffn", "stochastic")
        for i in range(2):
            step(model, [batch(i)], next_token_loss, seed=i, device=CPU)
            torch.manual_seed(torch.seed())  # the global generator has no part in it
            active.update(seed=derive_seed(seed, "update", i))
            active.optimizer.zero_grad()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_learns_on_keeps_its_master_through_a_switch_however_its_leaves_are_cut() -> None:
    model = bf16("gpt2")
    first = entered(model, "ffn | attn.{q,k}", "masters", lr=1e-5)
    run_steps(model, first, 5)
    masters = {o.piece: o.value.detach().clone() for o in first.ownership.owned}
    learn = "layers[1:].ffn.up | attn.q | final_norm"
    second = entered(model, learn, "masters", leaving=first, optimizer="sgd", state="reset")
    n_kept = 0
    for o in second.ownership.owned:
        old = next((v for p, v in masters.items() if p.tensor == o.piece.tensor), None)
        if old is None:
            assert torch.equal(o.value.detach(), o.parameter.detach().float())
            continue
        n_kept += 1
        kept = old if old.shape == o.value.shape else old[..., : o.value.shape[-1]]
        assert torch.equal(o.value.detach(), kept)
        assert not torch.equal(o.value.detach(), o.value.detach().bfloat16().float())
    assert n_kept == 10  # weight and bias of up in two layers, and of q, which are cut out, in three


def test_weights_in_fp32_are_what_the_optimizer_works_on_whatever_is_chosen() -> None:
    found = {}
    for rounding in ("masters", "stochastic", "nearest"):
        model = tiny.model("llama")
        active = entered(model, "ffn", rounding)  # type: ignore[arg-type]
        assert all(o.value is o.parameter for o in active.ownership.owned)
        run_steps(model, active, 2)
        found[rounding] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(found["masters"], found["nearest"])
    assert torch.equal(found["stochastic"], found["nearest"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_the_share_of_lost_updates_is_the_share_that_bf16_does_not_show(name: str) -> None:
    """Against a copy of everything in fp32: wanted where it changed, lost where rounding it gives the old value."""
    for rate in (1e-5, 1e-3, 1e-1):
        model = bf16("llama")
        twin = load_model(ScratchModel(**tiny.config("llama")))
        twin.load_state_dict(model.state_dict())
        active = entered(model, "layers[1].ffn.up", "nearest", lr=rate, optimizer=name)
        reference = entered(twin, "layers[1].ffn.up", "nearest", lr=rate, optimizer=name)
        step(model, [batch(0)], next_token_loss, seed=0, device=CPU)
        (o,), (r,) = active.ownership.owned, reference.ownership.owned
        assert o.value.grad is not None
        r.value.grad = o.value.grad.float()
        before = o.value.detach().clone()
        shown = active.update(measure=True)
        reference.update()
        wanted = r.value.detach() != before.float()
        lost = wanted & (r.value.detach().bfloat16() == before)
        assert n_shown(shown, o.piece) == (int(wanted.sum()), int(lost.sum()))
        assert active.optimizer.state_of(o.value).get("step", 1) == 1  # measuring was no step


def test_measuring_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.engine import rounding as module

    monkeypatch.setattr(module, "CHUNK", 100)  # in many chunks
    for rounding in ("masters", "stochastic", "nearest"):
        found = []
        for measure in (False, True):
            model = bf16("llama")
            active = entered(model, "ffn | embed", rounding)  # type: ignore[arg-type]
            for i in range(3):
                step(model, [batch(i)], next_token_loss, seed=i, device=CPU)
                shown = active.update(seed=i, measure=measure)
                assert bool(shown) == measure
                active.optimizer.zero_grad()
            state = [v for o in active.ownership.owned for v in active.optimizer.state_of(o.value).values()]
            found.append(torch.cat([t.detach().float().reshape(-1) for t in [*model.parameters(), *state]]))
        assert torch.equal(*found)
