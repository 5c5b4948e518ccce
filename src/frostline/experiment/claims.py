"""What is said about freezing, settled by measurement on a model: belief, measurement, verdict.

Every measurement uses the engine's own `switch` and `step`, so it is also a check of the engine. Rows S3, S4, S5 and
S7 of the question the project grew from. Read `measure_claims` first. The weights are put back after each claim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from frostline.anatomy import Anatomy, Slice, module_of, read_anatomy, take
from frostline.data import Batch
from frostline.engine import next_token_loss, step
from frostline.engine.stage_switch import Active, switch
from frostline.recipe import OptimizerSpec, StageSpec
from frostline.schedule import Schedule
from frostline.selection import Selection, select

N_STEPS = 3
LR = 1e-3
DECAY = 0.1
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One belief and what was measured of it."""

    key: str
    """Row of the question's table: S3, S4, …"""
    belief: str
    """What is said."""
    verdict: str
    """What our measurement says of the belief."""
    measured: str
    """The numbers, in a sentence."""
    holds: bool
    """Whether the measurement agrees with our verdict."""
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    """The numbers by name."""
    table: tuple[tuple[str, ...], ...] = ()
    """Rows of a table that goes with it, the header first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """All claims measured on one model."""

    model: str
    n_parameters: int
    n_tokens: int
    """Tokens of the probe batch."""
    claims: tuple[Claim, ...]

    @property
    def hold(self) -> bool:
        """Whether every measurement agrees with its verdict."""
        return all(c.holds for c in self.claims)


class _Bench:
    """A model, its anatomy and one batch, with the few operations that the claims are made of."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.anatomy: Anatomy = read_anatomy(model)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.start = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.device = next(model.parameters()).device
        self.layers = range(self.anatomy.n_layers)
        self.active: Active | None = None

    def learn(self, expression: str) -> Active:
        """Put the weights back and enter a stage in which `expression` learns."""
        with torch.no_grad():
            for name, value in self.start.items():
                self.parameters[name].copy_(value)
        optimizer = OptimizerSpec(name="adamw", weight_decay=DECAY)
        spec = StageSpec(learn=expression, steps=N_STEPS, lr=LR, optimizer=optimizer, clip=None)
        schedule = Schedule.of([("claim", spec, select(self.anatomy, expression))])
        self.active = switch(self.parameters, self.anatomy, schedule.stages[0], memory={}, leaving=self.active)
        return self.active

    def backward(self) -> float:
        """One forward and backward pass, dropout off; returns the loss."""
        self.model.eval()
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # some sums run in any order otherwise (GPT-OSS)
        try:
            return step(self.model, [self.batch], next_token_loss, seed=SEED, device=self.device).loss.item()
        finally:
            torch.use_deterministic_algorithms(before)

    def update(self, active: Active) -> None:
        """One optimizer step, gradients cleared after it."""
        for group in active.optimizer.param_groups:
            group["lr"] = LR
        active.optimizer.step()
        active.ownership.write_back()
        active.optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the gradients that are there, by tensor name."""
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def bytes_changed(self, selection: Selection) -> int:
        """Bytes of the selection that differ from the start."""
        total = 0
        for s in selection.slices:
            now = take(self.parameters[s.tensor].detach(), s).contiguous().view(torch.uint8)
            total += int((now != take(self.start[s.tensor], s).contiguous().view(torch.uint8)).sum())
        return total

    def moved(self, piece: Slice) -> bool:
        """Whether a slice differs from the start."""
        return not torch.equal(take(self.parameters[piece.tensor], piece), take(self.start[piece.tensor], piece))

    def select(self, expression: str) -> Selection:
        """A selection of this model."""
        return select(self.anatomy, expression)


def measure_claims(model: nn.Module, batch: Batch, *, name: str) -> Claims:
    """Measure every claim on `model` with one batch (its labels shifted, as the data module gives them).

    The model's weights are the same afterwards. Raises `AnatomyError` for a model that is not understood.
    """
    bench = _Bench(model, batch)
    try:
        claims = tuple(claim(bench) for claim in CLAIMS)
    finally:
        bench.learn("all").ownership.release()
        model.zero_grad(set_to_none=True)
    return Claims(model=name, n_parameters=bench.anatomy.n_parameters, n_tokens=batch.input_ids.numel(), claims=claims)


def everything_learns(bench: _Bench) -> Claim:
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


def ffn_alone_can_learn(bench: _Bench) -> Claim:
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


def gradients_pass_through_frozen_attention(bench: _Bench) -> Claim:
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


def a_zero_gradient_is_no_freeze(bench: _Bench) -> Claim:
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


def detached_attention_still_feeds_the_embedding(bench: _Bench) -> Claim:
    """S7: which parts receive a gradient when attention's output is detached, and how biased it is."""
    bench.learn("all")
    with _embedding_output(bench) as true_embedding:
        loss = bench.backward()
    true = bench.gradients()
    bench.learn("all")
    with _detached_outputs(bench, "attn"), _embedding_output(bench) as cut_embedding:
        cut_loss = bench.backward()
    cut = bench.gradients()
    with_gradient, without = _reached(bench, cut)
    layers = [_similarity(bench, f"layers[{i}].ffn", true, cut) for i in bench.layers]
    embedding = _cosine(true_embedding[0].grad, cut_embedding[0].grad)
    embedding_norm = float(cut_embedding[0].grad.norm()) if cut_embedding[0].grad is not None else 0.0
    norm_ratio = [ratio for _, ratio in layers]
    attention = [name for name in with_gradient if ".attn." in name]
    ffn_reached = all(_any_gradient(bench, f"layers[{i}].ffn", cut) for i in bench.layers)
    cosines = ", ".join(map(_three_digits, (c for c, _ in layers)))
    return Claim(
        key="S7",
        belief="Detaching attention's output leaves only the FFN learning: embeddings, first norms and everything "
        "before get no gradient.",
        verdict="FALSE for the embedding and earlier FFNs",
        measured=f"The loss is unchanged ({cut_loss:.6f}); every layer's FFN and the embedding still get a gradient, "
        f"through the residual path (norm at the embedding's output {embedding_norm:.2e}). But it is biased: cosine to "
        f"the true gradient {cosines} for the FFNs, first layer to last, and {_three_digits(embedding)} at the "
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
            *((name, "yes") for name in _folded(with_gradient)),
            *((name, "none") for name in _folded(without)),
        ),
    )


