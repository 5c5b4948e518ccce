"""What is said about steps, stages and optimizers, settled by measurement on a model.

Rows S2, S8 and S11 of the question the project grew from. Read `frozen_thawed_and_frozen_again` first.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from frostline.anatomy import Slice, take
from frostline.engine.loss import logits_of
from frostline.engine.owned import Owned
from frostline.engine.stage_switch import Active, Memory
from frostline.experiment.bench import LR, Bench, Claim
from frostline.recipe import OptimizerSpec

STAGES = ("all", "ffn", "attn | ffn", "ffn")
"""Attention learns, is frozen, thaws and is frozen again."""
STEPS = 2
"""Of each stage."""
FALL = 1e-4
"""By how much one step is to lower the loss, to first order; where it is ten times as much, tokens change experts."""
TINY = 1e-12
"""Gradients below this are left out where the size of a step is looked at."""
State = dict[str, Any]


def one_step_from_one_loss(bench: Bench) -> Claim:
    """S2: the loss is the next token's cross-entropy, and one step moves everything along its gradient."""
    active = bench.learn("all", optimizer=OptimizerSpec(name="sgd", weight_decay=0.0), state="reset")
    loss = bench.backward()
    by_hand = _cross_entropy(bench)
    squared = sum(
        float(o.value.grad.double().square().sum()) for o in active.ownership.owned if o.value.grad is not None
    )
    for group in active.optimizer.param_groups:
        group["lr"] = FALL / squared
    bench.update(active)
    fell = loss - bench.backward()
    n = bench.anatomy.n_parameters
    return Claim(
        key="S2",
        belief="Forward, cross-entropy on the next token, one backward pass, one optimizer step: all unfrozen "
        "parameters follow one loss together.",
        verdict="TRUE",
        measured=f"The loss, {loss:.6f}, is the next token's cross-entropy written out (difference "
        f"{abs(loss - by_hand):.0e}). One SGD step over all {n} parameters that lowers it by {FALL:.2e} to first order "
        f"lowered it by {fell:.2e}.",
        holds=abs(loss - by_hand) < 1e-5 * max(abs(by_hand), 1) and 0.5 < fell / FALL < 1.5,
        numbers={"loss": loss, "loss_by_hand": by_hand, "expected_fall": FALL, "fall": fell},
    )


def _cross_entropy(bench: Bench) -> float:
    """Mean of −log p(next token), from logits in fp64 by the definition."""
    with torch.no_grad():
        logits_BTV = logits_of(bench.model, bench.batch.to(bench.device)).double()
    labels_BT = bench.batch.labels.to(bench.device)
    counts = labels_BT != -100
    right_BT = logits_BTV.gather(-1, labels_BT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return float((logits_BTV.exp().sum(-1).log() - right_BT)[counts].mean())


def frozen_thawed_and_frozen_again(bench: Bench) -> Claim:
    """S8: one run that freezes a part, lets it learn and freezes it again."""
    memory: Memory = {}
    frozen: list[int] = []
    counts: list[tuple[int, int]] = []
    for i, expression in enumerate(STAGES):
        active = bench.enter(expression, memory=memory) if i else _start(bench, expression)
        before = {n: bench.parameters[n].detach().clone() for n in bench.start}  # each storage once
        with_gradient, moved = _steps(bench, active, before)
        counts.append((moved, with_gradient))
        rest = bench.select(f"~({expression})").slices if expression != "all" else ()
        frozen.append(sum(_bytes(bench.parameters[s.tensor], before[s.tensor], s) for s in rest))
    said = ", ".join(f"`{e}` {moved} of {n}" for e, (moved, n) in zip(STAGES, counts, strict=True))
    return Claim(
        key="S8",
        belief="In one run a part can learn, be frozen while the rest goes on, learn again and be frozen again.",
        verdict="TRUE",
        measured=f"In four stages of {STEPS} AdamW steps with weight decay, {sum(frozen)} frozen bytes changed; of the "
        f"pieces with a gradient, there moved {said}.",
        holds=not any(frozen) and all(moved == n > 0 for moved, n in counts),
        numbers={
            **{f"frozen_bytes_changed_in_stage_{i}": n for i, n in enumerate(frozen)},
            **{f"pieces_moved_in_stage_{i}": moved for i, (moved, _) in enumerate(counts)},
        },
    )


def _steps(bench: Bench, active: Active, before: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(pieces that had a gradient, those of them that moved) in the steps of a stage."""
    reached: set[int] = set()
    for _ in range(STEPS):
        bench.backward()
        found = enumerate(active.ownership.owned)
        reached |= {i for i, o in found if o.value.grad is not None and bool(o.value.grad.any())}
        bench.update(active)
    owned = [active.ownership.owned[i] for i in sorted(reached)]
    return len(owned), sum(bool(_bytes(o.parameter, before[o.piece.tensor], o.piece)) for o in owned)


def _bytes(now: torch.Tensor, before: torch.Tensor, piece: Slice) -> int:
    """Bytes of a slice that differ."""
    a, b = (take(t.detach(), piece).contiguous().view(torch.uint8) for t in (now, before))
    return int((a != b).sum())


def state_at_a_switch_is_a_choice(bench: Bench) -> Claim:
    """S8: what a part that thaws finds of its optimizer's state, under every policy."""
    found = {policy: _states_after_a_thaw(bench, policy) for policy in ("keep", "offload", "reset")}
    kept = {part: [sum(states[part]) for states in found.values()] for part in ("attn", "ffn")}
    n, m = (len(found["keep"][part]) for part in ("attn", "ffn"))

    def said(part: str) -> str:
        return ", ".join(f"`{policy}` {count}" for policy, count in zip(found, kept[part], strict=True))

    return Claim(
        key="S8",
        belief="A part that learns again goes on with the optimizer state that it had when it was frozen.",
        verdict="TRUE with `state: offload` alone",
        measured=f"Of attention's {n} pieces, frozen for a stage, these had their state again, to the byte: "
        f"{said('attn')}; of the FFN's {m}, which had learned all along: {said('ffn')}.",
        holds=kept == {"attn": [0, n, 0], "ffn": [m, m, 0]} and n > 0 < m,
        numbers={
            f"{part}_states_after_{policy}": count
            for part in kept
            for policy, count in zip(found, kept[part], strict=True)
        },
    )


def _states_after_a_thaw(bench: Bench, policy: str) -> dict[str, list[bool]]:
    """After `all`, `ffn` and `attn | ffn` under a policy: of each part's pieces, whether it has the state that it had
    when it last learned."""
    memory: Memory = {}
    attention = {s.tensor for s in bench.select("attn").slices}
    last: dict[str, State] = {}
    for expression in STAGES[:2]:
        started = bool(last)
        active = bench.enter(expression, memory=memory, state=policy) if started else _start(bench, expression)
        bench.backward()
        bench.update(active)
        last |= {str(o.piece): _copied(active.optimizer.state_of(o.value)) for o in active.ownership.owned}
    active = bench.enter(STAGES[2], memory=memory, state=policy)
    found: dict[str, list[bool]] = {"attn": [], "ffn": []}
    for o in active.ownership.owned:
        found["attn" if o.piece.tensor in attention else "ffn"].append(_has_state(active, o, last))
    return found


def _start(bench: Bench, expression: str) -> Active:
    return bench.learn(expression, state="reset")


def _copied(state: State) -> State:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _has_state(active: Active, owned: Owned, last: dict[str, State]) -> bool:
    """Whether a leaf has the state that its elements had last, to the byte."""
    now, then = active.optimizer.state_of(owned.value), last.get(str(owned.piece))
    return (
        bool(now)
        and then is not None
        and all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(then[k])) for k in then)
    )


