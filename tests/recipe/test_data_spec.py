"""The data section: sources with settings, hub names, and paths that are relative to the recipe."""

from __future__ import annotations

import pytest

from frostline.errors import RecipeError
from frostline.recipe import SourceSpec, data_sources, dump_yaml, load_recipe, source_names, source_of

RECIPE = """model: {architecture: llama}
data:
  train: %s
  held_out: [later.jsonl]
stages: [{learn: all, steps: 1, lr: 1e-3}]
"""


def load(tmp_path, train, *overrides):
    (tmp_path / "r.yaml").write_text(RECIPE % train)
    return load_recipe(tmp_path / "r.yaml", overrides=overrides).data


def refused(tmp_path, train, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, train, *overrides)
    return str(caught.value)


def test_a_source_has_settings_of_its_own_and_its_path_is_relative_to_the_recipe(tmp_path):
    data = load(tmp_path, "[a.jsonl, {path: b.csv, weight: 2, format: prompt}]")
    assert data.train == (f"{tmp_path}/a.jsonl", SourceSpec(path=f"{tmp_path}/b.csv", weight=2, format="prompt"))
    assert data.train[1].weight == 2.0
    assert source_of(data.train[0]) == SourceSpec(path=f"{tmp_path}/a.jsonl")
    assert [s.path for s in data_sources(data)] == [f"{tmp_path}/{n}" for n in ("a.jsonl", "b.csv", "later.jsonl")]
    assert source_names(data.train) == f"{tmp_path}/a.jsonl, {tmp_path}/b.csv"


def test_one_source_needs_no_list(tmp_path):
    assert load(tmp_path, "{path: a.jsonl}").train == (SourceSpec(path=f"{tmp_path}/a.jsonl"),)


def test_a_hub_name_stays_one_unless_such_a_folder_exists(tmp_path):
    assert load(tmp_path, "owner/name").train == ("owner/name",)
    assert load(tmp_path, "{path: owner/name, split: test}").train[0].path == "owner/name"
    assert load(tmp_path, "owner/name.jsonl").train == (f"{tmp_path}/owner/name.jsonl",)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert load(tmp_path, "owner/name").train == (f"{tmp_path}/owner/name",)


def test_the_chat_template_is_a_path_and_belongs_to_the_data(tmp_path):
    data = load(tmp_path, "a.jsonl", "data.chat_template=chat.jinja")
    assert data.chat_template.endswith("/chat.jinja")


def test_settings_of_sources_can_be_overridden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load(tmp_path, "[{path: a.jsonl}]", "data.train[0].weight=0.5", "data.train[0].path=c.jsonl")
    assert data.train == (SourceSpec(path=f"{tmp_path}/c.jsonl", weight=0.5),)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("[{path: a.jsonl, wieght: 2}]", "r.yaml:3: unknown key 'data.train[0].wieght'. Did you mean 'weight'?"),
        ("[{weight: 2}]", "r.yaml:3: 'data.train[0].path' is missing"),
        ("[{path: a.jsonl, weight: 0}]", "'data.train[0].weight': input should be greater than 0, found 0"),
        ("[{path: a.jsonl, format: chat}]", "'data.train[0].format': input should be 'auto', 'text'"),
        ("{path: a.jsonl, split: 3}", "'data.train[0].split': input should be a valid string"),
    ],
)
def test_a_wrong_setting_of_a_source_is_named_with_its_place(tmp_path, train, said):
    assert said in refused(tmp_path, train)


def test_the_resolved_recipe_with_sources_reads_back_equal(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE % "[a.jsonl, {path: owner/name, weight: 2, revision: abc}]")
    recipe = load_recipe(tmp_path / "r.yaml", overrides=["data.columns={text: body}"])
    (tmp_path / "again.yaml").write_text(dump_yaml(recipe.as_dict()))
    assert load_recipe(tmp_path / "again.yaml") == recipe