CLAIMS: tuple[Callable[[_Bench], Claim], ...] = (
    everything_learns,
    ffn_alone_can_learn,
    gradients_pass_through_frozen_attention,
    a_zero_gradient_is_no_freeze,
    detached_attention_still_feeds_the_embedding,
)


def claims_to_json(claims: Claims) -> dict[str, Any]:
    """The claims as plain data."""
    return {"hold": claims.hold, **asdict(claims)}


def claims_markdown(claims: Claims) -> str:
    """The claims as a Markdown table."""
    lines = ["| | what is said | verdict | measured |", "|---|---|---|---|"]
    lines += [f"| {c.key} | {c.belief} | **{c.verdict}** | {c.measured} |" for c in claims.claims]
    return "\n".join(lines)


def _moved_elements(bench: _Bench, selection: Selection, before: dict[str, torch.Tensor]) -> int:
    return sum(int((take(bench.parameters[s.tensor], s) != take(before[s.tensor], s)).sum()) for s in selection.slices)


@contextmanager
def _captured_inputs(bench: _Bench, part: str) -> Iterator[list[torch.Tensor]]:
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
def _detached_outputs(bench: _Bench, part: str) -> Iterator[None]:
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
def _embedding_output(bench: _Bench) -> Iterator[list[torch.Tensor]]:
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


def _reached(bench: _Bench, gradients: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Names of the components with and without a gradient; tied storage goes by the name that owns it."""
    with_gradient: list[str] = []
    without: list[str] = []
    for c in bench.anatomy.components:
        own = [s for s in c.slices if bench.anatomy.learnable(s) and s.tensor not in bench.anatomy.ties]
        if own:
            found = any(s.tensor in gradients and bool(take(gradients[s.tensor], s).any()) for s in own)
            (with_gradient if found else without).append(c.name)
    return with_gradient, without


def _any_gradient(bench: _Bench, part: str, gradients: dict[str, torch.Tensor]) -> bool:
    return any(s.tensor in gradients and bool(take(gradients[s.tensor], s).any()) for s in bench.select(part).slices)


def _similarity(
    bench: _Bench, part: str, true: dict[str, torch.Tensor], cut: dict[str, torch.Tensor]
) -> tuple[float | None, float | None]:
    """Cosine, and ratio of norms (cut over true), between two gradients of a part; None where one is missing."""
    slices = bench.select(part).slices
    a, b = (_flat([take(g[s.tensor], s) for s in slices if s.tensor in g]) for g in (true, cut))
    return _cosine(a, b), float(b.norm() / a.norm()) if a is not None and b is not None else None


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat([t.reshape(-1).double() for t in tensors]) if tensors else None


def _cosine(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    if a is None or b is None:
        return None
    return float(cosine_similarity(a.reshape(-1).double(), b.reshape(-1).double(), dim=0))


def _three_digits(number: float | None) -> str:
    return "none" if number is None else f"{number:.3f}"


def _folded(names: Sequence[str]) -> list[str]:
    """Names with their indices left out, each once."""
    return list(dict.fromkeys(re.sub(r"\[\d+\]", "", n) for n in names))
