"""What is said about freezing, settled by measurement on a model: belief, measurement, verdict.

Every measurement uses the engine's own `switch` and `step`, so it is also a check of the engine. Rows S3, S4, S5 and
S7 of the question the project grew from; others stand in `stage_claims.py`, `route_claims.py`, `moe_claims.py` and
`scratch_claims.py`. Read `measure_claims` first. The weights are put back after each claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from frostline.anatomy import module_of, take
from frostline.data import Batch
from frostline.experiment.bench import (
    DECAY,
    N_STEPS,
    Bench,
    Claim,
    Claims,
    any_gradient,
    cosine,
    folded,
    reached,
    similarity,
    three_digits,
)
from frostline.experiment.moe_claims import MOE_CLAIMS
from frostline.experiment.route_claims import ROUTE_CLAIMS
from frostline.experiment.scratch_claims import the_ffn_learns_over_attention_that_has_not
from frostline.experiment.stage_claims import STAGE_CLAIMS, one_step_from_one_loss
from frostline.selection import Selection


def measure_claims(model: nn.Module, batch: Batch, *, name: str) -> Claims:
    """Measure every claim on `model` with one batch (its labels shifted, as the data module gives them).

    The model's weights are the same afterwards. Raises `AnatomyError` for a model that is not understood.
    """
    bench = Bench(model, batch)
    try:
        claims = tuple(claim(bench) for claim in CLAIMS)
    finally:
        bench.learn("all").ownership.release()
        model.zero_grad(set_to_none=True)
    return Claims(model=name, n_parameters=bench.anatomy.n_parameters, n_tokens=batch.input_ids.numel(), claims=claims)


def everything_learns(bench: Bench) -> Claim:
    """S3: one backward pass reaches every part, one step moves every part."""
    active = bench.learn("all")
    bench.backward()
    pieces = [(c.name, s) for c in bench.anatomy.components for s in c.slices if s.tensor not in bench.anatomy.ties]
    pieces = [(n, s) for n, s in pieces if bench.anatomy.learnable(s)]
    rms: dict[str, list[float]] = {}
    for name, s in pieces:
        gradient = active.ownership.gradient(s)
        size = float(gradient.norm()) / math.sqrt(s.n_elements) if gradient is not None else math.nan
        rms.setdefault(name, []).append(size)
    bench.update(active)
    reached = [n for n, sizes in rms.items() if any(r > 0 for r in sizes)]
    silent = [n for n in rms if n not in reached]
    unrouted = [n for n in silent if ".experts[" in n and all(r == 0 for r in rms[n])]
    moved = {n for n, s in pieces if bench.moved(s)}
    still = [n for n in reached if n not in moved]
    excepted = f"; {len(unrouted)} expert parts got no token of this batch and no gradient" if unrouted else ""
    return Claim(
        key="S3",
        belief="In one backward pass every part gets a gradient, and one step updates attention and FFN alike.",
        verdict="TRUE",
        measured=f"{len(reached)} of {len(rms)} parts got a gradient, {len(reached) - len(still)} of those moved "
        f"in one AdamW step{excepted}.",
        holds=not still and silent == unrouted,
        numbers={"parts": len(rms), "with_gradient": len(reached), "moved": len(moved), "unrouted": len(unrouted)},
    )


def ffn_alone_can_learn(bench: Bench) -> Claim:
    """S5: attention frozen, only the FFN learns, in a standard residual block."""
    active = bench.learn("ffn")
    for _ in range(N_STEPS):
        bench.backward()
        bench.update(active)
    attention, ffn = bench.select("attn"), bench.select("ffn")
    frozen = bench.bytes_changed(bench.select("~ffn"))
    attention_bytes, n_attention = bench.bytes_changed(attention), 4 * attention.n_elements
    moved = [s for s in ffn.slices if bench.moved(s)]
    return Claim(
        key="S5",
        belief="With residual connections and norms, attention cannot be frozen while only the FFN is trained.",
        verdict="FALSE",
        measured=f"After {N_STEPS} AdamW steps with weight decay {DECAY:g}, {attention_bytes} of {n_attention} "
        f"attention bytes and {frozen} bytes outside the FFN changed; {len(moved)} of {len(ffn.slices)} pieces of the "
        f"FFN moved.",
        holds=attention_bytes == 0 and frozen == 0 and len(moved) == len(ffn.slices),
        numbers={
            "attention_bytes_changed": attention_bytes,
            "attention_bytes": n_attention,
            "frozen_bytes_changed": frozen,
            "ffn_pieces_moved": len(moved),
            "ffn_pieces": len(ffn.slices),
        },
    )


def gradients_pass_through_frozen_attention(bench: Bench) -> Claim:
    """S4: frozen parts are skipped by the update; gradients still flow through them, unchanged."""
    bench.learn("all")
    bench.backward()
    unfrozen = bench.gradients()
    bench.learn("~attn")
    bench.backward()
    frozen = bench.gradients()
    bench.learn("~attn")
    with _captured_inputs(bench, "attn") as inputs:  # by itself: the probe changes the order of sums, so the rounding
        bench.backward()
    equal = [n for n, g in frozen.items() if torch.equal(g, unfrozen[n])]
    attention = {s.tensor for s in bench.select("attn").slices}
    leaked = [n for n in frozen if n in attention]
    through = [float(x.grad.norm()) if x.grad is not None else 0.0 for x in inputs]
    return Claim(
        key="S4",
        belief="Freezing attention changes, or blocks, the gradients of everything else.",
        verdict="FALSE",
        measured=f"{len(equal)} of {len(frozen)} other gradients are bitwise those of the unfrozen model; the gradient "
        f"that flows back through frozen attention has norm {min(through):.2e} to {max(through):.2e} over "
        f"{len(through)} layers.",
        holds=len(equal) == len(frozen) and not leaked and min(through) > 0,
        numbers={
            "equal_gradients": len(equal),
            "other_gradients": len(frozen),
            "smallest_norm_through_attention": min(through),
            "largest_norm_through_attention": max(through),
        },
    )


def a_zero_gradient_is_no_freeze(bench: Bench) -> Claim:
    """S4: an optimizer that is given a zero gradient still moves a parameter; one that does not own it does not."""
    attention = bench.select("attn")
    active = bench.learn("attn")
    bench.backward()
    bench.update(active)  # one real step, so that there is momentum
    before = {n: p.detach().clone() for n, p in bench.model.named_parameters()}
    for o in active.ownership.owned:
        o.value.grad = torch.zeros_like(o.value)
    bench.update(active)
    zero = _moved_elements(bench, attention, before)
    owned = bench.learn("ffn")
    bench.backward()
    bench.update(owned)
    frozen = _moved_elements(bench, attention, bench.start)
    total = attention.n_elements
    return Claim(
        key="S4",
        belief="Setting a part's gradient to zero freezes it.",
        verdict="FALSE",
        measured=f"With a zero gradient AdamW moved {zero} of {total} attention parameters; frozen, {frozen}.",
        holds=zero > 0.99 * total and frozen == 0,
        numbers={"moved_with_zero_gradient": zero, "moved_when_frozen": frozen, "parameters": total},
    )


def detached_attention_still_feeds_the_embedding(bench: Bench) -> Claim:
    """S7: which parts receive a gradient when attention's output is detached, and how biased it is."""
    bench.learn("all")
    with _embedding_output(bench) as true_embedding:
        loss = bench.backward()
    true = bench.gradients()
    bench.learn("all")
    with _detached_outputs(bench, "attn"), _embedding_output(bench) as cut_embedding:
        cut_loss = bench.backward()
    cut = bench.gradients()
    with_gradient, without = reached(bench, cut)
    layers = [similarity(bench, f"layers[{i}].ffn", true, cut) for i in bench.layers]
    embedding = cosine(true_embedding[0].grad, cut_embedding[0].grad)
    embedding_norm = float(cut_embedding[0].grad.norm()) if cut_embedding[0].grad is not None else 0.0
    norm_ratio = [ratio for _, ratio in layers]
    attention = [name for name in with_gradient if ".attn." in name]
    ffn_reached = all(any_gradient(bench, f"layers[{i}].ffn", cut) for i in bench.layers)
    cosines = ", ".join(map(three_digits, (c for c, _ in layers)))
    return Claim(
        key="S7",
        belief="Detaching attention's output leaves only the FFN learning: embeddings, first norms and everything "
        "before get no gradient.",
        verdict="FALSE for the embedding and earlier FFNs",
        measured=f"The loss is unchanged ({cut_loss:.6f}); every layer's FFN and the embedding still get a gradient, "
        f"through the residual path (norm at the embedding's output {embedding_norm:.2e}). But it is biased: cosine to "
        f"the true gradient {cosines} for the FFNs, first layer to last, and {three_digits(embedding)} at the "
        "embedding.",
        holds=cut_loss == loss and not attention and ffn_reached and embedding_norm > 0,
        numbers={
            "embedding_gradient_norm": embedding_norm,
            "embedding_cosine": embedding,
            **{f"ffn_cosine_layer_{i}": c for i, (c, _) in enumerate(layers)},
            **{f"ffn_norm_ratio_layer_{i}": r for i, r in enumerate(norm_ratio)},
        },
        table=(
            ("part", "gradient with attention's output detached"),
            *((name, "yes") for name in folded(with_gradient)),
            *((name, "none") for name in folded(without)),
        ),
    )


