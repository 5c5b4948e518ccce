"""The demo: train a small Llama in two stages, settle the claims on it, write the page.

Stopped anywhere, it goes on from there when it is run again with the same folder. Read `run_demo`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from frostline.audit import audit
from frostline.engine import Observer
from frostline.errors import RunFolderError
from frostline.experiment.bench import Claims
from frostline.experiment.claims import claims_to_json, measure_claims
from frostline.experiment.corpus import write_corpus
from frostline.experiment.probe import probe_batch
from frostline.experiment.report import write_report
from frostline.experiment.samples import Sample, sample_run, samples_to_json
from frostline.model import load_model, load_tokenizer
from frostline.recipe import load_recipe, shipped_recipes
from frostline.resume import resume
from frostline.run import RunResult, train
from frostline.run_folder import RunFolder
from frostline.storage import storage_errors, write_text

PROMPTS = ("The for statement", "def ", "An exception is raised when")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What the demo did."""

    result: RunResult
    """Of its run; `interrupted` when a signal stopped the training."""
    findings: Findings | None
    """None when the demo was interrupted: of an unfinished model nothing is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was found out about the trained model."""

    claims: Claims
    samples: list[Sample]
    page: Path


def run_demo(
    out: Path,
    *,
    overrides: Iterable[str] = (),
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Write the corpus, train, measure the claims on the trained model, sample, write the page; or go on with that.

    `out` must be empty or not exist, or hold a demo that was stopped. `say`: told how it goes on. Raises
    `RunFolderError` when `out` holds anything else, or a demo that was begun with other overrides.
    """
    overrides = list(overrides)
    run = RunFolder(out / "run")
    if not _was_begun(out):
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.yaml", shipped_recipes()["demo"])
    if _was_killed_while_made(run):
        shutil.rmtree(run.path)
    if not run.path.exists():
        write_corpus(out / "corpus")
        result = train(load_recipe(out / "recipe.yaml", overrides=overrides), out=run.path, observers=observers)
    else:
        _check_settings(out, run, overrides)
        result = _rest_of(run, observers, say)
    if result.state == "interrupted":
        return Demo(result=result, findings=None)
    try:
        return Demo(result=result, findings=_find_out(run, result))
    except KeyboardInterrupt:  # nothing is lost: the run is finished, and measured anew
        return Demo(result=result, findings=None)


def _find_out(run: RunFolder, result: RunResult) -> Findings:
    """Measure the claims on the trained model, sample, write the page."""
    claims = claims_of(str(run.model), name="the demo's model after training")
    run.write_json("claims.json", claims_to_json(claims))
    samples = sample_run(run, PROMPTS)
    run.write_json("samples.json", samples_to_json(samples))
    page = write_report(run.path, audited=result.audit)
    return Findings(claims=claims, samples=samples, page=page)


def _was_begun(out: Path) -> bool:
    """Whether a demo was stopped in this folder. Raises `RunFolderError` where there is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    recipe = out / "recipe.yaml"
    if not recipe.is_file() or recipe.read_bytes() != shipped_recipes()["demo"].encode():
        raise RunFolderError(f"{out} exists and is not empty; the demo never overwrites: name another --out")
    if RunFolder(out / "run").report.exists():
        raise RunFolderError(f"{out} holds a demo that is done; the demo never overwrites: name another --out")
    return True


def _was_killed_while_made(run: RunFolder) -> bool:
    """Whether a kill left a run folder in which nothing was done yet, which cannot be resumed."""
    started = ("environment.json", "schedule.json", "metrics.jsonl", "checkpoints", "model")
    return run.path.is_dir() and not any((run.path / name).exists() for name in started)


def _check_settings(out: Path, run: RunFolder, overrides: Sequence[str]) -> None:
    """Raise `RunFolderError` when overrides are given that the demo was not begun with."""
    if overrides and run.recipe.exists():
        asked, begun = load_recipe(out / "recipe.yaml", overrides=overrides), load_recipe(run.recipe)
        if asked != begun:
            raise RunFolderError(
                f"{out} was begun with other settings than these: leave --set out to go on, or name another --out"
            )


def _rest_of(run: RunFolder, observers: Sequence[Observer], say: Callable[[str], None]) -> RunResult:
    """Train what is left of a run; one that is finished is audited again."""
    if run.read_status()["state"] != "finished":
        return resume(run.path, observers=observers, say=say)
    say("the run is finished: going on with what is measured on it")
    steps = run.read_status()["step"]
    return RunResult(
        folder=run.path, state="finished", steps=steps, checks=(), anatomy=run.read_anatomy(), audit=audit(run.path)
    )


def claims_of(source: str, *, name: str | None = None, trust_remote_code: bool = False) -> Claims:
    """Measure what is said about freezing on a model folder or hub name, with 4 rows of at most 128 tokens of text that
    every Python carries. Raises `ModelError`, and `AnatomyError` for a model that is not understood."""
    model = load_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return measure_claims(model, probe_batch(model, tokenizer), name=name or source)
