"""Named schedules in a recipe file: what is refused, and how it is said."""

from __future__ import annotations

import pytest

from frostline.errors import RecipeError
from frostline.recipe import load_recipe, recipe_from_dict, shipped_recipes
from frostline.recipe.schedule_spec import SCHEDULES
from frostline.recipe.shipped import is_recipe, summary

HEAD = "model: {architecture: llama}\ndata: {train: text.txt}\n"
LISA = "schedule:\n  name: lisa\n  layers: 2\n  every: 20\n  steps: 400\n  lr: 1e-4\n"


def load(folder, text, *overrides):
    (folder / "recipe.yaml").write_text(HEAD + text)
    return load_recipe(folder / "recipe.yaml", overrides=overrides)


def refused(folder, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_named_schedule_is_read_and_its_keys_can_be_overridden(tmp_path):
    schedule = load(
        tmp_path, LISA, "schedule.layers=3", "schedule.optimizer=sgd", "schedule.lr={embed: 1, rest: 2}"
    ).schedule
    assert schedule is not None
    assert (schedule.name, schedule.layers, schedule.optimizer.name) == ("lisa", 3, "sgd")
    assert schedule.lr == {"embed": 1, "rest": 2}


STAGES = "stages:\n  - {learn: all, steps: 1, lr: 1}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LISA + STAGES, "recipe.yaml: stages and schedule are both given: a named schedule is its stages; drop one"),
        ("", "recipe.yaml: 'stages' is missing"),
        ("schedule: lisa\n", "recipe.yaml:3: 'schedule': a named schedule is a mapping with a name (gradual"),
        ("schedule: {layers: 2}\n", "recipe.yaml:3: 'schedule': its name is missing; schedules are gradual"),
        (LISA.replace("lisa", "lisaa"), "recipe.yaml:3: 'schedule': no schedule is named 'lisaa'; schedules are "),
        (LISA.replace("lisa", "lisaa"), "Did you mean 'lisa'?"),
        (LISA.replace("name: lisa", "name: 3"), "'schedule': no schedule is named 3"),
        (LISA.replace("layers", "layer"), "recipe.yaml:5: unknown key 'schedule.layer'. Did you mean 'layers'"),
        (LISA.replace("layers", "layer"), "recipe.yaml:3: 'schedule.layers' is missing"),
        (LISA.replace("every: 20", "every: often"), "recipe.yaml:6: 'schedule.every': input should be a valid integer"),
        (LISA.replace("1e-4", "{embed: fast}"), "recipe.yaml:8: 'schedule.lr.embed': input should be a valid number"),
        (LISA.replace("steps: 400", "steps: 0"), "recipe.yaml:7: 'schedule.steps': input should be greater"),
        (LISA + "  order: random\n", "recipe.yaml:9: unknown key 'schedule.order'."),
        (LISA + "  optimizer: {name: sgd, betas: [0, 0]}\n", "schedule.optimizer: sgd has no setting 'betas'"),
        (
            "schedule: {name: spectrum, top: 0.5, train: {steps: 1, epochs: 1}, lr: 1}\n",
            "recipe.yaml:3: schedule.train: give one of steps, tokens and epochs; found steps and epochs",
        ),
    ],
)  # fmt: skip
def test_a_schedule_that_makes_no_sense_is_refused_with_its_line_and_key(tmp_path, text, said):
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.layrs=2", "unknown key 'schedule.layrs'. Did you mean 'layers'"),
        ("schedule=lisa", "'schedule': a named schedule is a mapping"),
        ("schedule.lr.embed=1e-4", "--set schedule.lr.embed=1e-4: schedule.lr has no keys of its own"),
        ("stages[0].lr=1", "--set stages[0].lr=1: the stages of this recipe come from its schedule 'lisa'"),
        ("stages[0].lr=1", "as in schedule.lr=1e-4: lr, layer_decay,"),
        ("schedule.every=0", "--set schedule.every=0: 'schedule.every': input should be"),
        ("schedule.name=badam", "unknown key 'schedule.layers'"),
    ],
)
def test_overrides_of_a_schedule_are_refused_as_clearly(tmp_path, override, said):
    assert said in refused(tmp_path, LISA, override)


def test_a_stage_list_replaces_a_schedule_by_an_override(tmp_path):
    recipe = load(tmp_path, LISA, "schedule=null", "stages=[{learn: all, steps: 1, lr: 1}]")
    assert recipe.schedule is None
    assert len(recipe.stages) == 1


def test_every_shipped_recipe_says_what_it_does_and_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    found = shipped_recipes()
    assert {"all", "ffn", "attn", "demo", "moe"} | set(SCHEDULES) == set(found)
    for name, text in found.items():
        assert len(summary(text)) > 10, name
        recipe = load_recipe(name, overrides=[] if name == "demo" else ["model=mine"])
        assert recipe.schedule is None or recipe.schedule.name == name
        assert recipe.data.train == (str(tmp_path / "corpus"),), "paths are relative to where the command runs"


def test_a_name_is_a_recipe_unless_something_of_that_name_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_recipe("lisa")
    assert is_recipe("any.yaml")
    assert not is_recipe("org/model")
    (tmp_path / "lisa").mkdir()
    assert not is_recipe("lisa")
    with pytest.raises(RecipeError, match=r"lisa is a folder here; .*frostline recipes lisa > lisa.yaml"):
        load_recipe("lisa")
    with pytest.raises(RecipeError, match=r"no recipe at liza. Did you mean 'lisa'"):
        load_recipe("liza")


def test_a_shipped_recipe_asks_for_the_model_that_it_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="the recipe lisa trains a model of yours: say which"):
        load_recipe("lisa")
    with pytest.raises(RecipeError, match=r"the recipe lisa trains on a text of yours: say which: --set data.train=…$"):
        load_recipe("lisa", overrides=["model=model"])
    with pytest.raises(RecipeError, match="`frostline demo` writes one and trains on it"):
        load_recipe("demo")
    assert load_recipe("demo", overrides=["data.train=corpus"]).data.train == (str(tmp_path / "corpus"),)
    (tmp_path / "mine.yaml").write_text(shipped_recipes()["lisa"])
    assert load_recipe(tmp_path / "mine.yaml").model == "model", "a file of one's own may name its model so"


def test_a_recipe_from_plain_data_takes_a_schedule_and_reads_back_equal(tmp_path):
    values = {"model": {"architecture": "llama"}, "data": {"train": str(tmp_path)}}
    recipe = recipe_from_dict({**values, "schedule": {"name": "badam", "every": 1, "steps": 2, "lr": 1e-3}})
    assert recipe_from_dict(recipe.as_dict()) == recipe
