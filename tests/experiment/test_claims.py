from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import all_types
import pytest
import tiny
import torch
from torch import nn

from frostline.data import Batch
from frostline.engine import loss_of as bench_loss_of
from frostline.engine.stage_switch import Active, switch
from frostline.experiment import bench as bench_module
from frostline.experiment import claims as claims_module
from frostline.experiment import moe_claims
from frostline.experiment.bench import Claims
from frostline.experiment.claims import claims_markdown, claims_to_json, measure_claims
from frostline.moe import mixture_of
from frostline.schedule import Schedule
from frostline.selection import select


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(tiny.VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])


def broken(claims: Claims) -> list[str]:
    return [c.belief for c in claims.claims if not c.holds]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "olmo2", "mixtral", "gemma", "qwen3", "gpt_neox"])
def test_every_claim_holds_and_has_numbers(architecture: str) -> None:
    model = tiny.model(architecture)
    before = {n: p.clone() for n, p in model.named_parameters()}
    claims = measure_claims(model, batch(), name=architecture)
    assert not broken(claims)
    assert {c.key for c in claims.claims} == {"S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11"}
    settled = [c for c in claims.claims if c.verdict != "NOT MEASURED HERE"]
    unsettled = {"llama": 0, "mixtral": 1, "qwen3": 0, "olmo2": 0}.get(architecture, 2)
    assert len(claims.claims) - len(settled) == unsettled, "what no exact way is known to upcycle, or is a mixture"
    assert all(c.numbers and any(ch.isdigit() for ch in c.measured) for c in settled)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the weights must be put back"
    json.dumps(claims_to_json(claims))
    assert claims_markdown(claims).count("\n") == len(claims.claims) + 1


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mpt", "gemma2", "opt", "deepseek_v3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_every_claim_holds_on_other_families_too(model_type: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (4, 25))
    data = Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])
    assert not broken(measure_claims(all_types.small_model(model_type).eval(), data, name=model_type))


def test_detached_attention_is_biased_below_the_last_layer_and_exact_in_it() -> None:
    claims = measure_claims(tiny.model("llama"), batch(), name="llama")
    numbers = next(c.numbers for c in claims.claims if c.key == "S7")
    cosines = [numbers[f"ffn_cosine_layer_{i}"] for i in range(3)]
    assert cosines[2] == pytest.approx(1.0, abs=1e-6)
    assert all(c is not None and c < 0.9999 for c in cosines[:2])


def test_the_embedding_gradient_is_that_of_the_residual_path_alone() -> None:
    """Reference: replay the same forward pass with the attention outputs as constants."""
    model = tiny.model("llama").double().eval()
    data = batch()
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out: outputs.append(out[0].detach().clone()))
        for layer in model.model.layers
    ]
    model(input_ids=data.input_ids)
    for h in hooks:
        h.remove()
    embedded = model.model.embed_tokens(data.input_ids).detach().requires_grad_()
    replay = iter(outputs)
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out: (next(replay), *out[1:]))
        for layer in model.model.layers
    ]
    logits = model(inputs_embeds=embedded).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.labels.flatten()).backward()
    for h in hooks:
        h.remove()
    claims = measure_claims(model, data, name="llama")
    numbers = next(c.numbers for c in claims.claims if c.key == "S7")
    assert numbers["embedding_gradient_norm"] == pytest.approx(float(embedded.grad.norm()), rel=1e-6)  # type: ignore[union-attr]


def everything_learns_instead(parameters: Any, anatomy: Any, stage: Any, **kwargs: Any) -> Active:
    spec = stage.spec.model_copy(update={"lr": 1e-3})  # rates by part may lack one for the rest
    schedule = Schedule.of([("all", spec, select(anatomy, "all"))])
    return switch(parameters, anatomy, schedule.stages[0], **kwargs)


def test_an_ffn_that_does_not_move_breaks_the_claim_that_it_learns_over_random_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_module.Bench, "update", lambda _, active: active.optimizer.zero_grad())
    assert any("never learned" in b for b in broken(measure_claims(tiny.model("llama"), batch(), name="llama")))


def test_attention_that_moves_breaks_the_claim_that_only_the_ffn_learns_over_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_module, "switch", everything_learns_instead)
    assert any("never learned" in b for b in broken(measure_claims(tiny.model("llama"), batch(), name="llama")))


def test_a_switch_that_does_not_freeze_breaks_the_claims_on_freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "switch", everything_learns_instead)
    found = broken(measure_claims(tiny.model("llama"), batch(), name="llama"))
    assert any("only the FFN" in belief for belief in found)
    assert any("zero freezes" in belief for belief in found)
    assert any("frozen again" in belief for belief in found)
    assert any("keeps its state for all" in belief for belief in found)
    assert any("experts and router alone" in belief for belief in found)


