"""THE MAIN PATH: recipe → anatomy → selections → schedule → weights → training → run folder → audit.

Read `train` from top to bottom: it is the order in which things happen. Everything that can be wrong with a recipe
is found in `prepare`, before anything is written.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from frostline.anatomy import Anatomy, find_blocks, read_anatomy
from frostline.audit import Audit, audit
from frostline.checkpoints import Checkpoints
from frostline.choices import Choice, make_choice, write_choice
from frostline.data import files_to_hash
from frostline.dtypes import dtype_note, weights_dtype
from frostline.engine import (
    Chose,
    Chosen,
    LoopSettings,
    LossFunction,
    Observer,
    Points,
    PrefixCache,
    check_installed,
    choose_loss,
    loss_of,
    next_token_loss,
    set_routes,
    train_loop,
)
from frostline.engine.compiled import Compiled, check_compiles
from frostline.engine.evaluation import EvalSet
from frostline.engine.load_log import log_load
from frostline.engine.recompute import recompute_blocks
from frostline.engine.run_state import RunState
from frostline.environment import describe_environment, hash_file
from frostline.errors import (
    FrostlineError,
    ModelError,
    NonFiniteError,
    PlanError,
    RecipeError,
    RouteError,
    RunFolderError,
    SelectionError,
)
from frostline.expansion import Expansion, expand, named_in
from frostline.feed import Feed, batches_of, fit_attention, get_tokenizer, held_out_batches, make_feed, step_shapes
from frostline.levers import determinism, prefix_cache_of, recompute_for, sayer
from frostline.measuring import choose
from frostline.model import load_model, load_skeleton, save_model, untie
from frostline.plan import (
    Batching,
    Plan,
    StageCheck,
    StepMeters,
    check_plan,
    checks_to_json,
    make_plan,
    plan_to_json,
    points_for,
)
from frostline.recipe import Recipe, ScratchModel, dump_yaml, load_recipe, stage_name
from frostline.run_folder import RunFolder, State, storage_errors, write_text
from frostline.saver import Saver
from frostline.schedule import Schedule, StepSize, make_groups
from frostline.selection import Selection, select
from frostline.sets import eval_sets, held_out_bytes

FLOW_EVERY = 50
"""Steps between measurements of where gradients go, in a run with gradient routes whose recipe does not say."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    folder: Path
    state: State
    """`finished`, or `interrupted` by a signal: its evidence is whole up to `steps`."""
    steps: int
    checks: tuple[StageCheck, ...]
    """The plan against one metered step of every stage; empty where the model cannot be planned."""
    anatomy: Anatomy
    audit: Audit


