"""Spectrum's ratio against numpy and against what is planted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from frostline.errors import ModelError, RecipeError
from frostline.expansion import expand
from frostline.feed import get_tokenizer
from frostline.model import save_model
from frostline.prepared import prepare
from frostline.recipe import recipe_from_dict
from frostline.schedule.named import chosen_expression
from frostline.schedule.spectrum import marchenko_pastur, matrices, rank, signal_to_noise
from frostline.selection import select


def planted(n: int, m: int, signal: list[float], noise: float, seed: int = 0) -> np.ndarray:
    """A matrix of known rank and strength, plus noise."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.standard_normal((n, len(signal))))[0]
    v = np.linalg.qr(random.standard_normal((m, len(signal))))[0]
    return u @ np.diag(signal) @ v.T + noise * random.standard_normal((n, m))


def ratio_by_numpy(matrix: np.ndarray) -> float:
    """The definition again, from the eigenvalues of the Gram matrix and sorted order statistics."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(small @ small.T), 0, None))[::-1]
    ascending = values[::-1]

    def quantile(q: float) -> float:
        at = q * (len(values) - 1)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        return float(ascending[low] + (at - low) * (ascending[high] - ascending[low]))

    sigma = (quantile(0.75) - quantile(0.25)) / 1.349
    n, m = sorted(matrix.shape)
    threshold = sigma * np.sqrt((1 + np.sqrt(n / m)) ** 2)
    noise = values[values <= threshold]
    return float(values[values > threshold].sum() / (noise.sum() if noise.size else 1.0) / values[0])


@pytest.mark.parametrize("shape", [(40, 40), (32, 96), (96, 32), (17, 64)])
def test_the_ratio_is_numpys_from_another_decomposition(shape):
    for seed in range(3):
        matrix = planted(*shape, signal=[9.0, 5.0, 3.0], noise=0.1, seed=seed)
        assert signal_to_noise(torch.from_numpy(matrix)) == pytest.approx(ratio_by_numpy(matrix), rel=1e-4)


def test_more_planted_signal_gives_a_higher_ratio_and_a_scaled_matrix_one_that_is_divided_by_the_scale():
    ratios = [signal_to_noise(torch.from_numpy(planted(64, 64, [20.0] * r, 0.1))) for r in (1, 3, 6, 12)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 4 * ratios[0] > 0
    matrix = planted(48, 64, [9.0, 5.0], 0.1)
    scaled = signal_to_noise(torch.from_numpy(1000 * matrix)) * 1000  # sums over sums, over the largest value
    assert scaled == pytest.approx(signal_to_noise(torch.from_numpy(matrix)), rel=1e-3)


def test_the_threshold_is_the_edge_of_the_distribution_of_marchenko_and_pastur():
    assert marchenko_pastur(1.0, 64, 64) == pytest.approx(2.0)
    assert marchenko_pastur(0.5, 16, 64) == marchenko_pastur(0.5, 64, 16) == pytest.approx(0.75)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved tiny Llama in which q of layer 1 and up of layer 2 have more signal than the others of their kind."""
    folder = tmp_path_factory.mktemp("spectrum")
    model = tiny.model("llama")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for kind, best in (("self_attn.q_proj", 1), ("mlp.up_proj", 2)):
            for layer in range(3):
                p = parameters[f"model.layers.{layer}.{kind}.weight"]
                signal = [1.0] * (6 if layer == best else 1)
                p.copy_(torch.from_numpy(planted(*p.shape, signal=signal, noise=0.01, seed=layer)))
    recipe = tiny.recipe(folder)
    save_model(model, get_tokenizer(recipe), folder / "model")
    return folder


def spectrum(base, **settings):
    values = {
        "model": str(base / "model"),
        "data": {"train": str(base / "text.txt"), "length": 32, "batch": 4},
        "schedule": {"name": "spectrum", "top": 0.34, "train": {"steps": 2}, "lr": 1e-3, **settings},
    }
    return recipe_from_dict(values)


def test_the_matrix_with_planted_signal_is_chosen_among_its_kind(base):
    plain, expansion = expand(spectrum(base), tiny.anatomy("llama"))
    assert expansion is not None
    chosen = {r.component for r in expansion.ranking if r.chosen}
    assert {"layers[1].attn.q", "layers[2].ffn.up"} <= chosen
    assert len(chosen) == 7 == len({r.kind for r in expansion.ranking})
    selected = {c.name for c, _ in select(tiny.anatomy("llama"), plain.stages[0].learn).by_component()}
    assert selected == chosen


def test_the_share_is_rounded_down_and_one_of_each_kind_is_always_chosen(base):
    for top, n in ((0.01, 1), (0.66, 1), (0.67, 2), (1.0, 3)):
        _, expansion = expand(spectrum(base, top=top, among="ffn"), tiny.anatomy("llama"))
        assert expansion is not None
        kinds = {r.kind for r in expansion.ranking}
        assert kinds == {"layers.ffn.gate", "layers.ffn.up", "layers.ffn.down"}
        assert sum(r.chosen for r in expansion.ranking) == 3 * n, top


def test_the_ranking_is_recorded_with_a_hash_and_the_run_folders_recipe_has_plain_stages(base, tmp_path):
    from frostline import load_recipe, train

    result = train(spectrum(base, always="head"), out=tmp_path / "run")
    assert result.audit.passed
    recorded = json.loads((tmp_path / "run" / "expansion.json").read_text())
    assert len(recorded["ranking"]) == 21
    assert len(recorded["sha256"]) == 64
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.schedule is None
    assert again.stages[0].learn.endswith("| head")


def test_weights_that_are_not_finite_are_not_ranked():
    anatomy = tiny.anatomy("llama")
    weights = {n: p.detach().clone() for n, p in tiny.model("llama").named_parameters()}
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"not finite in layers\[0\].ffn.up"):
        rank(anatomy, weights, top=0.5)
    with pytest.raises(RecipeError, match="no matrix of a layer"):
        rank(anatomy, weights, top=0.5, among=select(anatomy, "embed"))


def test_packed_matrices_are_ranked_by_their_own_slices():
    anatomy = tiny.anatomy("gpt2")
    pieces = {c.name: s for c, s in matrices(anatomy)}
    assert pieces["layers[0].attn.q"].shape == pieces["layers[0].attn.v"].shape == (32, 32)
    experts = [c.name for c, _ in matrices(tiny.anatomy("mixtral")) if ".experts" in c.name]
    assert len(experts) == 3 * 4 * 3
    names = ["layers[2].attn.q", "layers[0].attn.q", "layers[1].ffn.experts[3].down"]
    assert chosen_expression(names) == "layers[0,2].attn.q | layers[1].ffn.experts[3].down"


def test_preparing_reads_no_weights_unless_the_schedule_measures_them(base, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("frostline.expansion.Weights", refuse)
    monkeypatch.setattr("frostline.expansion.load_model", refuse)
    values = spectrum(base).as_dict() | {
        "schedule": {"name": "badam", "every": 1, "steps": 2, "lr": 1e-3},
        "stages": None,
    }
    prepare(recipe_from_dict({k: v for k, v in values.items() if k != "stages"}))
    with pytest.raises(AssertionError, match="were read"):
        prepare(spectrum(base))
