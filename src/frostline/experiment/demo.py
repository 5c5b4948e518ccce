"""The demo: train a small Llama in two stages, settle the claims on it, write the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from frostline.engine import Observer
from frostline.errors import RunFolderError
from frostline.experiment.bench import Claims
from frostline.experiment.claims import claims_to_json, measure_claims
from frostline.experiment.corpus import write_corpus
from frostline.experiment.probe import probe_batch
from frostline.experiment.samples import Sample, sample_run, samples_to_json
from frostline.model import load_model, load_tokenizer
from frostline.recipe import load_recipe
from frostline.run import RunResult, train
from frostline.run_folder import RunFolder
from frostline.storage import write_text

PROMPTS = ("The for statement", "def ", "An exception is raised when")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What the demo did."""

    result: RunResult
    claims: Claims
    samples: list[Sample]


def run_demo(out: Path, *, overrides: Iterable[str] = (), observers: Sequence[Observer] = ()) -> Demo:
    """Write the corpus, train, measure the claims on the trained model, sample. `out` must be empty or not exist.

    Raises `RunFolderError` when `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} exists and is not empty; the demo never overwrites: name another --out")
    write_corpus(out / "corpus")
    recipe_path = out / "recipe.yaml"
    write_text(recipe_path, files("frostline").joinpath("recipes/demo.yaml").read_text(encoding="utf-8"))
    result = train(load_recipe(recipe_path, overrides=overrides), out=out / "run", observers=observers)
    run = RunFolder.open(out / "run")
    claims = claims_of(str(run.model), name="the demo's model after training")
    run.write_json("claims.json", claims_to_json(claims))
    samples = sample_run(run, PROMPTS)
    run.write_json("samples.json", samples_to_json(samples))
    return Demo(result=result, claims=claims, samples=samples)


def claims_of(source: str, *, name: str | None = None, trust_remote_code: bool = False) -> Claims:
    """Measure the claims on a model folder or hub name, with text that every Python carries."""
    model = load_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return measure_claims(model, probe_batch(model, tokenizer), name=name or source)
