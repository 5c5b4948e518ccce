"""A run that can start: its model in memory, looked at, planned. Read `make_ready`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from frostline.anatomy import Anatomy, Component, find_blocks, read_anatomy
from frostline.choices import Choice
from frostline.dtypes import weights_dtype
from frostline.engine import Chose, Chosen, LossFunction, Points, choose_loss, next_token_loss
from frostline.engine.compiled import Compiled, check_compiles
from frostline.engine.loop_settings import EvalSet
from frostline.engine.recompute import recompute_blocks
from frostline.errors import CompileError, FrostlineError, ModelError, RecipeError, in_one_line
from frostline.feed import fit_attention
from frostline.grouped import odd_width, own_modules
from frostline.levers import freed_memory_for, kept_share, recompute_for
from frostline.measuring import choose
from frostline.model import load_model, untie
from frostline.plan import Plan, points_for
from frostline.prepared import Prepared, choose_device, plan_of, prepare
from frostline.recipe import Recipe, ScratchModel
from frostline.schedule import Schedule, Stage
from frostline.sets import eval_sets


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A run that can start: its model in memory."""

    prepared: Prepared
    model: nn.Module
    device: torch.device
    points: Points | None
    loss: LossFunction
    """The next-token loss, in the way that pays."""
    settled: tuple[Chose, ...]
    """Settings that the recipe left open, and what became of them."""
    compiled: Compiled | None
    plan: Plan | None
    keep_freed: bool
    """Whether freed memory of the host stays with the process while it trains."""
    sets: tuple[EvalSet, ...] = ()
    """What is measured beside the held-out data."""


