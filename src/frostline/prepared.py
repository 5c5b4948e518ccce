"""A recipe checked against its model and its data: everything that is known without weights. Read `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, read_anatomy
from frostline.choices import Choice, make_choice
from frostline.dtypes import weights_dtype
from frostline.engine import check_installed, set_routes
from frostline.errors import PlanError, RecipeError, RouteError, SelectionError
from frostline.expansion import Expansion, expand, named_in
from frostline.feed import Feed, get_tokenizer, make_feed, step_shapes
from frostline.measuring import n_measured
from frostline.model import load_skeleton, untie
from frostline.plan import Batching, Plan, make_plan, points_for
from frostline.recipe import Recipe, stage_name
from frostline.schedule import Schedule, StepSize, make_groups
from frostline.selection import Selection, needs, select


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A recipe that was found to make sense: everything but the weights."""

    recipe: Recipe
    """With plain stages."""
    expansion: Expansion | None
    """The named schedule that the stages come from."""
    anatomy: Anatomy
    schedule: Schedule
    choice: Choice | None
    """What selections were resolved to where the model alone does not decide."""
    tokenizer: Any
    feed: Feed


def prepare(
    recipe: Recipe,
    *,
    choice: Choice | None = None,
    stand_in: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Check a recipe against its model and data; reads weights only where its schedule ranks them, writes only a cache.

    `choice`: what its selections mean where they depend on a measurement. `stand_in`: where nothing was measured, the
    first experts of every layer stand for those that will be, which `unresolved` tells; to be shown, never trained.
    `say`: told how far reading the data is. Raises a `FrostlineError`.
    """
    skeleton = load_skeleton(recipe.model, dtype=weights_dtype(recipe), trust_remote_code=trust_remote_code)
    if recipe.ties == "untie":
        untie(skeleton)
    anatomy = read_anatomy(skeleton)
    recipe, expansion = expand(recipe, anatomy, trust_remote_code=trust_remote_code)
    choice = choice or make_choice(recipe, anatomy, stand_in=stand_in)
    with named_in(expansion):
        selections = make_selections(recipe, anatomy, choice)
    tokenizer = get_tokenizer(recipe, trust_remote_code=trust_remote_code)
    feed = make_feed(recipe, tokenizer, say=say)
    with named_in(expansion):
        schedule = make_schedule(recipe, selections, n_rows=len(feed.train), tokens_per_step=feed.tokens_per_step)
    check_routes(skeleton, anatomy, schedule)
    return Prepared(
        recipe=recipe,
        expansion=expansion,
        anatomy=anatomy,
        schedule=schedule,
        choice=choice,
        tokenizer=tokenizer,
        feed=feed,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unresolved:
    """A selection that waits for a measurement; the first experts of every layer stand for it."""

    learn: str
    """As it is written."""
    waits_for: str
    """A sentence: what will be measured, and where."""


def unresolved(prepared: Prepared) -> dict[int, Unresolved]:
    """Stage → its selection, where experts only stand in for it."""
    if prepared.choice is None or prepared.choice.measurement is not None:
        return {}
    length, written = prepared.recipe.data.length, [s.learn for s in prepared.recipe.stages]
    n = n_measured(len(prepared.feed.text), length)
    where = f"on {n:,} rows of {length} tokens spread over the training data"
    return {
        i: Unresolved(
            learn=learn,
            waits_for=f"`{learn}` is unresolved until {' and '.join(needs(learn).scores)} per expert are measured, "
            f"when training starts, {where}; here the first experts of every layer stand for it (for `cover`, as many "
            "as if all were used alike)",
        )
        for i, learn in enumerate(written)
        if needs(learn).scores
    }


def make_selections(recipe: Recipe, anatomy: Anatomy, choice: Choice | None = None) -> list[Selection]:
    """What learns in each stage. Raises `RecipeError` naming the stage: for its selection, its settings by part, or an
    optimizer that is not installed."""
    selections: list[Selection] = []
    known: dict[str, Selection] = {}
    for i, spec in enumerate(recipe.stages):
        learn = choice.of(spec.learn) if choice else spec.learn
        if learn not in known:
            known[learn] = _select(anatomy, learn, recipe.ties, stage=i)
        selections.append(known[learn])
        check_installed(spec.optimizer.name)
        try:
            make_groups(selections[-1], spec)
        except SelectionError as error:
            raise RecipeError(f"stages[{i}]: {error}") from None
    return selections


def _select(anatomy: Anatomy, expression: str, ties: str, *, stage: int) -> Selection:
    try:
        return select(anatomy, expression, ties="together" if ties == "together" else "error")
    except SelectionError as error:
        raise RecipeError(f"stages[{stage}].learn: {error}") from None


def make_schedule(
    recipe: Recipe, selections: Sequence[Selection], *, n_rows: int, tokens_per_step: int | None = None
) -> Schedule:
    """The recipe's stages laid one after another. Raises `RecipeError` when a warm-up does not end before its stage."""
    tokens = tokens_per_step or recipe.data.batch * recipe.data.length
    size = StepSize(tokens=tokens, rows=recipe.data.batch, n_rows=n_rows)
    named = [
        (stage_name(recipe, i), spec, s) for i, (spec, s) in enumerate(zip(recipe.stages, selections, strict=True))
    ]
    try:
        schedule = Schedule.of(named, step_size=size, across=recipe.lr_across, at_switch=recipe.evidence.at_switch)
    except RouteError as error:
        raise RecipeError(str(error)) from None
    for stage in schedule.stages:
        if stage.spec.moe and stage.spec.moe.bias is not None and not stage.by_rule:
            raise RecipeError(
                f"stages[{stage.index}].moe.bias: no router that learns in this stage has a correction bias "
                "(DeepSeek-V3 and its kin have one); let `router` learn, or use moe.balance"
            )
        if stage.spec.warmup >= stage.n_steps:
            raise RecipeError(
                f"stages[{stage.index}]: warmup ({stage.spec.warmup}) must be shorter than the stage, which has "
                f"{stage.n_steps} steps of {size.tokens} tokens"
            )
    if recipe.lr_across is not None and recipe.lr_across.warmup >= schedule.n_steps:
        raise RecipeError(f"lr_across: warmup must be shorter than the run, which has {schedule.n_steps} steps")
    return schedule


def check_routes(skeleton: nn.Module, anatomy: Anatomy, schedule: Schedule) -> None:
    """Whether the model has every point that a stage asks for. Raises `RecipeError` naming the stage."""
    try:
        points = points_for(schedule, skeleton, anatomy)
    except RouteError as error:
        wanting = next(s for s in schedule.stages if s.routes or s.spec.local_loss != "none")
        at = next((s for s in schedule.stages if s.spec.local_loss != "none"), wanting)
        raise RecipeError(f"stages[{at.index}]: {error}") from None
    for stage in schedule.stages if points else ():
        try:
            set_routes(points, stage.routes)  # type: ignore[arg-type]
        except RouteError as error:
            raise RecipeError(f"stages[{stage.index}].routes: {error}") from None


def plan_of(
    prepared: Prepared,
    *,
    recompute: bool | None = None,
    trust_remote_code: bool = False,
    failed: Callable[[str], None] = lambda _: None,
) -> Plan | None:
    """The plan of a run; None where the model's cost cannot be predicted (it then trains all the same).

    `recompute`: whether blocks are computed again, where the recipe leaves that open. `failed`: told why there is none.
    """
    recipe = prepared.recipe
    batching = batching_of(prepared, choose_device(recipe))
    try:
        return make_plan(
            recipe.model,
            prepared.schedule,
            batching if recompute is None else replace(batching, recompute=recompute),
            untied=recipe.ties == "untie",
            trust_remote_code=trust_remote_code,
        )
    except PlanError as error:
        failed(str(error))
        return None


def batching_of(prepared: Prepared, device: torch.device) -> Batching:
    """What a step of the recipe takes."""
    recipe = prepared.recipe
    shape, largest = step_shapes(recipe, prepared.feed, n_steps=prepared.schedule.n_steps)
    return Batching(
        shape=shape,
        largest=largest,
        rows=recipe.data.batch,
        length=recipe.data.length,
        bf16=recipe.precision == "bf16-mixed",
        weights="bf16" if recipe.precision == "bf16" else "fp32",
        rounding=recipe.rounding or "masters",
        recompute=recipe.recompute == "blocks",
        device="cuda" if device.type == "cuda" else "cpu",
        loss=recipe.loss,
    )


def choose_device(recipe: Recipe) -> torch.device:
    """Where the run computes. Raises `RecipeError` when the recipe wants CUDA and there is none."""
    has_cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_cuda:
        raise RecipeError("device: the recipe wants cuda, but torch sees no CUDA device here")
    return torch.device("cuda" if has_cuda and recipe.device != "cpu" else "cpu")