def test_state_that_is_lost_at_a_switch_breaks_the_claim_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetting(parameters: Any, anatomy: Any, stage: Any, *, leaving: Any, **_: Any) -> Active:
        if leaving is not None:
            leaving.ownership.release()
        return switch(parameters, anatomy, stage, memory={}, leaving=None)

    monkeypatch.setattr(bench_module, "switch", forgetting)
    (belief,) = broken(measure_claims(tiny.model("llama"), batch(), name="llama"))
    assert "goes on with the optimizer state" in belief


def test_one_rate_for_all_parts_breaks_the_claim_that_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_rate(parameters: Any, anatomy: Any, stage: Any, **kwargs: Any) -> Active:
        active = switch(parameters, anatomy, stage, **kwargs)
        for group in active.optimizer.param_groups:
            group["lr"] = 1e-3
        return active

    monkeypatch.setattr(bench_module, "switch", one_rate)
    (belief,) = broken(measure_claims(tiny.model("llama"), batch(), name="llama"))
    assert "share one learning rate" in belief


def test_another_loss_breaks_the_claim_about_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(stage: Any, points: Any) -> Any:
        loss = bench_loss_of(stage, points)
        return lambda model, data: loss(model, replace(data, labels=data.labels.roll(1, 1)))

    monkeypatch.setattr(bench_module, "loss_of", shifted)
    assert any("by one loss" in b or "one loss together" in b for b in broken(llama_claims()))


def test_a_mixture_that_is_another_function_breaks_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(dense: Any, **settings: Any) -> nn.Module:
        made = mixture_of(dense, **settings)
        with torch.no_grad():
            made.model.layers[0].mlp.experts.down_proj[0] *= 1.01  # type: ignore[index, operator, union-attr]
        return made

    monkeypatch.setattr(moe_claims, "mixture_of", other)
    assert any("another function" in b for b in broken(llama_claims()))


def test_routers_that_stay_frozen_break_the_claim_about_experts_and_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_routers(parameters: Any, anatomy: Any, stage: Any, **kwargs: Any) -> Active:
        if stage.spec.learn != "experts | router":
            return switch(parameters, anatomy, stage, **kwargs)
        schedule = Schedule.of([("experts", stage.spec, select(anatomy, "experts"))])
        return switch(parameters, anatomy, schedule.stages[0], **kwargs)

    monkeypatch.setattr(bench_module, "switch", without_routers)
    assert broken(llama_claims()) == ["With the shared attention frozen, experts and router alone can be trained."]


def llama_claims() -> Claims:
    return measure_claims(tiny.model("llama"), batch(), name="llama")


def test_an_update_that_skips_a_part_breaks_the_claim_that_everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_one(parameters: Any, anatomy: Any, stage: Any, **kwargs: Any) -> Active:
        active = switch(parameters, anatomy, stage, **kwargs)
        skipped = active.ownership.owned[3].value
        for group in active.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not skipped]
        return active

    monkeypatch.setattr(bench_module, "switch", skip_one)
    assert any("one step updates" in b for b in broken(measure_claims(tiny.model("llama"), batch(), name="llama")))


def test_gradients_that_do_not_pass_through_attention_break_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")

    class Stopped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x.detach())

    attention = model.model.layers[1].self_attn
    original = attention.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden_states.detach() + 0 * hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    assert any("blocks" in b for b in broken(measure_claims(model, batch(), name="stopped")))


def test_a_detach_that_cuts_the_residual_breaks_the_claim_on_detaching(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def cut_blocks(bench: Any, _part: str) -> Any:
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out: out.detach() if isinstance(out, torch.Tensor) else out)
            for layer in bench.model.model.layers
        ]
        yield
        for h in hooks:
            h.remove()

    monkeypatch.setattr(claims_module, "_detached_outputs", cut_blocks)
    assert any("Detaching" in b for b in broken(measure_claims(tiny.model("llama"), batch(), name="llama")))


def test_an_expert_that_no_token_reaches_is_counted_not_hidden() -> None:
    model = tiny.model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[:3].sum(0)  # rarely the largest, and then…
    data = batch()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # …equal logits: ties go to the first experts
    claim = measure_claims(model, data, name="mixtral").claims[1]
    assert claim.holds
    assert claim.numbers["unrouted"] >= 3  # type: ignore[operator]
    assert "got no token" in claim.measured
