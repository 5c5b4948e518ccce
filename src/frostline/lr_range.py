"""A learning-rate range test per part: how fast may this part learn, before anything is trained for good.

For every part the rate rises exponentially, one optimizer step of the engine at each rate, on the run's own batches;
the held-out loss is measured after every step. Afterwards the weights are put back, and that is verified to the byte.
Nothing is written. Read `range_test`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import fingerprint
from frostline.engine import LoopSettings, LossFunction, loss_of, step
from frostline.engine.evaluation import held_out_loss
from frostline.engine.routes import enter_routes
from frostline.engine.stage_switch import set_modes, switch
from frostline.errors import FrostlineError, RecipeError, SelectionError
from frostline.feed import batches_of, held_out_batches
from frostline.randomness import derive_seed
from frostline.ready import Ready, make_ready
from frostline.recipe import Recipe, as_recipe
from frostline.schedule import Schedule, Stage
from frostline.selection import Selection, select

FELL = 1e-3
"""Where the loss nowhere falls by this share, no rate is suggested."""
HOW = (
    "suggested: a tenth of the rate at which the held-out loss was lowest while the rate rose. The steps add up, so "
    "this is a range to start from, not a tuned value."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTest:
    """One part."""

    part: str
    """The expression that was tested; what of it the stage trains."""
    n_elements: int
    start_loss: float
    rates: tuple[float, ...]
    """The rates that were tried, in order; the last one may have ended the test."""
    losses: tuple[float, ...]
    """Held-out loss after the step at each rate; NaN where it was not finite."""
    lowest_rate: float | None
    """Where the loss was lowest; None where it nowhere fell."""
    steepest_rate: float | None
    """Where it fell fastest on the way there, over the logarithm of the rate."""
    diverges_at: float | None
    """The first rate after the lowest loss at which it was higher than at the start; None where no rate did that."""
    suggestion: float | None
    note: str
    """Why there is no suggestion, or what limits it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeTest:
    """The test of one stage."""

    stage: str
    learn: str
    optimizer: str
    stage_lr: float
    """The largest rate that the recipe has for it."""
    n_steps: int
    parts: tuple[PartTest, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data; a loss that was not finite is null."""
        rows = []
        for p in self.parts:
            losses = [x if math.isfinite(x) else None for x in p.losses]
            rows.append({**asdict(p), "rates": list(p.rates), "losses": losses})
        return {**asdict(self), "parts": rows, "notes": list(self.notes), "how": HOW}


def range_test(
    recipe: Recipe | str | Path,
    *,
    stage: str = "0",
    parts: Sequence[str] = (),
    low: float = 1e-6,
    high: float = 1.0,
    n_steps: int = 40,
    n_batches: int = 2,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RangeTest:
    """Test which learning rates the parts of one stage tolerate, from the weights that the run starts with.

    `stage`: its name, or its number from 0. `parts`: expressions; by default the stage's selection as a whole and each
    kind of part in it. `n_batches`: held-out batches. `say`: told of every part before it is tested. Raises a
    `FrostlineError`.
    """
    if not 0 < low < high:
        raise RecipeError(f"the rates must rise: from {low:g} to {high:g} they do not")
    ready = make_ready(as_recipe(recipe), trust_remote_code=trust_remote_code)
    chosen = find_stage(ready.prepared.schedule, stage)
    tested = list(_tested(chosen, parts))
    rates = [low * (high / low) ** (i / (n_steps - 1)) for i in range(n_steps)]
    bench = _Bench(ready, chosen, n_batches)
    found = []
    for label, selection in tested:
        say(label)
        found.append(bench.test(label, selection, rates))
    return RangeTest(
        stage=chosen.name,
        learn=chosen.selection.expression,
        optimizer=chosen.spec.optimizer.name,
        stage_lr=max(g.lr for g in chosen.groups),
        n_steps=n_steps,
        parts=tuple(found),
        notes=tuple(_notes(chosen)),
    )


def find_stage(schedule: Schedule, stage: str) -> Stage:
    """A stage by its name or its number from 0. Raises `RecipeError`."""
    for s in schedule.stages:
        if s.name == stage:
            return s
    if stage.isdigit() and int(stage) < len(schedule.stages):
        return schedule.stages[int(stage)]
    known = ", ".join(s.name for s in schedule.stages[:8]) + (", …" if len(schedule.stages) > 8 else "")
    raise RecipeError(f"no stage '{stage}': there are {len(schedule.stages)}, from 0 on, named {known}")


def _notes(stage: Stage) -> Iterator[str]:
    if stage.index:
        yield f"stage {stage.name} is tested on the weights that the run starts with, not on those it will find"
    if stage.spec.layer_decay is not None:
        yield f"rates are those of the last layer; layer_decay {stage.spec.layer_decay:g} divides them below"


def _tested(stage: Stage, parts: Sequence[str]) -> Iterator[tuple[str, Selection]]:
    """(label, selection) of what is tested; a default part that is the same as one before it is left out."""
    anatomy, learn = stage.selection.anatomy, stage.selection.expression
    if parts:
        for part in parts:
            try:
                yield part, select(anatomy, f"({learn}) & ({part})", ties="together")
            except SelectionError as error:
                raise RecipeError(f"--parts {part}: of what stage {stage.name} trains: {error}") from None
        return
    seen = [stage.selection]
    yield learn, stage.selection
    for part in _kinds(stage.selection):
        selection = select(anatomy, f"({learn}) & ({part})", ties="together")
        if selection not in seen:
            seen.append(selection)
            tied = "".join(f" (and {other}, tied)" for _, other in selection.pulled_in)
            yield part + tied, selection


def _kinds(selection: Selection) -> list[str]:
    """Names of the kinds of parts in a selection: `embed`, `attn`, `ffn`, all norms as one, `head`."""
    found: dict[str, None] = {}
    for c, _ in selection.by_component():
        found["norm" if c.is_norm and len(c.path) < 3 else c.path[1 if c.path[0][0] == "layers" else 0][0]] = None
    return list(found)


class _Bench:
    """A model that every part is tested on and that is put back after each."""

    def __init__(self, ready: Ready, stage: Stage, n_batches: int) -> None:
        prepared = ready.prepared
        recipe = prepared.recipe
        self.ready, self.stage, self.model = ready, stage, ready.model
        self.settings = LoopSettings(
            seed=recipe.seed,
            bf16=recipe.precision == "bf16-mixed",
            rounding=recipe.rounding or "masters",
            device=ready.device,
        )
        self.batches = batches_of(recipe, prepared.feed.train, ready.device)
        self.held_out = held_out_batches(recipe, prepared.feed.held_out, ready.device)[:n_batches]
        self.hashes = {name: fingerprint(t) for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def test(self, label: str, selection: Selection, rates: Sequence[float]) -> PartTest:
        """The losses of one part over rising rates."""
        learning = {s.tensor for s in selection.slices}
        kept = {
            n: t.detach().clone()
            for n, t in self._tensors().items()
            if n in learning or not isinstance(t, nn.Parameter)
        }
        start = self._held_out()
        tried, losses = [], []
        for rate, loss in self._climb(_alone(self.stage, selection), rates):
            tried.append(rate)
            losses.append(loss)
            if not math.isfinite(loss) or loss > 3 * start:
                break
        self._restore(kept)
        return read_curve(label, selection.n_elements, start, tried, losses)

    def _climb(self, stage: Stage, rates: Sequence[float]) -> Iterator[tuple[float, float]]:
        """(rate, held-out loss after a step at it), from fresh optimizer state."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        rounding = self.settings.rounding
        active = switch(parameters, stage.selection.anatomy, stage, memory={}, leaving=None, rounding=rounding)
        enter_routes(self.ready.points, stage)
        objective: LossFunction = loss_of(stage, self.ready.points, self.ready.loss)
        device, bf16, seed = self.settings.device, self.settings.bf16, self.settings.seed
        try:
            for i, rate in enumerate(rates):
                set_modes(self.model, stage)
                derived = derive_seed(seed, "step", i)
                step(self.model, self.batches(i, stage), objective, seed=derived, device=device, bf16=bf16)
                norm = active.ownership.norm()
                if not bool(norm.isfinite()):
                    yield rate, math.nan
                    return
                active.ownership.scale(stage.spec.clip or math.inf, norm)
                active.optimizer.set_rate(rate)
                active.update(seed=derive_seed(seed, "update", i))
                active.optimizer.zero_grad()
                yield rate, self._held_out()
        finally:
            active.optimizer.zero_grad()
            active.ownership.release()

    def _held_out(self) -> float:
        return held_out_loss(self.model, self.held_out, self.ready.loss, self.settings)

    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in kept.items():
                tensors[name].copy_(value)
        changed = [n for n, t in tensors.items() if self.hashes.get(n) != fingerprint(t)]
        if changed:
            raise FrostlineError(f"the weights could not be put back after a test: {', '.join(changed[:5])}")


def _alone(stage: Stage, selection: Selection) -> Stage:
    """The stage with another selection, its rates all 1 (times what depends on depth); settings by part as one."""
    spec = stage.spec
    decay, betas = (_one(v) for v in (spec.optimizer.weight_decay, spec.optimizer.betas))
    optimizer = spec.optimizer.model_copy(update={"weight_decay": decay, "betas": betas})
    changes = {"learn": selection.expression, "lr": 1.0, "optimizer": optimizer, "steps": 1, "tokens": None}
    spec = spec.model_copy(update={**changes, "epochs": None, "plateau": None, "warmup": 0, "decay": "none"})
    return Schedule.of([(stage.name, spec, selection)]).stages[0]


def _one(value: Any) -> Any:
    """A setting by part as one value: that of the rest, or of the first part."""
    return value.get("rest", next(iter(value.values()))) if isinstance(value, dict) else value


def read_curve(part: str, n_elements: int, start: float, rates: Sequence[float], losses: Sequence[float]) -> PartTest:
    """What a curve says: where it is lowest, steepest, too high; and the suggestion, as `HOW` states."""
    curve = [(r, x) for r, x in zip(rates, losses, strict=True) if math.isfinite(x)]
    lowest = min(curve, key=lambda p: p[1], default=(0.0, math.inf))
    fell = lowest[1] < start * (1 - FELL)
    falling = [(rates[0], start), *(p for p in curve if p[0] <= lowest[0])] if fell else []
    slopes = [(b[1] - a[1], b[0]) for a, b in pairwise(falling)]
    after = [r for r, x in zip(rates, losses, strict=True) if r > lowest[0] and not x <= start]
    note = "" if fell else "the held-out loss fell at no rate"
    if fell and lowest[0] == rates[-1]:
        note = "the loss was still falling at the last rate: test higher ones"
    return PartTest(
        part=part,
        n_elements=n_elements,
        start_loss=start,
        rates=tuple(rates),
        losses=tuple(losses),
        lowest_rate=lowest[0] if fell else None,
        steepest_rate=min(slopes)[1] if slopes else None,
        diverges_at=(after[0] if after else None) if fell else None,
        suggestion=lowest[0] / 10 if fell else None,
        note=note,
    )
