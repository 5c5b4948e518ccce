"""A comparison: strategies × seeds, each an ordinary run, held against each other. Read `compare`: it is the order in
which things happen.

Nothing of training is here: a run is made by `frostline.train` and gone on with by `frostline.resume`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from frostline.anatomy import Anatomy
from frostline.audit import Audit, audit
from frostline.engine import Observer
from frostline.errors import FrostlineError, NonFiniteError, RecipeError, RunFolderError, StorageError, in_one_line
from frostline.expansion import expand
from frostline.experiment.compare_folder import ComparisonFolder, Hashes, Standing, standing
from frostline.experiment.compare_measures import Outcome, State, measured
from frostline.experiment.compare_results import Compared, Outlook, evaluate
from frostline.feed import held_out_batches
from frostline.prepared import Prepared, choose_device, plan_of, prepare
from frostline.recipe import Comparison, Recipe, Strategy, load_comparison
from frostline.resume import resume
from frostline.run import stop_on_signal, train
from frostline.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBegins:
    """Told before each run: which it is, and whether it is new, gone on with, or there already."""

    number: int
    of: int
    strategy: str
    seed: int
    standing: Standing


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """A strategy whose recipe was found to make sense."""

    strategy: Strategy
    anatomy: Anatomy
    outlook: Outlook


Told = Outlook | RunBegins | Outcome
Tell = Callable[[Told], None]


def compare(
    source: Comparison | str | Path,
    *,
    out: str | Path,
    overrides: Iterable[str] = (),
    seeds: int | Sequence[int] | None = None,
    baseline: str | None = None,
    observers: Sequence[Observer] = (),
    tell: Tell = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    allow_inexact: bool = False,
    trust_remote_code: bool = False,
) -> Compared:
    """Train every strategy with every seed under `out`, audit all runs, and compare them; what is there is kept.

    Every recipe is checked and planned before anything is trained. Seeds take turns outside, strategies inside, so that
    a comparison cut short is balanced. A run that fails does not end the others. Called again it goes on: finished runs
    of the same recipe are audited anew and kept, unfinished ones resumed. Writes `comparison.json` after every run; the
    page is `write_comparison`'s. `tell`: told each strategy's outlook, each run's beginning and outcome.

    Raises a `FrostlineError` before anything is trained when the comparison or a recipe is wrong, or a run under `out`
    is of another recipe. The first signal ends it after the current step, everything saved.
    """
    if not isinstance(source, Comparison):
        source = load_comparison(source, out=out, overrides=overrides, seeds=seeds, baseline=baseline)
    folder = ComparisonFolder(out)
    folder.check(tuple(s.name for s in source.strategies))
    if source.corpus is not None:
        folder.write_source(source.text, source.corpus)
    examined = [examine(s, trust_remote_code=trust_remote_code) for s in source.strategies]
    for e in examined:
        tell(e.outlook)
    jobs = [(e, seed) for seed in source.seeds for e in examined]
    with folder.locked():
        standings = _standings(folder, jobs, trust_remote_code)
        folder.write_source(source.text, source.corpus)
        runs = _Runs(folder, observers, say, allow_inexact, trust_remote_code)
        compared = _compared(source, folder, examined, runs.outcomes)
        with stop_on_signal() as stop:
            for number, (e, seed) in enumerate(jobs, start=1):
                if stop():
                    break
                name, there = e.strategy.name, standings[e.strategy.name, seed]
                tell(RunBegins(number=number, of=len(jobs), strategy=name, seed=seed, standing=there))
                runs.carry_out(e, seed, there)
                compared = _compared(source, folder, examined, runs.outcomes)
                folder.write_results(compared.to_json())
                tell(runs.outcomes[name, seed])
    return compared


def examine(strategy: Strategy, *, trust_remote_code: bool = False) -> Examined:
    """A strategy's recipe checked against its model and its data, and planned. Raises a `FrostlineError` that names the
    strategy."""
    try:
        prepared = prepare(strategy.recipe, stand_in=True, trust_remote_code=trust_remote_code)
        plan = plan_of(prepared, trust_remote_code=trust_remote_code)
        held_out = _fingerprint(prepared)
    except FrostlineError as error:
        raise RecipeError(f"strategy '{strategy.name}': {error}") from error
    stages = prepared.schedule.stages
    return Examined(
        strategy=strategy,
        anatomy=prepared.anatomy,
        outlook=Outlook(
            name=strategy.name,
            changes=strategy.changes,
            stages=tuple((s.name, s.selection.expression, s.n_steps, s.selection.n_elements) for s in stages),
            planned_flops=plan.total_flops if plan else None,
            planned_peak_bytes=plan.peak_bytes if plan else None,
            held_out=held_out,
        ),
    )


def _fingerprint(prepared: Prepared) -> str:
    """Hash of the tokens that the held-out loss is of."""
    found = sha256()
    for batch in held_out_batches(prepared.recipe, prepared.feed.held_out, choose_device(prepared.recipe)):
        for tensor in (batch.input_ids, batch.labels):
            found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def _standings(
    folder: ComparisonFolder, jobs: Sequence[tuple[Examined, int]], trust_remote_code: bool
) -> dict[tuple[str, int], Standing]:
    """(strategy, seed) → how far its run is. Raises `RunFolderError` naming every run that is of another recipe."""
    found: dict[tuple[str, int], Standing] = {}
    wrong, hashes = [], Hashes()
    for e, seed in jobs:

        def expected(e: Examined = e, seed: int = seed) -> Recipe:
            return expand(e.strategy.with_seed(seed), e.anatomy, trust_remote_code=trust_remote_code)[0]

        try:
            found[e.strategy.name, seed] = standing(folder.run(e.strategy.name, seed), expected, hashes)
        except RunFolderError as error:
            wrong.append(str(error))
    if wrong:
        more = f"\nand {len(wrong) - 3} more runs" if len(wrong) > 3 else ""
        raise RunFolderError(
            "\n".join(wrong[:3])
            + more
            + "\nName another --out to compare anew, or remove these folders to train them again"
        )
    return found


class _Runs:
    """The runs of one comparison, and how they ended."""

    def __init__(
        self,
        folder: ComparisonFolder,
        observers: Sequence[Observer],
        say: Callable[[str], None],
        allow_inexact: bool,
        trust_remote_code: bool,
    ) -> None:
        self.folder, self.observers, self.say = folder, observers, say
        self.allow_inexact, self.trust_remote_code = allow_inexact, trust_remote_code
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        known = folder.read_results().get("strategies", [])
        self.for_good = {
            (o["strategy"], o["seed"]): o["why"] for s in known for o in s.get("outcomes", ()) if o.get("final")
        }
        """Runs that failed before in a way that trying again would only repeat."""

    def carry_out(self, e: Examined, seed: int, there: Standing) -> None:
        """Make the run what it should be, whatever of it is there, and look at it."""
        name, path = e.strategy.name, self.folder.run(e.strategy.name, seed)
        nothing = Outcome(strategy=name, seed=seed, state="failed", audit=None)
        if there == "failed" and (name, seed) in self.for_good:
            self.outcomes[name, seed] = replace(nothing, why=self.for_good[name, seed], final=True)
            return
        try:
            audited = self._train(e.strategy, seed, path, there) or audit(path)
            outcome = _look(nothing, path, audited)
        except StorageError:
            raise  # what the others would meet too
        except NonFiniteError as error:
            outcome = replace(nothing, why=f"not finite: {error}", final=True)
        except FrostlineError as error:
            outcome = replace(nothing, why=str(error))
        except (RuntimeError, MemoryError) as error:  # out of memory, among others
            outcome = replace(nothing, why=in_one_line(error))
        self.outcomes[name, seed] = outcome
        gc.collect()  # a model and its optimizer, before the next ones are made

    def _train(self, strategy: Strategy, seed: int, path: Path, there: Standing) -> Audit | None:
        """Train or go on; None where the run is finished already."""
        if there == "finished":
            return None
        if there != "new":
            return resume(
                path,
                allow_inexact=self.allow_inexact,
                observers=self.observers,
                trust_remote_code=self.trust_remote_code,
                say=self.say,
            ).audit
        return train(
            strategy.with_seed(seed),
            out=path,
            observers=self.observers,
            trust_remote_code=self.trust_remote_code,
            say=self.say,
        ).audit


def _look(outcome: Outcome, path: Path, audited: Audit) -> Outcome:
    """What a run that did not fail has come to."""
    recorded = RunFolder(path).read_status()["state"]
    state: State = "interrupted" if recorded == "interrupted" else "finished"
    why = ""
    if audited.verdict == "failed":
        found = [f"{r.component} in stage {r.stage}: {r.verdict.lower()}" for r in audited.failures]
        found += [f"{e.claim}: {e.measured}" for e in audited.evidence if not e.passed]
        why = f"audit failed: {'; '.join(found[:3])}"
    return replace(outcome, state=state, audit=audited.verdict, why=why, measures=measured(path))


def _compared(
    source: Comparison,
    folder: ComparisonFolder,
    examined: Sequence[Examined],
    outcomes: dict[tuple[str, int], Outcome],
) -> Compared:
    names = [e.strategy.name for e in examined]
    others = [n for n in folder.strategies() if n not in names]
    return evaluate(
        [e.outlook for e in examined],
        outcomes,
        name=source.name,
        baseline=source.baseline,
        seeds=source.seeds,
        budget=source.spec.budget,
        notes=[f"runs/{n} is of no strategy of this comparison: left alone, not shown" for n in others],
    )
