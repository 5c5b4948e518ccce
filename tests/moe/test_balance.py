"""Balancing losses: closed forms, finite differences, an independent reference; the same under any division."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch

import frostline
from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine import next_token_loss, step
from frostline.engine.recompute import recompute_blocks
from frostline.engine.router_loss import RouterLoss
from frostline.errors import ModelError
from frostline.moe import balance_sums, choice_of, find_sites, load_of, logits_of, shares, watch_routers
from frostline.recipe import MoeSpec

CPU = torch.device("cpu")
N = 8


def losses(logits, index, counts=None):
    """(balance, z) of one layer, as means over tokens."""
    counts = torch.ones(len(logits)) if counts is None else counts
    balance, z = balance_sums(logits, shares(load_of(index, counts, logits.shape[-1])), counts)
    return balance / counts.sum(), z / counts.sum()


# --- closed forms


def test_the_balancing_loss_is_1_when_everything_is_balanced():
    tokens = torch.arange(4 * N) % N
    balance, _ = losses(torch.zeros(4 * N, N), tokens[:, None])
    assert balance.item() == pytest.approx(1, abs=1e-6)


def test_the_balancing_loss_is_n_when_one_expert_gets_everything():
    logits = torch.full((16, N), -50.0)
    logits[:, 3] = 50
    balance, _ = losses(logits, torch.full((16, 1), 3))
    assert balance.item() == pytest.approx(N, rel=1e-6)


def test_the_z_loss_is_the_squared_logarithm_of_n_at_zero_logits():
    _, z = losses(torch.zeros(5, N), torch.zeros(5, 1, dtype=torch.int64))
    assert z.item() == pytest.approx(math.log(N) ** 2, rel=1e-6)


def test_two_layers_that_collapse_apart_are_not_taken_for_balance():
    """transformers pools its layers, so layers on experts {0, 1} and {2, 3} look balanced (2.0 of 2.0 for top-2)."""
    values = []
    for first in (0, 2):
        logits = torch.full((6, 4), -50.0)
        logits[:, first : first + 2] = 0
        values.append(losses(logits, torch.tensor([[first, first + 1]] * 6))[0].item())
    assert sum(values) / 2 == pytest.approx(2, rel=1e-6)  # 4 · (½·½ + ½·½); balanced would be 1


def test_load_counts_choices_of_the_tokens_that_count():
    index = torch.tensor([[0, 1], [1, 2], [3, 3]])
    assert load_of(index, torch.tensor([1, 1, 0]), 4).tolist() == [1, 2, 1, 0]
    assert shares(torch.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_those_of_central_differences(which):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    share, counts = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1, 1, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda x: balance_sums(x, share, counts)[which], (logits,), rtol=1e-7)


# --- in a model


@pytest.fixture
def mixtral():
    """A tiny Mixtral in fp64 with routers that prefer some experts."""
    model = tiny.model("mixtral").double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for site in find_sites(model, read_anatomy(model)):
            site.router.weight.mul_(20)
    return model


def rows(n=8, length=12, seed=0):
    ids = torch.randint(tiny.VOCABULARY, (n, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())


def gradients(model, batches, loss, seed=0):
    """(loss, all gradients) of one step."""
    model.zero_grad(set_to_none=True)
    value = step(model, batches, loss, seed=seed, device=CPU).loss
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def router_loss(model, **spec):
    return RouterLoss(next_token_loss, MoeSpec(**spec), read_anatomy(model))


def reference(model, batch, *, balance, z):
    """The loss of a step written once more, from transformers' own record of the routers' logits."""
    out = model(batch.input_ids, output_router_logits=True, use_cache=False)
    total = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten())
    for logits in out.router_logits:
        p = logits.softmax(-1)
        hot = torch.nn.functional.one_hot(p.topk(2).indices, p.shape[-1]).double().mean((0, 1))
        total = total + balance * p.shape[-1] * (hot * p.mean(0)).sum() / len(out.router_logits)
        total = total + z * logits.logsumexp(-1).square().mean() / len(out.router_logits)
    return total


def test_the_loss_and_its_gradient_are_those_of_an_independent_reference(mixtral):
    batch = rows()
    value, found = gradients(mixtral, [batch], router_loss(mixtral, balance=0.3, z=0.1))
    mixtral.zero_grad(set_to_none=True)
    expected = reference(mixtral, batch, balance=0.3, z=0.1)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    own = torch.cat([p.grad.flatten() for p in mixtral.parameters()])
    assert (found - own).norm() < 1e-11 * own.norm()


@pytest.mark.parametrize("over", ["step", "row"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_loss_and_gradient_do_not_depend_on_accumulation(mixtral, over, n):
    loss = router_loss(mixtral, balance=1.0, z=0.1, over=over)
    whole, expected = gradients(mixtral, [rows()], loss)
    value, found = gradients(mixtral, rows().split(n), loss)
    assert value == pytest.approx(whole, rel=1e-12)
    assert (found - expected).norm() < 1e-11 * expected.norm()


def test_with_the_load_of_each_micro_batch_they_would(mixtral):
    loss = router_loss(mixtral, balance=1.0)
    _, expected = gradients(mixtral, [rows()], loss)
    _, found = gradients(mixtral, rows().split(4), lambda model, batch: loss(model, batch))
    assert (found - expected).norm() > 1e-4 * expected.norm()


def test_the_load_of_a_step_is_that_of_its_own_dropout():
    model = tiny.model("mixtral", attention_dropout=0.5).train()
    loss, seen = router_loss(model, balance=1.0), []
    batches = rows().split(2)

    class Spy(RouterLoss):
        def share(self, routed, site, batch, counts):
            seen.append((site.name, load_of(choice_of(routed, site), counts, 4), self.load[site.name]))
            return super().share(routed, site, batch, counts)

        def for_step(self, *args):
            made = super().for_step(*args)
            return Spy(made.inner, made.spec, made.anatomy, load=made.load)

    step(model, batches, Spy(loss.inner, loss.spec, loss.anatomy), seed=3, device=CPU)
    for name in {n for n, _, _ in seen}:
        first, second = [s for s in seen if s[0] == name]
        assert torch.equal(first[1] + second[1], first[2])


def test_blocks_that_are_computed_again_give_the_same_bits(mixtral):
    loss = router_loss(mixtral, balance=1.0, z=0.1)
    plain = gradients(mixtral, rows().split(2), loss)
    recompute_blocks([block for _, block in find_blocks(mixtral)])
    again = gradients(mixtral, rows().split(2), loss)
    assert plain[0] == again[0]
    assert torch.equal(plain[1], again[1])


def test_tokens_without_a_target_count_for_nothing(mixtral):
    """Tokens after the last target are not seen by those before, so they can be cut off."""
    batch = rows()
    cut = Batch(input_ids=batch.input_ids[:, :7].contiguous(), labels=batch.labels[:, :7].contiguous())
    masked = batch.labels.clone()
    masked[:, 7:] = -100
    loss = router_loss(mixtral, balance=1.0, z=0.1)
    short, expected = gradients(mixtral, [cut], loss)
    value, found = gradients(mixtral, [Batch(input_ids=batch.input_ids, labels=masked)], loss)
    assert value == pytest.approx(short, rel=1e-12)
    assert (found - expected).norm() < 1e-11 * expected.norm()


def test_nothing_stays_hooked_after_the_pass(mixtral):
    gradients(mixtral, rows().split(2), router_loss(mixtral, balance=1.0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mixtral.modules())


def test_a_dense_model_has_nothing_to_balance():
    model = tiny.model("llama")
    with pytest.raises(ModelError, match="no router"):
        router_loss(model, balance=1.0)(model, rows())


def test_a_router_that_ran_twice_in_one_pass_is_refused(mixtral):
    (site, *_) = find_sites(mixtral, read_anatomy(mixtral))
    with watch_routers([site]) as seen, torch.no_grad():
        mixtral(rows().input_ids)
        mixtral(rows().input_ids)
    with pytest.raises(ModelError, match="ran 2 times"):
        logits_of(seen[site.name], site)


def test_experts_that_are_not_told_who_visits_them_are_refused(mixtral):
    site = find_sites(mixtral, read_anatomy(mixtral))[0]
    with pytest.raises(ModelError, match=r"layers\[0\].ffn.experts is not told"):
        choice_of(SimpleNamespace(index=None), site)


# --- in a run


def test_a_run_with_balancing_passes_its_audit_and_meets_its_plan(tmp_path):
    stages = [
        {"name": "router", "learn": "router", "steps": 2, "lr": 1e-2, "moe": {"balance": 0.1}, "accumulate": 2},
        {"name": "both", "learn": "router | experts", "steps": 2, "lr": 1e-3, "moe": {"balance": 0.1, "z": 0.01}},
        {"name": "rows", "learn": "router", "steps": 2, "lr": 1e-3, "moe": {"balance": 0.1, "over": "row"}},
    ]
    result = frostline.train(tiny.recipe(tmp_path, "mixtral", stages=stages), out=tmp_path / "run")
    assert result.audit.passed
    assert len(result.checks) == 3
    for check in result.checks:
        assert check.flops_agree


def test_balancing_a_dense_model_is_refused_before_anything_is_written(tmp_path):
    stages = [{"learn": "ffn", "steps": 2, "lr": 1e-3, "moe": {"balance": 0.1}}]
    with pytest.raises(ModelError, match="no router; leave them out"):
        frostline.train(tiny.recipe(tmp_path, "llama", stages=stages), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def load_lines(folder):
    return [json.loads(line) for line in (folder / "evidence" / "load.jsonl").read_text().splitlines()]


def test_the_load_of_every_step_is_recorded_once_whatever_the_division_and_what_is_computed_again(tmp_path):
    stage = {"learn": "router | experts", "steps": 3, "lr": 1e-3, "moe": {"balance": 0.1}}
    found = []
    for name, more in (("a", {}), ("b", {"recompute": "blocks"}), ("c", {"accumulate": 2}), ("d", {"flow": 1})):
        evidence = {"evidence": {"flow_every": 1}} if more.pop("flow", None) else {}
        stages = [{**stage, "accumulate": more.pop("accumulate", 1)}]
        frostline.train(tiny.recipe(tmp_path, "mixtral", stages=stages, **more, **evidence), out=tmp_path / name)
        found.append(load_lines(tmp_path / name))
    assert found[0] == found[1] == found[2] == found[3]
    assert [row["step"] for row in found[0]] == [1, 2, 3]
    for row in found[0]:
        assert {sum(load) for load in row["load"].values()} == {4 * 32 * 2}


def test_a_run_without_balancing_records_no_load(tmp_path):
    stages = [{"learn": "router | experts", "steps": 1, "lr": 1e-3}]
    frostline.train(tiny.recipe(tmp_path, "mixtral", stages=stages), out=tmp_path / "run")
    assert not (tmp_path / "run" / "evidence" / "load.jsonl").exists()


def test_a_balancing_loss_spreads_a_load_that_was_uneven(tmp_path):
    """Routers that all but collapse at first; only they learn."""
    stages = [{"learn": "router", "steps": 40, "lr": 3e-2, "moe": {"balance": 1.0}, "clip": None}]
    result = frostline.train(tiny.recipe(tmp_path, "mixtral", stages=stages), out=tmp_path / "run")
    assert result.audit.passed
    rows = load_lines(tmp_path / "run")
    busiest = [max(max(load) / sum(load) for load in row["load"].values()) for row in rows]
    assert sum(busiest[-8:]) / 8 < sum(busiest[:3]) / 3
    assert max(busiest[-8:]) <= 2 / 4
