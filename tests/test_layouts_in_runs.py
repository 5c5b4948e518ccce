"""Layouts from the recipe to the run folder: equal losses, resumable, planned as they are computed, counted."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

import frostline
from frostline.cli import app
from frostline.engine import StepDone
from frostline.errors import DataError, ModelError, RecipeError
from frostline.feed import get_tokenizer, make_feed, spread
from frostline.planning import plan_recipe
from frostline.recipe import dump_yaml, load_recipe, recipe_from_dict
from frostline.resume import resume

LAYOUTS = ("packed", "padded", "flat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 documents of 1 to 60 words, one of them longer than a row."""
    folder = tmp_path_factory.mktemp("documents")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for n in [*torch.randint(1, 60, (59,), generator=generator).tolist(), 150]:
        words = torch.randint(len(tiny.WORDS), (n,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(tiny.WORDS[w] for w in words)}))
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def recipe(folder, layout, architecture="llama", accumulate=1, **data):
    spec = {"train": str(folder / "a.jsonl"), "length": 96, "batch": 8, "layout": layout, "held_out": 0.1, **data}
    fields = tiny.recipe_dict(folder, architecture, data=spec)
    for stage in fields["stages"]:
        stage |= {"accumulate": accumulate, "steps": 2}
    return recipe_from_dict(fields)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [r["loss"] if "loss" in r else r["held_out_loss"] for r in rows_of(run)]


@pytest.fixture(scope="module")
def runs(folder):
    results = {layout: frostline.train(recipe(folder, layout), out=folder / layout) for layout in LAYOUTS}
    assert all(r.audit.passed for r in results.values())
    return folder


def test_flat_rows_have_the_losses_of_padded_ones_step_by_step(runs):
    for flat, padded in zip(losses(runs / "flat"), losses(runs / "padded"), strict=True):
        assert flat == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", pytest.param("padded", marks=pytest.mark.slow), "flat"])
def test_accumulating_changes_nothing_whatever_the_layout(runs, layout):
    frostline.train(recipe(runs, layout, accumulate=4), out=runs / f"{layout}-accumulated")
    for whole, parts in zip(losses(runs / layout), losses(runs / f"{layout}-accumulated"), strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", pytest.param("flat", marks=pytest.mark.slow)])
def test_a_mask_gives_the_losses_of_calls(runs, layout):
    frostline.train(recipe(runs, layout, apart="mask"), out=runs / f"{layout}-mask")
    for calls, mask in zip(losses(runs / layout), losses(runs / f"{layout}-mask"), strict=True):
        assert mask == pytest.approx(calls, rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", pytest.param("padded", marks=pytest.mark.slow), "flat"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(runs, layout):
    seen = []

    def stop(event):
        if isinstance(event, StepDone):
            seen.append(event)
            if len(seen) == 3:
                raise KeyboardInterrupt

    fields = recipe(runs, layout).as_dict() | {"checkpoint": {"every": 1}}
    out = runs / f"{layout}-resumed"
    with pytest.raises(KeyboardInterrupt):
        frostline.train(recipe_from_dict(fields), out=out, observers=[stop])
    resume(out)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (runs / layout / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_documents_are_planned_near_to_what_is_computed(runs, layout):
    checks = json.loads((runs / layout / "plan.json").read_text())["checks"]
    assert len(checks) == 2
    for check in checks:
        assert check["measured_flops"] == pytest.approx(check["planned_flops"], rel=0.5)  # few documents a step
        assert check["peak_ratio"] < 1.02  # planned for the largest step


def test_a_mask_over_packed_rows_is_planned_exactly(runs):
    frostline.train(recipe(runs, "packed", apart="mask", accumulate=2), out=runs / "packed-exact")
    checks = json.loads((runs / "packed-exact" / "plan.json").read_text())["checks"]
    assert all(c["flops_agree"] and 0.98 < c["peak_ratio"] < 1.02 for c in checks)


def test_plans_of_flat_rows_cost_less_than_of_padded_ones(folder, tmp_path):
    costs = {}
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.yaml"
        path.write_text(dump_yaml(recipe(folder, layout).as_dict()), encoding="utf-8")
        costs[layout] = plan_recipe(path).plan.stages[0].cost.total_flops
    assert costs["flat"] < 0.8 * costs["padded"]


def test_the_run_folder_says_what_became_of_the_documents(runs):
    rows = json.loads((runs / "packed" / "environment.json").read_text())["rows"]
    assert (rows["layout"], rows["kept_apart_by"]) == ("packed", "calls")
    train, held_out = rows["documents"]["train"], rows["documents"]["held_out"]
    assert train["documents"] + held_out["documents"] == 60
    assert (train["policy"], train["long"] + held_out["long"]) == ("split", 1)


def test_the_command_line_says_how_many_documents_were_too_long(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe(folder, "packed", long="drop").as_dict()), encoding="utf-8")
    short = ["--set", "stages[0].steps=1", "--set", "stages[1].steps=1"]
    found = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run"), *short])
    assert found.exit_code == 0, found.output
    assert "train: 54 documents, packed in" in found.output
    assert "1 longer than a row: drop" in found.output


def test_a_model_that_cannot_keep_documents_apart_is_refused_before_anything_is_written(folder, tmp_path):
    fields = recipe(folder, "packed").as_dict()
    fields["model"] = {
        "architecture": "bloom", "vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    }  # fmt: skip
    with pytest.raises(ModelError, match="bloom does not keep documents of one row apart"):
        frostline.train(recipe_from_dict(fields), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fields["data"]["layout"] = "padded"
    assert frostline.train(recipe_from_dict(fields), out=tmp_path / "padded").audit.passed


def test_documents_of_which_nothing_is_left_are_refused_with_the_counts(folder):
    loaded = recipe(folder, "packed", long="drop", length=2)
    with pytest.raises(DataError, match=r"too little text in .*long documents: drop"):
        make_feed(loaded, get_tokenizer(loaded))


def test_an_unknown_layout_is_refused_with_those_that_there_are(folder):
    with pytest.raises(RecipeError, match="layout"):
        recipe(folder, "boxed")


def test_texts_are_a_stream_unless_the_recipe_says_otherwise(folder):
    loaded = recipe(folder, None)
    feed = make_feed(loaded, get_tokenizer(loaded))
    assert (feed.layout, feed.kept_by, feed.cutting) == ("stream", None, {})
    assert [line.partition(" (")[0] for line in feed.lines()] == ["data: text, 60 examples"]


@pytest.mark.parametrize(("n", "share", "expected"), [(10, 0.2, [2, 7]), (3, 0.01, [1]), (4, 0.99, [0, 1, 2, 3])])
def test_held_out_documents_are_spread_over_all(n, share, expected):
    assert spread(n, share).tolist() == expected


def test_recomputed_blocks_know_their_documents(runs):
    fields = recipe(runs, "packed").as_dict() | {"recompute": "blocks"}
    frostline.train(recipe_from_dict(fields), out=runs / "recomputed")
    assert (runs / "recomputed/metrics.jsonl").read_bytes() == (runs / "packed/metrics.jsonl").read_bytes()


def test_a_recipe_reads_its_layout_from_yaml(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe(folder, "flat", long="truncate").as_dict()), encoding="utf-8")
    loaded = load_recipe(path)
    assert (loaded.data.layout, loaded.data.long, loaded.data.apart) == ("flat", "truncate", "auto")
