"""Why a stage costs what it costs, what freezing saves in it, and what in it cannot learn at all.

`frostline why` is `why_recipe`. Read it first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.anatomy import Anatomy, Component, read_anatomy, take, tiny_config
from frostline.errors import FrostlineError, PlanError, SelectionError
from frostline.folding import folded
from frostline.levers import Outlook, memory_of
from frostline.model import load_config
from frostline.model_source import Source, quiet_transformers
from frostline.plan import StageCost
from frostline.plan_subject import Subject, outlook_of, subject_of
from frostline.recipe import Recipe, as_recipe
from frostline.schedule import Stage
from frostline.weights import Weights

SILENT = 1e-6
"""A part whose gradient is smaller than this share of the largest part's gets no signal but rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """What leaving one part out of a stage would save per step."""

    part: str
    learn: str
    """The selection without it."""
    frontier: str
    """Where backward would stop then."""
    flops_saved: float
    """Share of the step's FLOPs."""
    bytes_saved: int
    """Of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """A stage against a step in which everything learns."""

    flops: float
    """Share of that step's FLOPs that is saved."""
    bytes_per_frozen_parameter: float
    """Gradient and optimizer state that are not kept, per parameter that does not learn."""
    peak_bytes: int
    """Saved of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """What makes a stage cost what it costs."""

    stage: str
    learn: str
    cost: StageCost
    against_all: Saving | None
    """None where everything learns."""
    reasons: tuple[Reason, ...]
    """What could be left out, the largest saving of FLOPs first."""
    no_ops: tuple[str, ...]
    """What is to learn and cannot, with the reason."""
    prefix: Outlook | None = None
    """What will become of its frozen prefix."""
    unresolved: str | None = None
    """What is still to be measured for the selection, where experts stand in for it."""


def why_recipe(
    recipe: Recipe | str | Path, *, overrides: Iterable[str] = (), trust_remote_code: bool = False
) -> tuple[Why, ...]:
    """For every stage of a recipe (a record, a file, or a name of the package's), which parts keep the backward pass
    deep and what leaving each out would save: FLOPs of a step, bytes. Raises as `plan_recipe`."""
    subject = subject_of(as_recipe(recipe, overrides), trust_remote_code, stand_in=True)
    plan, waits = subject.plan(), subject.unresolved
    return tuple(
        Why(
            stage=stage.name,
            learn=waiting.learn if (waiting := waits.get(stage.index)) else stage.selection.expression,
            cost=planned.cost,
            against_all=_saving(subject, stage, planned.cost),
            reasons=tuple(_reasons(subject, stage, planned.cost)),
            no_ops=tuple(_no_ops(subject, stage, planned.cost)),
            prefix=prefix,
            unresolved=waiting.waits_for if waiting else None,
        )
        for stage, planned, prefix in zip(subject.schedule.stages, plan.stages, outlook_of(subject, plan), strict=True)
    )


def _saving(subject: Subject, stage: Stage, cost: StageCost) -> Saving | None:
    n_frozen = subject.anatomy.n_parameters - stage.selection.n_elements
    if not n_frozen:
        return None
    full = subject.plan(subject.other(stage, "all")).stages[0].cost
    kept, full_kept = (c.gradient_bytes + c.state_bytes + c.copy_bytes for c in (cost, full))
    return Saving(
        flops=1 - cost.total_flops / full.total_flops,
        bytes_per_frozen_parameter=(full_kept - kept) / n_frozen,
        peak_bytes=full.peak_bytes - cost.peak_bytes,
    )


def _reasons(subject: Subject, stage: Stage, cost: StageCost) -> Sequence[Reason]:
    parts = {c.path[0][0] for c, _ in stage.selection.by_component() if c.path[0][0] != "layers"}
    layers = stage.selection.layers
    kinds = dict.fromkeys(c.path[1][0] for c, _ in stage.selection.by_component() if c.path[0][0] == "layers")
    candidates = [*sorted(parts), *kinds]
    if len(layers) > 1:
        candidates += [f"layers[:{layers[0] + max((layers[-1] - layers[0] + 1) // 2, 1)}]", f"layers[{layers[0]}]"]
    found = []
    for part in candidates:
        learn = f"({stage.selection.expression}) - {part}"
        try:
            other = subject.plan(subject.other(stage, learn)).stages[0].cost
        except (SelectionError, PlanError):
            continue  # nothing would be left
        found.append(
            Reason(
                part=part,
                learn=learn,
                frontier=other.frontier,
                flops_saved=1 - other.total_flops / cost.total_flops,
                bytes_saved=cost.peak_bytes - other.peak_bytes,
            )
        )
    return sorted(found, key=lambda r: -r.flops_saved)


def _no_ops(subject: Subject, stage: Stage, cost: StageCost) -> Iterator[str]:
    """Parts of a stage that get no gradient: by the plan, by a tiny model of the same kind, by the weights."""
    for part in folded(cost.unreached):
        yield f"{part}: no gradient reaches it: the loss does not depend on it, or a route cuts it off"
    learning = dict.fromkeys(_kind(c.name) for c, _ in stage.selection.by_component())
    for part in silent_parts(subject.source, trust_remote_code=subject.trust_remote_code):
        if part in learning and part not in map(_kind, cost.unreached):
            yield f"{part}: its gradient is zero in any model of this configuration; it would move by rounding alone"
    if any(part.endswith(".router") for part in learning):
        layers = identical_experts(subject.source, subject.anatomy, at_most=(memory_of(torch.device("cpu")) or 0) // 4)
        if layers:
            yield (
                f"layers.ffn.router: all experts are identical in {len(layers)} layers (the first: {layers[0]}), so "
                "which of them is chosen makes no difference and the loss gives the router no gradient where its "
                "weights are normalised; give the experts noise, or let them learn too"
            )


def _kind(part: str) -> str:
    """`layers[3].ffn.experts[7].down` → `layers.ffn.experts.down`."""
    return re.sub(r"\[\d+\]", "", part)


def silent_parts(source: Source, *, seed: int = 0, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Kinds of parts whose gradient is zero in a tiny model with the flags of `source`, whatever its weights.

    Measured on random weights and tokens; empty where no tiny model can be built.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        small = tiny_config(config)
        if getattr(config, "num_experts_per_tok", None) == 1:
            small.num_experts_per_tok = 1
        torch.manual_seed(seed)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        return _silent(model.eval(), seed)
    except FrostlineError:
        raise
    except Exception:  # configuration classes, constructors and models raise anything; then nothing is known
        return ()


def _silent(model: nn.Module, seed: int) -> tuple[str, ...]:
    anatomy = read_anatomy(model)
    n_vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids = torch.randint(n_vocabulary, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms: dict[str, float] = {}
    for c in anatomy.components:
        if any(s.tensor in parameters for s in c.slices):
            norms[_kind(c.name)] = max(norms.get(_kind(c.name), 0.0), _gradient_norm(c, parameters))
    limit = SILENT * max(norms.values())
    return tuple(name for name, norm in norms.items() if norm < limit)


def _gradient_norm(component: Component, parameters: dict[str, nn.Parameter]) -> float:
    gradients = [(s, parameters[s.tensor].grad) for s in component.slices if s.tensor in parameters]
    return float(sum(take(g, s).square().sum().item() for s, g in gradients if g is not None) ** 0.5)


def identical_experts(source: Source, anatomy: Anatomy, *, at_most: int) -> tuple[int, ...]:
    """Layers whose experts all have the same weights; none are looked for in a folder of more than `at_most` bytes."""
    if not isinstance(source, str) or not Path(source).is_dir():
        return ()
    if sum(f.stat().st_size for f in Path(source).glob("*.safetensors")) > at_most:
        return ()
    weights = Weights(source, names={t.name for t in anatomy.tensors if t.kind == "parameter"})
    by_layer: dict[int, dict[str, list[Component]]] = {}
    for c in anatomy.components:
        match = re.fullmatch(r"layers\[(\d+)\]\.ffn\.experts\[\d+\]\.(\w+)", c.name)
        if match:
            by_layer.setdefault(int(match[1]), {}).setdefault(match[2], []).append(c)
    return tuple(
        layer for layer, parts in by_layer.items() if all(_all_equal(weights, experts) for experts in parts.values())
    )


def _all_equal(weights: Any, experts: Sequence[Component]) -> bool:
    tensors = {s.tensor: weights[s.tensor] for c in experts for s in c.slices}
    first, *others = ([take(tensors[s.tensor], s) for s in c.slices] for c in experts)
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
