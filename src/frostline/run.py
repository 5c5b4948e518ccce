"""THE MAIN PATH: recipe → anatomy → selections → schedule → weights → training → run folder → audit.

Read `train` from top to bottom: it is the order in which things happen. `prepared.py` finds what can be wrong with a
recipe, without weights and before anything is written; `ready.py` has the model in memory.
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

from torch import nn

from frostline.anatomy import Anatomy
from frostline.audit import Audit, audit
from frostline.checkpoints import Checkpoints
from frostline.choices import write_choice
from frostline.data import Batch, files_to_hash
from frostline.dtypes import dtype_note
from frostline.engine import LoopSettings, Observer, PrefixCache, loss_of, train_loop
from frostline.engine.freed_memory import kept
from frostline.engine.load_log import log_load
from frostline.engine.run_state import RunState
from frostline.environment import describe_environment, hash_file
from frostline.errors import NonFiniteError, RunFolderError
from frostline.feed import batches_of, held_out_batches
from frostline.levers import determinism, prefix_cache_of, sayer
from frostline.model import save_model
from frostline.plan import StageCheck, StepMeters, check_plan, checks_to_json, plan_to_json
from frostline.prepared import Prepared, choose_device
from frostline.ready import Ready, make_ready
from frostline.recipe import Recipe, dump_yaml, load_recipe
from frostline.run_folder import RunFolder, State
from frostline.saver import Saver
from frostline.sets import held_out_bytes
from frostline.storage import storage_errors, write_text

FLOW_EVERY = 50
"""Steps between measurements of where gradients go, in a run with gradient routes whose recipe does not say."""


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
    RunFolder.at_free(out)  # before the data are read
    with determinism(recipe.deterministic):
        ready = make_ready(recipe, trust_remote_code=trust_remote_code, say=say)
        for line in ready.prepared.feed.lines():
            say(line)
        folder = start_folder(ready.prepared, out)
        with folder.locked():
            return carry_out(ready, folder, observers=observers)


def carry_out(
    ready: Ready, folder: RunFolder, *, observers: Sequence[Observer] = (), resumed: RunState | None = None
) -> RunResult:
    """Train, from the start or from a state, and audit. The folder is locked by the caller."""
    prepared, model, recipe = ready.prepared, ready.model, ready.prepared.recipe
    batches = batches_of(recipe, prepared.feed.train, ready.device)
    held_out = held_out_batches(recipe, prepared.feed.held_out, ready.device)
    say = sayer(folder, observers)
    cache = prefix_cache_of(
        recipe,
        model,
        prepared.anatomy,
        prepared.schedule,
        ready.plan,
        device=ready.device,
        n_rows=len(prepared.feed.train),
        batches=batches,
        measured=[*held_out, *(b for s in ready.sets for b in s.batches if isinstance(b, Batch))],
        say=say,
    )
    meters = StepMeters(model, around=cache.bypassed, compiled=ready.compiled)
    checkpoints = Checkpoints(folder.checkpoints, run=run_name(folder))
    saver = Saver(checkpoints, recipe, saved=resumed.step if resumed else None)
    settings = loop_settings(ready, cache)
    balanced = any(s.spec.moe for s in prepared.schedule.stages)
    watched = log_load(model, prepared.anatomy, folder, wanted=balanced)
    with folder.failure_noted(), closing(cache), stop_on_signal() as stop, watched as logs:
        for chosen in ready.settled:
            say(chosen.setting, chosen.value, chosen.why)
        try:
            with kept(ready.keep_freed), ready.compiled.running() if ready.compiled else nullcontext():
                done = train_loop(
                    model,
                    prepared.anatomy,
                    prepared.schedule,
                    cache.watched(batches),
                    ready.loss,
                    folder=folder,
                    settings=replace(settings, watch=meters if ready.plan else None, save=saver, go_back=saver.go_back),
                    held_out=held_out,
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


def save_result(model: nn.Module, tokenizer: Any, folder: RunFolder) -> None:
    """Save the model and record the hash of each of its files. Raises `StorageError`."""
    with storage_errors(folder.model):
        save_model(model, tokenizer, folder.model)
        folder.write_model_files({p.name: hash_file(p) for p in sorted(folder.model.glob("*")) if p.is_file()})


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


def loop_settings(ready: Ready, cache: PrefixCache | None = None) -> LoopSettings:
    """The recipe's settings that hold for all stages."""
    recipe, points = ready.prepared.recipe, ready.points
    return LoopSettings(
        points=points,
        skip_limit=recipe.nonfinite.limit if recipe.nonfinite.policy == "skip" else 0,
        spike=recipe.spike,
        flow_every=recipe.evidence.flow_every or FLOW_EVERY if points else None,
        loss_of=lambda stage: loss_of(stage, points, cache.language(stage, ready.loss) if cache else ready.loss),
        measure_of=(lambda stage: cache.measuring(stage, ready.loss)) if cache else None,
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


class _Remembers:
    """A signal handler: it remembers the first signal, and interrupts at the second."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received.append(number)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP makes the yielded function say True; the second interrupts
    at once. A signal that is ignored (`nohup`) stays so. Inside another one, both share what was received: a signal
    between two runs of a comparison is not lost on the second."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may set signal handlers
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows has the first two
    numbers = [getattr(signal, n) for n in names if hasattr(signal, n)]
    before = {n: signal.getsignal(n) for n in numbers}
    outer = next((h for h in before.values() if isinstance(h, _Remembers)), None)
    handler = outer or _Remembers()
    changed = {n: h for n, h in before.items() if h is not signal.SIG_IGN and h is not handler}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield lambda: bool(handler.received)
    finally:
        for number, was in changed.items():
            signal.signal(number, was)