def train(
    recipe: Recipe | str | Path,
    *,
    out: str | Path,
    observers: Sequence[Observer] = (),
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RunResult:
    """Train as the recipe says, write the run folder `out`, audit it. `say`: told what the data became.

    Raises a `FrostlineError` with nothing written when recipe, model, data or selections are wrong, or `out` is not
    empty; `NonFiniteError` when loss or gradients stop being finite (the weights before that update are saved).
    The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP ends the run after the current step, evidence and model saved.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    with determinism(recipe.deterministic):
        ready = make_ready(recipe, trust_remote_code=trust_remote_code, say=say)
        for line in ready.prepared.feed.lines():
            say(line)
        folder = start_folder(ready.prepared, out)
        with folder.locked():
            return carry_out(ready, folder, observers=observers)


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
    model = load_weights(prepared, trust_remote_code=trust_remote_code)
    fit_attention(model, prepared.feed.kept_by)
    model.to(device)
    check_finite(model, prepared.anatomy)
    check_it_runs(model, prepared, device)
    loss = loss_for(prepared, model)
    always = recipe.evidence.flow_every is not None
    points = points_for(prepared.schedule, model, prepared.anatomy, always=always)
    plan = plan_of(prepared, trust_remote_code=trust_remote_code)
    chosen = recompute_for(recipe, plan, device)
    if chosen.value == "blocks":
        recompute_blocks([block for _, block in find_blocks(model)])
        if recipe.recompute == "auto":
            plan = plan_of(prepared, recompute=True, trust_remote_code=trust_remote_code)
    compiled = compile_blocks(model, prepared, device) if recipe.compile == "blocks" else None
    found = (chosen, Chose(setting="loss", value=loss.how, why=loss.why))
    settled = tuple(c for c in found if getattr(recipe, c.setting) == "auto")
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
        sets=sets,
    )


def carry_out(
    ready: Ready, folder: RunFolder, *, observers: Sequence[Observer] = (), resumed: RunState | None = None
) -> RunResult:
    """Train, from the start or from a state, and audit. The folder is locked by the caller."""
    prepared, model, recipe = ready.prepared, ready.model, ready.prepared.recipe
    batches = batches_of(recipe, prepared.feed.train, ready.device)
    say = sayer(folder, observers)
    for chosen in ready.settled:
        say(chosen.setting, chosen.value, chosen.why)
    cache = prefix_cache_of(
        recipe,
        model,
        prepared.anatomy,
        prepared.schedule,
        ready.plan,
        device=ready.device,
        n_rows=len(prepared.feed.train),
        batches=batches,
        say=say,
    )
    meters = StepMeters(model, around=cache.bypassed)
    checkpoints = Checkpoints(folder.checkpoints, run=run_name(folder))
    saver = Saver(checkpoints, recipe, saved=resumed.step if resumed else None)
    settings = loop_settings(ready, cache)
    balanced = any(s.spec.moe for s in prepared.schedule.stages)
    watched = log_load(model, prepared.anatomy, folder, wanted=balanced)
    with folder.failure_noted(), closing(cache), stop_on_signal() as stop, watched as logs:
        try:
            with ready.compiled.running() if ready.compiled else nullcontext():
                done = train_loop(
                    model,
                    prepared.anatomy,
                    prepared.schedule,
                    batches,
                    ready.loss,
                    folder=folder,
                    settings=replace(settings, watch=meters if ready.plan else None, save=saver, go_back=saver.go_back),
                    held_out=held_out_batches(recipe, prepared.feed.held_out, ready.device),
                    observers=[*observers, *logs],
                    stop=stop,
                    resumed=resumed,
                )
        except NonFiniteError:
            save_result(model, prepared.tokenizer, folder)
            raise
        save_result(model, prepared.tokenizer, folder)
        state: State = "finished" if done.finished else "interrupted"
        checks = check_plan(ready.plan, meters) if ready.plan else ()
        if ready.plan:
            folder.write_json("plan.json", {**plan_to_json(ready.plan), "checks": checks_to_json(checks)})
        folder.write_status(state, step=done.steps)
        verdict = audit(folder.path)
    return RunResult(
        folder=folder.path, state=state, steps=done.steps, checks=checks, anatomy=prepared.anatomy, audit=verdict
    )


def run_name(folder: RunFolder) -> str:
    """What tells a run from every other; drawn when it was made."""
    name = folder.read_json("environment.json").get("run")
    if not isinstance(name, str):
        raise RunFolderError(
            f"{folder.path}: environment.json does not say which run it is of, so it cannot be resumed"
        )
    return name


def plan_of(prepared: Prepared, *, recompute: bool | None = None, trust_remote_code: bool = False) -> Plan | None:
    """The plan of a run; None where the model's cost cannot be predicted (it then trains all the same).

    `recompute`: whether blocks are computed again, where the recipe leaves that open.
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
    except PlanError:
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


def loss_for(prepared: Prepared, model: nn.Module) -> Chosen:
    """The next-token loss as the recipe wants it. Raises `RecipeError` for one that would not be exact."""
    recipe = prepared.recipe
    largest = recipe.data.batch * recipe.data.length // min(s.accumulate for s in recipe.stages)
    try:
        return choose_loss(recipe.loss, model, prepared.anatomy, n_tokens=largest)
    except ModelError as error:
        raise RecipeError(str(error)) from None


def compile_blocks(model: nn.Module, prepared: Prepared, device: torch.device) -> Compiled:
    """The model's blocks, to be compiled when a stage needs them. Raises `CompileError` for those that cannot be."""
    if prepared.feed.layout != "stream":
        raise RecipeError(
            f"compile: rows of layout {prepared.feed.layout} differ in shape from step to step, and every shape is "
            "a graph of its own: use layout stream, or leave `compile` out"
        )
    blocks = [block for _, block in find_blocks(model)]

    def call() -> None:
        model.train()
        next_token_loss(model, prepared.feed.train.batch([0]).to(device))

    check_compiles(blocks, call, device=device.type)
    return Compiled(blocks, n_stages=len(prepared.schedule.stages))


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
        with torch.no_grad():
            next_token_loss(model, prepared.feed.train.batch([0]).to(device))
    except Exception as error:  # models raise anything when their configuration does not fit together
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"the model cannot run on a row of {prepared.recipe.data.length} tokens: {type(error).__name__}: {first}"
        ) from error