def make_ready(
    recipe: Recipe,
    *,
    choice: Choice | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Ready:
    """Check a recipe, load its model, plan it; writes nothing but a cache. `choice`: kept by the run that goes on.

    `say`: told how far reading the data is. Raises a `FrostlineError`.
    """
    choice = choice or choose(recipe, trust_remote_code=trust_remote_code)
    prepared = prepare(recipe, choice=choice, trust_remote_code=trust_remote_code, say=say)
    device = choose_device(recipe)
    unused: list[str] = []
    model = load_weights(prepared, trust_remote_code=trust_remote_code, unused=unused)
    fit_attention(model, prepared.feed.kept_by)
    model.to(device)
    check_finite(model, prepared.anatomy)
    check_it_runs(model, prepared, device)
    loss = loss_for(prepared, model)
    always = recipe.evidence.flow_every is not None
    points = points_for(prepared.schedule, model, prepared.anatomy, always=always)
    unplanned: list[str] = []
    plan = plan_of(prepared, trust_remote_code=trust_remote_code, failed=unplanned.append)
    chosen = recompute_for(recipe, plan, device)
    if chosen.value == "blocks":
        recompute_blocks([block for _, block in find_blocks(model)])
        if recipe.recompute == "auto":
            plan = plan_of(prepared, recompute=True, trust_remote_code=trust_remote_code)
    compiled = (
        compile_blocks(model, prepared, device, kept=kept_share(chosen.value)) if recipe.compile == "blocks" else None
    )
    freed = freed_memory_for(recipe, device)
    found = (chosen, Chose(setting="loss", value=loss.how, why=loss.why), freed)
    settled = (
        *unusual_model(recipe, model, unused),
        *(c for c in found if str(getattr(recipe, c.setting)) != c.value),
        *experts_for(recipe, model),
        *expert_gradients_for(recipe, model, prepared.schedule),
        *(Chose(setting="plan", value="none", why=why) for why in unplanned),
    )
    for i, stage in enumerate(plan.stages if plan else ()):
        if not stage.cost.gradient_bytes:
            raise RecipeError(f"stages[{i}]: nothing of `{stage.learn}` gets a gradient: its routes cut all of it off")
    sets = eval_sets(recipe, prepared.feed, prepared.tokenizer, device, say=say)
    return Ready(
        prepared=prepared,
        model=model,
        device=device,
        points=points,
        loss=loss.loss,
        settled=settled,
        compiled=compiled,
        plan=plan,
        keep_freed=freed.value == "keep",
        sets=sets,
    )


def load_weights(prepared: Prepared, *, trust_remote_code: bool = False, unused: list[str] | None = None) -> nn.Module:
    """The model with its weights, untied if the recipe says so, its parts those that were selected from."""
    recipe = prepared.recipe
    dtype = weights_dtype(recipe)
    model = load_model(recipe.model, seed=recipe.seed, dtype=dtype, trust_remote_code=trust_remote_code, unused=unused)
    if recipe.ties == "untie":
        untie(model)
    if isinstance(recipe.model, ScratchModel):
        tokenizer = prepared.tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            setattr(model.generation_config, name, getattr(tokenizer, name))
    found = read_anatomy(model)
    cut = sorted(prepared.anatomy.ties.items() - found.ties.items())
    if cut:
        raise ModelError(
            f"{recipe.model}: its configuration ties {cut[0][0]} to {cut[0][1]}, and its files hold other weights for "
            "each, which are not tied when they are loaded. Write `tie_word_embeddings: false` into its config.json, "
            f"or take {cut[0][0]} out of its files"
        )
    if (found.components, found.ties) != (prepared.anatomy.components, prepared.anatomy.ties):
        raise FrostlineError("the loaded model has other parts or ties than its configuration says; please report this")
    return model


def check_finite(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise `ModelError` naming the parts that hold NaN or infinity: nobody else looks, and frozen ones stay."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bad = {n for n, p in parameters.items() if p.is_floating_point() and not bool(p.detach().isfinite().all())}
    parts = [c.name for c in anatomy.components if any(s.tensor in bad for s in c.slices)]
    if parts:
        more = f" and {len(parts) - 5} more" if len(parts) > 5 else ""
        raise ModelError(f"the model's weights are not finite in {', '.join(parts[:5])}{more}")


def check_it_runs(model: nn.Module, prepared: Prepared, device: torch.device) -> None:
    """One forward pass on one row: a model that cannot run is found before anything is written. Raises `ModelError`."""
    model.eval()
    try:
        bf16 = prepared.recipe.precision == "bf16-mixed"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            next_token_loss(model, prepared.feed.train.batch([0]).to(device))
    except Exception as error:  # models raise anything when their configuration does not fit together
        length, most = prepared.recipe.data.length, positions_of(model)
        hint = f"; it has {most} positions, so `data.length` may be at most that" if most and length > most else ""
        raise ModelError(f"the model cannot run on a row of {length} tokens: {in_one_line(error)}{hint}") from error


def positions_of(model: nn.Module) -> int | None:
    """The longest row that a model says it was made for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return most if isinstance(most, int) else None


def unusual_model(recipe: Recipe, model: nn.Module, unused: Sequence[str]) -> Iterator[Chose]:
    """What of the model's files is not used, and rows that are longer than it says."""
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        value = f"{len(unused)} tensors of its files are not used"
        yield Chose(setting="model", value=value, why=f"its type has no place for {', '.join(unused[:3])}{more}")
    most = positions_of(model)
    if most is not None and recipe.data.length > most:
        why = f"more than the {most} positions of the model's configuration (max_position_embeddings)"
        yield Chose(setting="data.length", value=str(recipe.data.length), why=why)


def loss_for(prepared: Prepared, model: nn.Module) -> Chosen:
    """The next-token loss as the recipe wants it. Raises `RecipeError` for one that would not be exact."""
    recipe = prepared.recipe
    largest = recipe.data.batch * recipe.data.length // min(s.accumulate for s in recipe.stages)
    try:
        return choose_loss(recipe.loss, model, prepared.anatomy, n_tokens=largest)
    except ModelError as error:
        raise RecipeError(str(error)) from None


def experts_for(recipe: Recipe, model: nn.Module) -> Iterator[Chose]:
    """How experts are multiplied, where that is not as usual."""
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    width = odd_width(model, dtype)
    if width is not None:
        why = f"torch's grouped products in {str(dtype).removeprefix('torch.')} do not take a width of {width}"
        yield Chose(setting="experts", value="one by one", why=f"{why}; the same products, slower")


def expert_gradients_for(recipe: Recipe, model: nn.Module, schedule: Schedule) -> Iterator[Chose]:
    """That weight gradients of experts which do not learn are computed and thrown away, where that is so."""
    if not any(_some_experts_learn(stage) for stage in schedule.stages):
        return
    why = None
    if recipe.compile == "blocks":
        why = "blocks are compiled; uncompiled, only those of the experts that learn would be"
    elif not own_modules(model):
        why = "this type's experts cannot be given other products; where they can, only those that learn have them"
    if why:
        yield Chose(setting="experts", value="weight gradients of all are computed", why=why)


def _some_experts_learn(stage: Stage) -> bool:
    """Whether of a packed tensor some experts learn in a stage, and others do not."""
    experts = _experts_of(stage.selection.anatomy.components)
    learning = _experts_of(c for c, _ in stage.selection.by_component())
    return any(0 < len(learning[tensor]) < len(packed) for tensor, packed in experts.items() if len(packed) > 1)


def _experts_of(components: Iterable[Component]) -> dict[str, set[str]]:
    """Tensor → the experts of these components that lie in it; none for a tensor without."""
    found: dict[str, set[str]] = defaultdict(set)
    for component in components:
        for expert in re.findall(r"experts\[\d+\]", component.name):
            for piece in component.slices:
                found[piece.tensor].add(expert)
    return found


def compile_blocks(model: nn.Module, prepared: Prepared, device: torch.device, *, kept: float) -> Compiled:
    """The model's blocks, to be compiled when a stage needs them; `kept`: see `Compiled`.

    Raises `CompileError` for those that cannot be.
    """
    if prepared.feed.layout != "stream":
        raise RecipeError(
            f"compile: rows of layout {prepared.feed.layout} differ in shape from step to step, and every shape is "
            "a graph of its own: use layout stream, or leave `compile` out"
        )
    if prepared.recipe.precision == "bf16" and (width := odd_width(model, torch.bfloat16)) is not None:
        raise CompileError(
            f"in compiled blocks torch cannot multiply experts of width {width} in bfloat16; "
            "use `precision: bf16-mixed` or fp32, or leave `compile` out"
        )
    blocks = [block for _, block in find_blocks(model)]

    def call() -> None:
        model.train()
        next_token_loss(model, prepared.feed.train.batch([0]).to(device))

    check_compiles(blocks, call, device=device.type)
    return Compiled(blocks, n_stages=len(prepared.schedule.stages), kept=kept)