def state_exists_for_what_learns(bench: Bench) -> Claim:
    """S11: how many numbers an optimizer keeps."""
    sizes: dict[str, tuple[int, int]] = {}
    for expression in ("all", "ffn", "attn"):
        active = _start(bench, expression)
        bench.backward()
        bench.update(active)
        kept = (v for part in active.optimizer.parts for state in part.state.values() for v in state.values())
        n_numbers = sum(v.numel() for v in kept if isinstance(v, torch.Tensor) and v.dim())
        sizes[expression] = n_numbers, bench.select(expression).n_elements
    return Claim(
        key="S11",
        belief="The optimizer keeps its state for all parameters, whatever is frozen.",
        verdict="FALSE",
        measured="After a step AdamW, two numbers a parameter, keeps "
        + ", ".join(f"{n:,} with `{e}` ({p:,} parameters)" for e, (n, p) in sizes.items())
        + ".",
        holds=all(n == 2 * p for n, p in sizes.values()),
        numbers={f"state_numbers_{e}": n for e, (n, _) in sizes.items()},
    )


def every_part_has_its_rate(bench: Bench) -> Claim:
    """S11: the first AdamW step of two parts with a learning rate each."""
    rates = {"attn": LR, "ffn": LR / 10}
    optimizer = OptimizerSpec(name="adamw", weight_decay=0.0, eps=1e-16)
    active = bench.learn("attn | ffn", lr=rates, optimizer=optimizer, state="reset")
    bench.backward()
    owned = [o for o in active.ownership.owned if o.value.grad is not None and bool((o.value.grad.abs() > TINY).any())]
    gradients = [o.value.grad.clone() for o in owned if o.value.grad is not None]
    before = [o.value.detach().clone() for o in owned]
    bench.update(active)
    attention = {s.tensor for s in bench.select("attn").slices}
    steps: dict[str, list[float]] = {part: [] for part in rates}
    for o, gradient, value in zip(owned, gradients, before, strict=True):
        moved = (o.value.detach() - value).abs()[gradient.abs() > TINY]
        steps["attn" if o.piece.tensor in attention else "ffn"].append(float(moved.median()))
    step = {part: median(found) for part, found in steps.items()}
    ratio = step["attn"] / step["ffn"] if step["ffn"] else 0.0
    sizes = [float(g.double().square().mean().sqrt()) for g in gradients]
    return Claim(
        key="S11",
        belief="All parts share one learning rate; what differs between them is Adam's adaptation alone.",
        verdict="FALSE",
        measured=f"With `lr: {{attn: {LR:g}, ffn: {LR / 10:g}}}` AdamW's first step is {step['attn']:.3e} in attention "
        f"and {step['ffn']:.3e} in the FFN (medians), a ratio of {ratio:.2f}, although the gradients of their "
        f"{len(sizes)} pieces differ in size by a factor of {max(sizes) / min(sizes):,.0f}.",
        holds=abs(ratio / 10 - 1) < 0.02,
        numbers={"ratio_of_rates": 10.0, "ratio_of_steps": ratio, "ratio_of_gradients": max(sizes) / min(sizes)},
    )


STAGE_CLAIMS: tuple[Callable[[Bench], Claim], ...] = (
    frozen_thawed_and_frozen_again,
    state_at_a_switch_is_a_choice,
    state_exists_for_what_learns,
    every_part_has_its_rate,
)