CLAIMS: tuple[Callable[[Bench], Claim], ...] = (
    one_step_from_one_loss,
    everything_learns,
    ffn_alone_can_learn,
    gradients_pass_through_frozen_attention,
    a_zero_gradient_is_no_freeze,
    detached_attention_still_feeds_the_embedding,
    *ROUTE_CLAIMS,
    *STAGE_CLAIMS[:2],
    the_ffn_learns_over_attention_that_has_not,
    *MOE_CLAIMS,
    *STAGE_CLAIMS[2:],
)


def claims_to_json(claims: Claims) -> dict[str, Any]:
    """The claims as plain data."""
    return {"hold": claims.hold, **asdict(claims)}


def claims_markdown(claims: Claims) -> str:
    """The claims as a Markdown table."""
    lines = ["| | what is said | verdict | measured |", "|---|---|---|---|"]
    cells = ([c.key, c.belief, f"**{c.verdict}**", c.measured] for c in claims.claims)
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines)


def _moved_elements(bench: Bench, selection: Selection, before: dict[str, torch.Tensor]) -> int:
    return sum(int((take(bench.parameters[s.tensor], s) != take(before[s.tensor], s)).sum()) for s in selection.slices)


@contextmanager
def _captured_inputs(bench: Bench, part: str) -> Iterator[list[torch.Tensor]]:
    """The inputs of a part's module, per layer, as tensors that nothing else uses: their gradient is what the part
    passes back."""
    captured: list[torch.Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        own = hidden.view_as(hidden)
        own.retain_grad()
        captured.append(own)
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    hooks = [
        module_of(bench.model, bench.anatomy, f"layers[{i}].{part}").register_forward_pre_hook(before, with_kwargs=True)
        for i in bench.layers
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _detached_outputs(bench: Bench, part: str) -> Iterator[None]:
    """The output of a part detached, in every layer: at its output projection, because some modules (BLOOM's) add the
    residual after it."""

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    out = f"{part}.o" if any(c.name.endswith(f".{part}.o") for c in bench.anatomy.components) else part
    hooks = [
        module_of(bench.model, bench.anatomy, f"layers[{i}].{out}").register_forward_hook(after) for i in bench.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _embedding_output(bench: Bench) -> Iterator[list[torch.Tensor]]:
    """The embedding's output: its gradient leaves out what reaches a tied embedding through the head."""
    captured: list[torch.Tensor] = []

    def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    hook = bench.model.get_input_embeddings().register_forward_hook(after)  # type: ignore[operator]
    try:
        yield captured
    finally:
        hook.remove()
