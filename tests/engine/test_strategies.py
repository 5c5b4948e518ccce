"""Five strategies from shipped recipes on a small trained model, in every precision, eager and compiled: each ends with
a passing audit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from frostline import load_recipe, train
from frostline.recipe import Recipe
from frostline.run_folder import RunFolder

STRATEGIES = ("all", "ffn", "attn", "lp-ft", "lisa")
SHORTER = {
    "lp-ft": ("schedule.probe.steps=6", "schedule.tune.steps=6", "schedule.warmup=2"),
    "lisa": ("schedule.steps=12", "schedule.every=3", "lr_across.warmup=2"),
}
PLAIN = ("stages[0].steps=12", "stages[0].warmup=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tied tiny Llama that has learned something from its text."""
    folder = tmp_path_factory.mktemp("base")
    values = tiny.recipe_dict(folder, stages=[{"learn": "all", "steps": 40, "lr": 3e-3}])
    values["model"] |= {"tie_word_embeddings": True, "num_hidden_layers": 4}
    train(recipe_from(values), out=folder / "run")
    return folder


def recipe_from(values: dict[str, object]) -> Recipe:
    from frostline import recipe_from_dict

    return recipe_from_dict(values)


def shipped(name: str, base: Path, *overrides: str) -> Recipe:
    """A shipped recipe on the base model, with fewer and smaller steps."""
    small = ("data.length=32", "data.batch=4", "eval.every=null", "eval.batches=4", "evidence.gradients_every=3")
    where = (f"model={base / 'run' / 'model'}", f"data.train={base / 'text.txt'}", "device=cpu")
    return load_recipe(name, overrides=[*where, *small, *SHORTER.get(name, PLAIN), *overrides])


def losses(folder: Path) -> list[float]:
    run = RunFolder.open(folder)
    return [row["loss"] for row in run.read_lines(run.metrics) if "loss" in row]


def test_a_shipped_recipe_runs_by_its_name_and_ends_with_a_passing_audit(base: Path, tmp_path: Path) -> None:
    result = train(shipped("lisa", base), out=tmp_path / "run")
    assert result.audit.passed
    assert result.audit.stages == ("lisa-1", "lisa-2", "lisa-3", "lisa-4")
    assert all(c.flops_agree for c in result.checks)


SETTINGS = {
    "fp32": ("precision=fp32",),
    "bf16-mixed": ("precision=bf16-mixed",),
    "bf16": ("precision=bf16",),
    "bf16 stochastic": ("precision=bf16", "rounding=stochastic"),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_five_strategies_pass_their_audit_in_every_precision(
    base: Path, tmp_path: Path, strategy: str, settings: tuple[str, ...]
) -> None:
    result = train(shipped(strategy, base, *settings), out=tmp_path / "run")
    assert result.audit.passed
    assert all(c.flops_agree for c in result.checks)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_strategies_pass_their_audit_with_the_losses_of_eager_ones(
    base: Path, tmp_path: Path, strategy: str
) -> None:
    for name, setting in (("eager", "compile=off"), ("compiled", "compile=blocks")):
        assert train(shipped(strategy, base, setting), out=tmp_path / name).audit.passed
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
