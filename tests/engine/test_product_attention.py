"""Attention made of products is torch's attention: values, gradients, layouts, and in which graphs it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from torch import library
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional

import frostline
from frostline.engine import StageCompiled, compiled, product_attention
from frostline.engine.product_attention import causal_attention, with_product_attention


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right is right without bf16 instructions too."""
    monkeypatch.setattr(product_attention, "has_bf16_products", lambda: True)


SHAPES = [  # rows, heads, key/value heads, length, width, width of values
    (2, 4, 4, 37, 16, 16),
    (1, 8, 2, 300, 24, 8),
    (3, 6, 3, 128, 8, 8),
    (2, 2, 1, 1, 8, 8),
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value as layers lay them out, and a gradient of the output."""
    torch.manual_seed(0)
    rows, heads, n_keys, length, width, of_values = shape
    sizes = ((heads, width), (n_keys, width), (n_keys, of_values))
    q, k, v = (torch.randn(rows, length, n, w, dtype=dtype).transpose(1, 2).requires_grad_() for n, w in sizes)
    return [q, k, v, torch.randn(rows, heads, length, of_values, dtype=dtype)]


def closed_form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention written out in float64."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q.double(), k)
    later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    return torch.einsum("bhqk,bhkd->bhqd", scores.masked_fill(later, float("-inf")).softmax(-1), v)


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("scores", [product_attention.SCORES, 1 << 12])
def test_values_and_gradients_are_those_of_the_closed_form(
    shape: tuple[int, ...], dtype: torch.dtype, within: float, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many small pieces."""
    monkeypatch.setattr(product_attention, "SCORES", scores)
    q, k, v, gradient = tensors(shape, dtype)
    right = closed_form(q, k, v, 0.3)
    found = causal_attention(q, k, v, 0.3)
    assert off(found, right) < within
    wanted = torch.autograd.grad(right, (q, k, v), gradient.double())
    for a, b in zip(torch.autograd.grad(found, (q, k, v), gradient), wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(b, torch.zeros_like(b)) or off(a, b) < within


@pytest.mark.parametrize("width", [32, 64, 80])
def test_bf16_loses_no_more_than_torchs_own_attention_does(width: int) -> None:
    """Also where the scale is no power of two."""
    q, k, v, gradient = tensors((2, 4, 4, 256, width, width), torch.bfloat16)
    right = torch.autograd.grad(closed_form(q, k, v, width**-0.5), (q, k, v), gradient.double())
    ours = torch.autograd.grad(causal_attention(q, k, v, width**-0.5), (q, k, v), gradient)
    theirs = torch.autograd.grad(functional.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), gradient)
    assert sum(map(off, ours, right)) < 1.05 * sum(map(off, theirs, right))


def test_products_in_fp32_are_as_before_afterwards_and_what_was_fp32_is_never_rounded() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    q, k, v, _ = tensors(SHAPES[0], torch.bfloat16)
    causal_attention(q, k, v, 1.0)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        causal_attention(q, k[:, :, :5], v, 1.0)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_torch_finds_nothing_wrong_with_the_operation(shape: tuple[int, ...]) -> None:
    q, k, v, _ = tensors(shape, torch.float32)
    library.opcheck(causal_attention, (q, k, v, 0.5))


# --- in graphs --------------------------------------------------------------------------------------------------------


def n_exchanged(call: Any, *inputs: torch.Tensor, bf16: bool = False) -> int:
    """How many attentions of `call`'s graph are ours."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> Any:
        nodes = with_product_attention(graph).graph.find_nodes(
            op="call_function", target=torch.ops.frostline.causal_attention.default
        )
        found.append(len(nodes))
        return lookup_backend("eager")(graph, given)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        given = torch.compile(call, backend=backend, fullgraph=True)(*inputs)
        assert off(given, call(*inputs)) < 8e-3
    return sum(found)


def test_only_causal_attention_in_bf16_without_mask_and_dropout_is_exchanged() -> None:
    attend = functional.scaled_dot_product_attention
    narrow, wide = (tensors((1, 4, 4, 16, 8, 8), dtype)[:3] for dtype in (torch.bfloat16, torch.float32))
    mask = torch.zeros(16, 16, dtype=torch.bfloat16)
    assert n_exchanged(lambda q, k, v: attend(q, k, v, is_causal=True), *narrow) == 1
    assert n_exchanged(lambda q, k, v: attend(q, k, v, None, 0.0, True, scale=2.0), *narrow) == 1
    assert n_exchanged(lambda q, k, v: attend(q, k, v, is_causal=True), *wide, bf16=True) == 1
    assert n_exchanged(lambda q, k, v: attend(q, k, v, is_causal=True), *wide) == 0
    assert n_exchanged(lambda q, k, v: attend(q, k, v), *narrow) == 0
    assert n_exchanged(lambda q, k, v: attend(q, k, v, attn_mask=mask), *narrow) == 0
    longer = [narrow[0], *(torch.cat([t, t], dim=2).detach() for t in narrow[1:])]
    assert n_exchanged(lambda q, k, v: attend(q, k, v, is_causal=True), *longer) == 0


def test_without_bf16_instructions_graphs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_attention, "has_bf16_products", lambda: False)
    q, k, v, _ = tensors((1, 4, 4, 16, 8, 8), torch.bfloat16)
    assert n_exchanged(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v) == 0


def test_grouped_queries_share_their_keys() -> None:
    q, k, v, _ = tensors((2, 8, 2, 20, 8, 8), torch.bfloat16)
    grouped = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    assert n_exchanged(grouped, q, k, v) == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_a_compiled_bf16_run_uses_it_and_is_proved_against_torchs_own(tmp_path: Path, precision: str) -> None:
    calls: list[int] = []

    def counted(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        made = with_product_attention(graph)
        op = torch.ops.frostline.causal_attention.default
        calls.append(len(made.graph.find_nodes(op="call_function", target=op)))
        return made

    events: list[Any] = []
    with (
        patch.object(compiled, "BACKEND", "aot_eager"),
        patch.object(compiled, "with_product_attention", counted),
        patch("frostline.ready.plan_of", lambda *_, **__: None),
    ):
        recipe = tiny.recipe(tmp_path, "llama", compile="blocks", precision=precision)
        result = frostline.train(recipe, out=tmp_path / "run", observers=[events.append])
    assert result.audit.passed
    assert sum(calls) >= 1
    assert all(calls)
    proofs = [e.proof for e in events if isinstance(e, StageCompiled)]
    assert proofs
    assert all(p.loss_difference < 1e-2 for p in proofs)


def test_a_wrong_attention_is_found_by_the_proof_of_the_stage(tmp_path: Path) -> None:
    def wrong(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        made = with_product_attention(graph)
        for node in made.graph.find_nodes(op="call_function", target=torch.ops.frostline.causal_attention.default):
            node.args = (*node.args[:3], 40.0)
        made.recompile()
        return made

    stages = [{"learn": "all", "steps": 1, "lr": 1e-3}]
    recipe = tiny.recipe(tmp_path, "llama", compile="blocks", precision="bf16-mixed", stages=stages)
    with (
        patch.object(compiled, "BACKEND", "aot_eager"),
        patch.object(compiled, "with_product_attention", wrong),
        patch("frostline.ready.plan_of", lambda *_, **__: None),
        pytest.raises(frostline.FrostlineError, match="uncompiled"),
    ):
        frostline.train(recipe, out=tmp_path / "run")