def save_result(model: nn.Module, tokenizer: Any, folder: RunFolder) -> None:
    """Save the model and record the hash of each of its files. Raises `StorageError`."""
    with storage_errors(folder.model):
        save_model(model, tokenizer, folder.model)
        folder.write_model_files({p.name: hash_file(p) for p in sorted(folder.model.glob("*")) if p.is_file()})


def prepare(
    recipe: Recipe,
    *,
    choice: Choice | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Check a recipe against its model and data; reads weights only where its schedule ranks them, writes only a cache.

    `choice`: what its selections mean where they depend on a measurement. `say`: told how far reading the data is.
    Raises a `FrostlineError`.
    """
    skeleton = load_skeleton(recipe.model, dtype=weights_dtype(recipe), trust_remote_code=trust_remote_code)
    if recipe.ties == "untie":
        untie(skeleton)
    anatomy = read_anatomy(skeleton)
    recipe, expansion = expand(recipe, anatomy, trust_remote_code=trust_remote_code)
    choice = choice or make_choice(recipe, anatomy)
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


def _select(anatomy: Anatomy, expression: str, ties: str, *, stage: int) -> Selection:
    try:
        return select(anatomy, expression, ties="together" if ties == "together" else "error")
    except SelectionError as error:
        raise RecipeError(f"stages[{stage}].learn: {error}") from None


def load_weights(prepared: Prepared, *, trust_remote_code: bool = False) -> nn.Module:
    """The model with its weights, untied if the recipe says so, its parts those that were selected from."""
    recipe = prepared.recipe
    dtype = weights_dtype(recipe)
    model = load_model(recipe.model, seed=recipe.seed, dtype=dtype, trust_remote_code=trust_remote_code)
    if recipe.ties == "untie":
        untie(model)
    if isinstance(recipe.model, ScratchModel):
        tokenizer = prepared.tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            setattr(model.generation_config, name, getattr(tokenizer, name))
    found = read_anatomy(model)
    if (found.components, found.ties) != (prepared.anatomy.components, prepared.anatomy.ties):
        raise FrostlineError("the loaded model has other parts or ties than its configuration says; please report this")
    return model


def start_folder(prepared: Prepared, out: str | Path) -> RunFolder:
    """A new run folder with the resolved recipe and the environment in it."""
    recipe = prepared.recipe
    base = recipe.model if isinstance(recipe.model, str) else None
    folder = RunFolder.create(out)
    folder.write_status("running", step=0)
    if prepared.choice:
        write_choice(folder, prepared.choice)
    write_text(folder.recipe, dump_yaml(recipe.as_dict()))
    if prepared.expansion:
        folder.write_json("expansion.json", prepared.expansion.to_json())
    folder.write_json(
        "environment.json",
        {
            "run": uuid4().hex,
            "rows": prepared.feed.to_json(),
            **describe_environment(
                device=choose_device(recipe), data=files_to_hash(recipe.data, *(recipe.eval.keep or ())), base=base
            ),
        },
    )
    return folder


def choose_device(recipe: Recipe) -> torch.device:
    """Where the run computes. Raises `RecipeError` when the recipe wants CUDA and there is none."""
    has_cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_cuda:
        raise RecipeError("device: the recipe wants cuda, but torch sees no CUDA device here")
    return torch.device("cuda" if has_cuda and recipe.device != "cpu" else "cpu")


def loop_settings(ready: Ready, cache: PrefixCache | None = None) -> LoopSettings:
    """The recipe's settings that hold for all stages."""
    recipe, points = ready.prepared.recipe, ready.points
    return LoopSettings(
        points=points,
        skip_limit=recipe.nonfinite.limit if recipe.nonfinite.policy == "skip" else 0,
        spike=recipe.spike,
        flow_every=recipe.evidence.flow_every or FLOW_EVERY if points else None,
        loss_of=lambda stage: loss_of(stage, points, cache.language(stage, ready.loss) if cache else ready.loss),
        seed=recipe.seed,
        bf16=recipe.precision == "bf16-mixed",
        rounding=recipe.rounding or "masters",
        compiled=ready.compiled,
        notes=[note] if (note := dtype_note(recipe)) else [],
        device=ready.device,
        eval_every=recipe.eval.every,
        also=ready.sets,
        held_out_bytes=held_out_bytes(recipe, ready.prepared.feed),
        gradients_every=recipe.evidence.gradients_every,
    )


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP makes the yielded function say True; the second interrupts
    at once. A signal that is ignored (`nohup`) stays so."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may set signal handlers
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows has the first two
    numbers = [getattr(signal, n) for n in names if hasattr(signal, n)]
    before = {n: signal.signal(n, remember) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
