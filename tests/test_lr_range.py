"""The learning-rate range test: what it measures, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from frostline import lr_range
from frostline.anatomy import fingerprint
from frostline.cli import app
from frostline.errors import FrostlineError, RecipeError
from frostline.experiment.lr_plot import draw_range_test
from frostline.lr_range import range_test, read_curve
from frostline.ready import make_ready
from frostline.recipe import Recipe, dump_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny.recipe(tmp_path, eval={"batches": 1})


def test_a_curve_is_read_as_stated() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    found = read_curve("ffn", 7, 4.0, rates, [3.9, 3.2, 3.0, 3.5, 9.0])
    assert (found.lowest_rate, found.steepest_rate, found.diverges_at) == (1e-2, 1e-3, 1.0)
    assert found.suggestion == pytest.approx(1e-3)
    assert found.note == ""


@pytest.mark.parametrize(
    ("losses", "suggestion", "diverges", "note"),
    [
        ([4.0, 4.1, 9.0], None, None, "fell at no rate"),
        ([3.9999, 4.1, 9.0], None, None, "fell at no rate"),
        ([3.9, 3.0, 2.0], 1e-3, None, "still falling"),
        ([3.0, math.nan], 1e-5, 1e-3, ""),
        ([math.nan], None, None, "fell at no rate"),
    ],
)
def test_curves_without_a_lowest_point_say_why(losses, suggestion, diverges, note) -> None:
    found = read_curve("ffn", 7, 4.0, [1e-4, 1e-3, 1e-2][: len(losses)], losses)
    assert found.suggestion == (None if suggestion is None else pytest.approx(suggestion))
    assert found.diverges_at == diverges
    assert note in found.note


def test_the_loss_at_a_rate_is_that_after_one_plain_step_of_torch(tmp_path: Path) -> None:
    stage = {"learn": "ffn", "steps": 3, "lr": 1e-3, "clip": None, "optimizer": {"name": "sgd", "weight_decay": 0}}
    recipe = tiny.recipe(tmp_path, stages=[stage], eval={"batches": 1})
    found = range_test(recipe, parts=["ffn.down"], low=0.5, high=0.6, n_steps=3)
    ready = make_ready(recipe)
    rows = ready.prepared
    batch = lr_range.batches_of(recipe, rows.feed.train, ready.device)(0, rows.schedule.stages[0])[0]
    held_out = lr_range.held_out_batches(recipe, rows.feed.held_out, ready.device)[0]

    def loss(b: Any) -> torch.Tensor:
        logits = ready.model(input_ids=b.input_ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.long().flatten())

    (part,) = found.parts
    assert part.start_loss == pytest.approx(loss(held_out).item(), rel=1e-5)
    down = [p for n, p in ready.model.named_parameters() if "down_proj" in n]
    gradients = torch.autograd.grad(loss(batch), [p.requires_grad_() for p in down])
    with torch.no_grad():
        for p, g in zip(down, gradients, strict=True):
            p -= 0.5 * g
        assert part.losses[0] == pytest.approx(loss(held_out).item(), rel=1e-5)


def test_every_part_starts_from_the_same_weights_and_they_are_there_afterwards(recipe: Recipe, monkeypatch) -> None:
    ready = make_ready(recipe)
    before = {n: fingerprint(t) for n, t in ready.model.state_dict().items()}
    monkeypatch.setattr(lr_range, "make_ready", lambda *_args, **_options: ready)
    found = range_test(recipe, n_steps=5, high=10.0)
    assert {n: fingerprint(t) for n, t in ready.model.state_dict().items()} == before
    assert len({p.start_loss for p in found.parts}) == 1
    assert [p.part for p in found.parts] == ["all", "embed", "norm", "attn", "ffn", "head"]
    assert all(p.grad is None for p in ready.model.parameters())
    assert range_test(recipe, n_steps=5, high=10.0) == found
    alone = range_test(recipe, n_steps=5, high=10.0, parts=["attn"])
    assert alone.parts[0].losses == found.parts[3].losses


def test_weights_that_are_not_put_back_are_noticed(recipe: Recipe, monkeypatch) -> None:
    real = lr_range._Bench._restore
    monkeypatch.setattr(lr_range._Bench, "_restore", lambda self, kept: real(self, dict(list(kept.items())[1:])))
    with pytest.raises(FrostlineError, match="could not be put back"):
        range_test(recipe, n_steps=3)


def test_slices_ties_routes_and_later_stages_can_be_tested(tmp_path: Path) -> None:
    stages = [
        {"name": "first", "learn": "embed | ffn", "steps": 2, "lr": {"embed": 1e-4, "rest": 1e-3}},
        {"name": "heads", "learn": "attn.heads[0] | ffn", "steps": 2, "lr": 1e-3, "layer_decay": 0.5,
         "routes": [{"stop": "attn.out", "layers": "0"}]},
    ]  # fmt: skip
    recipe = tiny.recipe(tmp_path, stages=stages, ties="together", eval={"batches": 1})
    first = range_test(recipe, n_steps=3)
    assert [p.part for p in first.parts] == ["embed | ffn", "embed", "ffn"]
    later = range_test(recipe, stage="heads", n_steps=3, parts=["attn.heads[0]"])
    assert later.parts[0].n_elements == 3 * 2 * 8 * 32
    assert "tested on the weights that the run starts with" in later.notes[0]
    assert "layer_decay" in later.notes[1]
    assert later == range_test(recipe, stage="1", n_steps=3, parts=["attn.heads[0]"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": "third"}, "no stage 'third': there are 2, from 0 on, named joint, ffn"),
        ({"stage": "2"}, "no stage '2'"),
        ({"parts": ["attn"], "stage": "ffn"}, r"--parts attn: of what stage ffn trains: "),
        ({"low": 1.0, "high": 0.1}, "the rates must rise"),
        ({"low": 0.0}, "the rates must rise"),
    ],
)
def test_what_cannot_be_tested_is_refused(recipe: Recipe, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        range_test(recipe, **options)


def test_the_command_prints_plots_and_leaves_nothing_else(tmp_path: Path, monkeypatch) -> None:
    values = tiny.recipe_dict(tmp_path, eval={"batches": 1})
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    words = ["lr", "recipe.yaml", "--stage", "ffn", "--parts", "ffn.up", "--parts", "ffn.down", "--steps", "4"]
    result = CliRunner().invoke(app, [*words, "--plot", "lr.svg"])
    assert result.exit_code == 0, result.output
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "lr.svg"}
    assert "a tenth of the rate" in " ".join(result.output.split())
    assert "ffn.down" in (tmp_path / "lr.svg").read_text()
    result = CliRunner().invoke(app, [*words, "--json"])
    data = json.loads(result.stdout)
    assert [p["part"] for p in data["parts"]] == ["ffn.up", "ffn.down"]
    assert len(data["parts"][0]["losses"]) == len(data["parts"][0]["rates"]) <= 4
    for wrong, said in (("lr.jpg", "name a .png or .svg file"), ("none/lr.png", "there is no folder")):
        result = CliRunner().invoke(app, [*words, "--plot", wrong])
        assert (result.exit_code, said in result.output) == (2, True)


def test_a_plot_with_parts_that_have_no_suggestion_is_drawn(recipe: Recipe, tmp_path: Path) -> None:
    found = range_test(recipe, n_steps=3, low=1e-9, high=1e-8)
    assert all(p.suggestion is None for p in found.parts)
    draw_range_test(found, tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
