"""The fused loss against the plain one, finite differences, and the arithmetic it is to leave out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import all_types
import pytest
import tiny
import torch
from torch import nn

from frostline import train
from frostline.anatomy import Anatomy, find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine import choose_loss, next_token_loss, step
from frostline.engine import linear_loss as linear_loss_module
from frostline.engine.fused_loss import FusedLoss, find_head
from frostline.engine.linear_loss import linear_cross_entropy
from frostline.engine.recompute import recompute_blocks
from frostline.engine.stage_switch import switch
from frostline.errors import ModelError, RecipeError
from frostline.model import load_fake, load_model
from frostline.plan import Meter, StageCost, trace_stage
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_loss_module.CHUNK_ELEMENTS, "cpu", 5 * tiny.VOCABULARY)


def rows(*, ignoring: bool = True) -> Batch:
    ids = torch.randint(tiny.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1).clone()
    if ignoring:
        labels.flatten()[::3] = -100
    return Batch(input_ids=ids[:, :16], labels=labels[:, :16])


def stage_of(anatomy: Anatomy, learn: str) -> Stage:
    spec = StageSpec(learn=learn, steps=1, lr=1e-3)
    return Schedule.of([("only", spec, select(anatomy, learn, ties="together"))]).stages[0]


def gradients(model: nn.Module, learn: str, loss: Any, *, bf16: bool = False, **batch: bool) -> dict[str, torch.Tensor]:
    """Loss and gradients of what is owned, by piece."""
    anatomy = read_anatomy(model)
    stage = stage_of(anatomy, learn)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    active = switch(parameters, anatomy, stage, memory={}, leaving=None)
    model.eval()
    done = step(model, [rows(**batch), rows(**batch)], loss, seed=0, device=CPU, bf16=bf16)
    found = {str(o.piece): o.value.grad.clone() for o in active.ownership.owned if o.value.grad is not None}
    active.ownership.release()
    return {"loss": done.loss, **found}


def fused(model: nn.Module) -> FusedLoss:
    return FusedLoss(find_head(model, read_anatomy(model)))


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-30)).item() for k in a)


class Anew(torch.autograd.Function):
    """The loss, computed again for every backward pass: gradcheck takes several, and it allows one."""

    @staticmethod
    def forward(ctx: Any, labels: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.labels, ctx.tensors = labels, tensors
        return linear_cross_entropy(*tensors, labels)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        tensors = [t.detach().requires_grad_(r) for t, r in zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            loss = linear_cross_entropy(*tensors, ctx.labels)
        loss.backward(scale)
        return None, *(t.grad for t in tensors)


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_its_gradients_are_those_of_finite_differences(
    wanted: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_loss_module.CHUNK_ELEMENTS, "cpu", 3 * 11)
    shapes = ((8, 5), (11, 5), (11,))
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    for tensor, learns in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(bool(learns))
    labels = torch.randint(11, (8,))
    assert torch.autograd.gradcheck(lambda *t: 0.5 * Anew.apply(labels, *t), tensors)


def test_a_planted_fault_in_a_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = linear_loss_module._add_gradients
    monkeypatch.setattr(linear_loss_module, "_add_gradients", lambda g, *rest: honest(g.exp(), *rest))
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (4, 3), (4,)))
    assert not torch.autograd.gradcheck(lambda *t: Anew.apply(torch.arange(4), *t), (x, w, b), raise_exception=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "qwen3", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("ignoring", [False, True])
def test_loss_and_every_gradient_are_those_of_the_plain_loss(architecture: str, ignoring: bool) -> None:
    model = tiny.model(architecture).double()
    found = gradients(model, "all", fused(model), ignoring=ignoring)
    assert differences(found, gradients(model, "all", next_token_loss, ignoring=ignoring)) < 1e-12
    assert len(found) > 5


@pytest.mark.parametrize(
    "learn", ["ffn", "head", "head.rows[3:9] | layers[-1]", "embed.rows[3:9] | final_norm", "norm"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_slices_ties_and_a_frozen_head_get_the_plain_gradients(architecture: str, learn: str) -> None:
    model = tiny.model(architecture).double()
    found = gradients(model, learn, fused(model))
    assert differences(found, gradients(model, learn, next_token_loss)) < 1e-12


def test_a_head_with_a_bias_gets_it_learned() -> None:
    model = tiny.model("llama").double()
    model.lm_head = nn.Linear(32, tiny.VOCABULARY, bias=True).double()
    found = gradients(model, "head | layers[-1]", fused(model))
    assert "lm_head.bias" in " ".join(found)
    assert differences(found, gradients(model, "head | layers[-1]", next_token_loss)) < 1e-12


def test_under_autocast_it_is_as_near_to_fp32_as_the_plain_loss() -> None:
    model = tiny.model("llama")
    exact = gradients(model, "all", next_token_loss)
    plain = differences(gradients(model, "all", next_token_loss, bf16=True), exact)
    assert differences(gradients(model, "all", fused(model), bf16=True), exact) < 1.1 * plain


def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_loss() -> None:
    model = tiny.model("llama")
    exact = gradients(model, "ffn", next_token_loss)
    model.bfloat16()
    plain = differences(gradients(model, "ffn", next_token_loss), exact)
    assert differences(gradients(model, "ffn", fused(model)), exact) < 1.1 * plain


def test_with_recomputed_blocks_the_gradients_are_the_same_bits() -> None:
    model = tiny.model("llama")
    before = gradients(model, "ffn", fused(model))
    recompute_blocks([block for _, block in find_blocks(model)])
    after = gradients(model, "ffn", fused(model))
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("x_learns", "w_learns", "products"), [(True, False, 2), (False, True, 2), (True, True, 3), (False, False, 1)]
)
def test_only_wanted_gradients_cost_arithmetic(x_learns: bool, w_learns: bool, products: int) -> None:
    x, w = torch.randn(12, 6).requires_grad_(x_learns), torch.randn(9, 6).requires_grad_(w_learns)
    with Meter({"w": w}) as meter:
        loss = linear_cross_entropy(x, w, None, torch.zeros(12, dtype=torch.long))
        if loss.requires_grad:
            loss.backward()
    assert meter.total_flops == products * 2 * 12 * 6 * 9
    assert meter.flops["w", "input gradients"] == 2 * 12 * 6 * 9 * x_learns
    assert meter.flops["w", "weight gradients"] == 2 * 12 * 6 * 9 * w_learns


def test_without_a_graph_no_gradient_is_computed() -> None:
    x, w = torch.randn(12, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    with torch.no_grad(), Meter({"w": w}) as meter:
        linear_cross_entropy(x, w, None, torch.zeros(12, dtype=torch.long))
    assert meter.total_flops == 2 * 12 * 6 * 9


def test_rows_without_a_label_cost_nothing() -> None:
    model, batch = tiny.model("llama"), rows()
    loss = fused(model)
    with torch.no_grad(), Meter({"head": loss.head.weight}) as meter:
        loss(model, batch)
    assert meter.flops["head", "forward"] == 2 * batch.n_targets * 32 * tiny.VOCABULARY


def test_nothing_counts_nothing_is_lost() -> None:
    model, batch = tiny.model("llama"), rows()
    batch.labels.fill_(-100)
    summed = fused(model)(model, batch)
    summed.backward()
    assert summed.item() == 0.0
    assert not model.lm_head.weight.grad.any()


def test_a_second_backward_pass_is_refused() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = linear_cross_entropy(x, w, None, torch.zeros(4, dtype=torch.long))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
def test_logits_that_are_capped_or_scaled_keep_the_plain_loss(model_type: str) -> None:
    config = all_types.small_config(model_type)
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.25)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    anatomy = read_anatomy(model)
    assert choose_loss("auto", model, anatomy, n_tokens=1 << 24).how == "plain"
    with pytest.raises(ModelError, match="scales, caps"):
        choose_loss("fused", model, anatomy, n_tokens=1)


def test_auto_follows_the_number_of_logits() -> None:
    model = tiny.model("llama")
    anatomy = read_anatomy(model)
    assert choose_loss("auto", model, anatomy, n_tokens=1 << 8).how == "plain"
    chosen = choose_loss("auto", model, anatomy, n_tokens=1 << 20)
    assert chosen.how == "fused"
    assert torch.equal(chosen.loss(model, rows()), next_token_loss(model, rows()))  # few rows: the plain way, bitwise


def cost(architecture: str, learn: str, *, how: str = "fused", fake: bool = True) -> StageCost:
    source, anatomy = ScratchModel(**tiny.config(architecture)), tiny.anatomy(architecture)
    model, mode = load_fake(source) if fake else (load_model(source), None)
    with mode or nullcontext():
        language = choose_loss(how, model, anatomy, n_tokens=96).loss  # type: ignore[arg-type]
    stage, n = stage_of(anatomy, learn), tiny.VOCABULARY
    return trace_stage(model, anatomy, stage, rows=2, length=48, n_vocabulary=n, language=language, mode=mode)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("learn", ["all", "ffn", "head"])
def test_the_plan_counts_it_as_it_is_computed(architecture: str, learn: str) -> None:
    planned, measured = (cost(architecture, learn, fake=f) for f in (True, False))
    assert planned == measured
    assert planned.logit_bytes == 0


def test_the_plan_sees_the_arithmetic_of_the_plain_loss_and_less_memory() -> None:
    plain, planned = cost("llama", "ffn", how="plain"), cost("llama", "ffn")
    assert planned.flops == plain.flops
    assert planned.peak_bytes < plain.peak_bytes


def test_a_run_with_it_learns_what_a_run_without_it_learns(tmp_path: Path) -> None:
    numbers = []
    for how in ("fused", "plain"):
        result = train(tiny.recipe(tmp_path, loss=how), out=tmp_path / how)
        assert result.audit.passed
        assert all(c.flops_agree for c in result.checks)
        rows = [json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()]
        numbers.append([row.get("loss", row.get("held_out_loss")) for row in rows])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert numbers[0] != numbers[1]  # rounding differs: both ways were taken


def test_fused_where_it_is_not_exact_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = {"architecture": "gemma2", **tiny.SMALL, "head_dim": 8, "layer_types": ["full_attention"] * 3}
    with pytest.raises(RecipeError, match="loss: fused would not be exact"):
        train(tiny.recipe(tmp_path, model=model, loss="fused"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


SAME_LOGITS = {
    **dict.fromkeys(
        ("cohere_compass_text", "falcon_h1", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
         "granitemoehybrid", "granitemoeshared", "hyperclovax"), "the model scales, caps or converts",
    ),
    "modernbert-decoder": "no plain linear layer",
}  # fmt: skip
"""Type that is refused although its last linear layer gives its logits → why: a factor that is 1 by default; or the
head is several modules."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_of_every_type_it_is_the_plain_loss_or_refused_as_its_logits_are_not_its_heads(model_type: str) -> None:
    model = all_types.small_model(model_type).eval()
    anatomy = read_anatomy(model)
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    batch, given = Batch(input_ids=ids, labels=ids), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _args, out: given.append(out.clone()))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    if model_type in SAME_LOGITS or not torch.equal(given[0], logits):
        with pytest.raises(ModelError, match=SAME_LOGITS.get(model_type, "the model scales, caps or converts")):
            find_head(model, anatomy)
        return
    with torch.no_grad():
        torch.manual_seed(0)
        plain = next_token_loss(model, batch)
        torch.manual_seed(0)
        assert FusedLoss(find_head(model, anatomy))(model, batch).item() == pytest.approx(plain.item(), rel=1e-5)


def test_one_chunk_of_logits_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v = 64, 8, 512
    monkeypatch.setitem(linear_loss_module.CHUNK_ELEMENTS, "cpu", 16 * v)
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d)
    with Meter({"x": x, "w": w}) as meter:
        linear_cross_entropy(x, w, None, torch.arange(n)).backward()
    chunk = 4 * 16 * v
    assert chunk <= meter.peak_bytes < 1.5 * chunk
