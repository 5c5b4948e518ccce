"""Recipes: what is refused and with which words, how paths and overrides are read, and that nothing else can happen."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from frostline.errors import RecipeError
from frostline.recipe import Recipe, StageSpec, dump_yaml, load_recipe, recipe_from_dict, stage_name
from frostline.recipe.overrides import format_key, parse_key
from frostline.recipe.yaml_text import parse_yaml

quick = settings(deadline=None, max_examples=30)

GOOD = """\
# the smallest recipe
model: {architecture: llama, hidden_size: 32}
data:
  train: text.txt
  batch: 8
stages:
  - learn: all
    steps: 4
    lr: 1e-4
  - learn: ffn
    steps: 2
    lr: 0.001
    optimizer: {name: sgd, momentum: 0.9}
"""


def load(folder, text, *overrides):
    """The recipe in a file with this text (or these bytes)."""
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(file, overrides=overrides)


def refused(folder, text, *overrides):
    """The message, the folder cut away."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def changed(old, new):
    """The good recipe with one piece of text replaced."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def minimal(**changes):
    """A good recipe as plain data."""
    stage = {"learn": "all", "steps": 4, "lr": 1e-4}
    return {"model": {"architecture": "llama"}, "data": {"train": "text.txt"}, "stages": [stage], **changes}


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_with_its_values_and_defaults(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.model.architecture == "llama"
    assert recipe.model.config_fields == {"hidden_size": 32}
    assert recipe.data.train == (str(tmp_path / "text.txt"),)
    assert (recipe.data.batch, recipe.data.length, recipe.data.held_out) == (8, 256, 0.05)
    assert [s.learn for s in recipe.stages] == ["all", "ffn"]
    assert (recipe.stages[1].optimizer.name, recipe.stages[1].optimizer.momentum) == ("sgd", 0.9)
    assert (recipe.seed, recipe.ties, recipe.precision, recipe.device) == (0, "error", "fp32", "auto")


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5", 0.5), ("+2e0", 2.0), ("3", 3.0)]
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, written, value):
    recipe = load(tmp_path, changed("1e-4", written))
    assert isinstance(recipe.stages[0].lr, float)
    assert recipe.stages[0].lr == value


@pytest.mark.parametrize("written", ["yes", "on", "no", "1:30"])
def test_words_that_yaml_1_1_turned_into_other_values_are_text(tmp_path, written):
    assert load(tmp_path, f"{GOOD}tokenizer: {written}\n").tokenizer == written


def test_an_optimizer_may_be_its_name_alone(tmp_path):
    assert load(tmp_path, changed("{name: sgd, momentum: 0.9}", "adam")).stages[1].optimizer.name == "adam"


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path):
    assert load(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()) == load(tmp_path, GOOD)


# --- what is no recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "3\n", "[model, data]\n", "model\n", "null\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert refused(tmp_path, text) == "recipe.yaml: a recipe is a mapping with model, data and stages; this is not one"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=re.escape(f"no recipe at {tmp_path / 'none.yaml'}")):
        load_recipe(tmp_path / "none.yaml")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is a folder; a recipe is a YAML file"):
        load_recipe(tmp_path)


def test_a_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "a" / "recipe.yaml")


def test_text_that_is_not_utf_8_is_refused_with_the_offset(tmp_path):
    assert refused(tmp_path, b"model: \xff\n") == "recipe.yaml: not UTF-8 text (byte offset 7)"
    assert "not UTF-8" in refused(tmp_path, GOOD.encode("utf-16"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [1,\ndata: }\n", "recipe.yaml:2:7: not valid YAML"),
        ("model: a\n\tdata: b\n", "recipe.yaml:2:"),
        ("model: *nowhere\n", "recipe.yaml:1:8: a recipe has no aliases"),
        (GOOD + "seed: 1\nseed: 2\n", 'recipe.yaml:15:1: not valid YAML: found duplicate key "seed"'),
        (
            changed("  batch: 8", "  batch: 8\n  batch: 9"),
            'recipe.yaml:6:3: not valid YAML: found duplicate key "batch"',
        ),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2:1: not valid YAML"),
        ("a: \x01\n", "recipe.yaml: not valid YAML"),
        ("seed: " + "9" * 5000 + "\n", "recipe.yaml: not valid YAML"),
        ("seed: 2001-99-99\n", "recipe.yaml: not valid YAML"),
    ],
    ids=["bracket", "tab", "alias", "duplicate", "nested duplicate", "two documents", "control", "huge", "date"],
)
def test_broken_yaml_is_refused_with_line_and_column(tmp_path, text, said):
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    "value",
    ["!!python/object:os.system ls", "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!thing 3"],
)
def test_a_tag_makes_no_object_it_is_refused(tmp_path, value):
    message = refused(tmp_path, f"{GOOD}seed: {value}\n")
    assert message.startswith("recipe.yaml:14:7: not valid YAML: could not determine a constructor for the tag")


def test_a_tag_that_does_not_fit_its_value_is_refused(tmp_path):
    assert "recipe.yaml" in refused(tmp_path, f"{GOOD}seed: !!bool maybe\n")


@pytest.mark.parametrize("text", ["[" * 500 + "]" * 500, "{a: " * 500 + "}" * 500, "- " * 500, "a: &x [*x]\n"])
def test_bottomless_yaml_is_refused(tmp_path, text):
    assert "recipe.yaml" in refused(tmp_path, text)


def test_a_list_as_a_key_is_refused(tmp_path):
    assert "recipe.yaml" in refused(tmp_path, f"{GOOD}? [a, b]\n: 1\n")


@pytest.mark.parametrize("key", ["3", "null", "true", "1.5"])
def test_a_key_that_is_no_text_is_refused(tmp_path, key):
    assert "keys should be strings" in refused(tmp_path, f"{GOOD}{key}: 1\n")


# --- what does not fit the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "sead: 1\n", "recipe.yaml:14: unknown key 'sead'. Did you mean 'seed'"),
        (changed("  batch: 8", "  bacth: 8"), "recipe.yaml:5: unknown key 'data.bacth'. Did you mean 'batch'"),
        (
            changed("    lr: 0.001", "    lr: 0.001\n    warm: 1"),
            "recipe.yaml:13: unknown key 'stages[1].warm'. Did you mean",
        ),
        (changed("momentum: 0.9", "momentun: 0.9"), "recipe.yaml:13: unknown key 'stages[1].optimizer.momentun'."),
        (
            GOOD + "tokenizer: {train: byte-bpe, size: 3}\n",
            "recipe.yaml:14: unknown key 'tokenizer.size'. Did you mean",
        ),
        (GOOD + "zebra: 1\n", "recipe.yaml:14: unknown key 'zebra'."),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path, text, said):
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "held-out: 1\n", "recipe.yaml:14: unknown key 'held-out'"),
        (GOOD + '"": 1\n', "recipe.yaml:14: unknown key ''"),
        (GOOD + "a b: 1\n", "recipe.yaml:14: unknown key 'a b'"),
        (
            changed("  batch: 8", "  held-out: 8"),
            "recipe.yaml:5: unknown key 'data.held-out'. Did you mean 'held_out' or 'layout'?",
        ),
    ],
)
def test_an_unknown_key_that_is_no_word_is_refused_too(tmp_path, text, said):
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            changed("  batch: 8", "  batch: 8.0"),
            "recipe.yaml:5: 'data.batch': input should be a valid integer, found 8.0",
        ),
        (
            changed("  batch: 8", "  batch: '8'"),
            "recipe.yaml:5: 'data.batch': input should be a valid integer, found '8'",
        ),
        (
            changed("  batch: 8", "  batch: true"),
            "recipe.yaml:5: 'data.batch': input should be a valid integer, found True",
        ),
        (
            changed("  batch: 8", "  batch: 0"),
            "recipe.yaml:5: 'data.batch': input should be greater than or equal to 1",
        ),
        (changed("1e-4", "fast"), "recipe.yaml:9: 'stages[0].lr': input should be a valid number, found 'fast'"),
        (changed("1e-4", "0"), "recipe.yaml:9: 'stages[0].lr': input should be greater than 0, found 0"),
        (changed("1e-4", ".nan"), "recipe.yaml:9: 'stages[0].lr': input should be a finite number, found nan"),
        (changed("learn: all", "learn: [all]"), "recipe.yaml:7: 'stages[0].learn': input should be a valid string"),
        (
            changed("name: sgd", "name: lyon"),
            "recipe.yaml:13: 'stages[1].optimizer.name': input should be 'adamw', 'adam'",
        ),
        (changed("text.txt", "[3]"), "recipe.yaml:4: 'data.train[0]': input should be a valid string, found 3"),
        (changed("text.txt", "[]"), "recipe.yaml:4: 'data.train': tuple should have at least 1 item"),
        (GOOD + "seed: -1\n", "recipe.yaml:14: 'seed': input should be greater than or equal to 0, found -1"),
        (GOOD + "ties: cut\n", "recipe.yaml:14: 'ties': input should be 'error', 'together' or 'untie', found 'cut'"),
        (GOOD + "eval: 3\n", "recipe.yaml:14: 'eval': input should be a valid dictionary"),
        (
            GOOD + "tokenizer: {train: bpe}\n",
            "recipe.yaml:14: 'tokenizer.train': input should be 'byte-bpe', found 'bpe'",
        ),
        (
            changed("{architecture: llama, hidden_size: 32}", "[llama]"),
            "recipe.yaml:2: 'model': input should be a valid",
        ),
        (changed("{architecture: llama, hidden_size: 32}", "null"), "recipe.yaml:2: 'model': input should be a valid"),
        (GOOD.split("stages")[0] + "stages: []\n", "recipe.yaml:6: 'stages': tuple should have at least 1 item"),
        (GOOD.split("stages")[0] + "stages: [all]\n", "recipe.yaml:6: 'stages[0]': input should be a valid"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_key_and_what_was_found(tmp_path, text, said):
    assert said in refused(tmp_path, text)


ONE_STAGE = GOOD.split("  - learn: ffn")[0]


@pytest.mark.parametrize(
    "text",
    [
        ONE_STAGE.replace("1e-4", "fast"),
        ONE_STAGE.replace("1e-4", "1e-4\n    warm: 1"),
        changed("text.txt", "[3]"),
        changed("  batch: 8", "  held_out: 0"),
    ],
)
def test_one_mistake_is_one_line(tmp_path, text):
    assert len(refused(tmp_path, text).splitlines()) == 1


def test_every_mistake_is_told_at_once(tmp_path):
    message = refused(tmp_path, changed("1e-4", "fast") + "sead: 1\nties: cut\n")
    assert all(key in message for key in ("'stages[0].lr'", "'sead'", "'ties'"))


@pytest.mark.parametrize("text", [changed("1e-4", ".inf"), changed("lr: 1e-4", "lr: 1e-4\n    clip: .inf")])
def test_an_infinite_setting_is_refused(tmp_path, text):
    assert "recipe.yaml" in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("  train: text.txt\n", ""), "recipe.yaml:3: 'data.train' is missing"),
        (
            GOOD.replace("    steps: 4\n", ""),
            "recipe.yaml:7: stages[0]: give one of steps, tokens and epochs; found none of them",
        ),
        (GOOD.split("stages")[0], "recipe.yaml: 'stages' is missing"),
        (GOOD.replace("architecture: llama, ", ""), "recipe.yaml:2: 'model.architecture' is missing"),
        ("{}\n", "recipe.yaml: 'model' is missing\nrecipe.yaml: 'data' is missing\nrecipe.yaml: 'stages' is missing"),
    ],
)
def test_a_missing_key_is_named_with_the_line_of_what_lacks_it(tmp_path, text, said):
    assert said in refused(tmp_path, text)


# --- what fits the record but makes no sense ------------------------------------------------------------------------


def test_stages_without_names_are_numbered_from_one():
    stage = {"learn": "all", "steps": 4, "lr": 1e-4}
    recipe = recipe_from_dict(minimal(stages=[stage, {**stage, "name": "late"}, stage]))
    assert [stage_name(recipe, i) for i in range(3)] == ["stage-1", "late", "stage-3"]


@pytest.mark.parametrize("size", [0, -1, 256, 10**30])
def test_a_vocabulary_that_no_byte_level_tokenizer_can_have_is_refused_by_its_name(size):
    with pytest.raises(RecipeError, match=r"tokenizer\.vocab_size"):
        recipe_from_dict(
            {
                "model": {"architecture": "llama"},
                "tokenizer": {"train": "byte-bpe", "vocab_size": size},
                "data": {"train": "text.txt"},
                "stages": [{"learn": "ffn", "steps": 1, "lr": 1e-3}],
            }
        )


@pytest.mark.parametrize("names", [("a", "a"), (None, "stage-1"), ("stage-2", None)])
def test_two_stages_of_one_name_are_refused(names):
    stages = [{"learn": "all", "steps": 4, "lr": 1e-4} | ({"name": n} if n else {}) for n in names]
    with pytest.raises(RecipeError, match=r"recipe: two stages are named '(a|stage-1|stage-2)'"):
        recipe_from_dict(minimal(stages=stages))


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", ".x", "a/b", "é"])
def test_a_stage_name_that_cannot_be_a_file_name_is_refused(name):
    with pytest.raises(RecipeError, match=r"'stages\[0\].name'"):
        recipe_from_dict(minimal(stages=[{"learn": "all", "steps": 4, "lr": 1e-4, "name": name}]))


@pytest.mark.parametrize(("batch", "accumulate", "good"), [(8, 4, True), (8, 8, True), (8, 3, False), (8, 16, False)])
def test_accumulate_divides_the_batch(batch, accumulate, good):
    stage = {"learn": "all", "steps": 4, "lr": 1e-4, "accumulate": accumulate}
    values = minimal(data={"train": "text.txt", "batch": batch}, stages=[stage])
    if good:
        assert recipe_from_dict(values).stages[0].accumulate == accumulate
    else:
        with pytest.raises(
            RecipeError, match=rf"stages\[0\].accumulate \({accumulate}\) does not divide data.batch \(8\)"
        ):
            recipe_from_dict(values)


@pytest.mark.parametrize(("warmup", "good"), [(0, True), (3, True), (4, False), (5, False)])
def test_warmup_ends_before_the_stage_does(warmup, good):
    values = minimal(stages=[{"learn": "all", "steps": 4, "lr": 1e-4, "warmup": warmup}])
    if good:
        assert recipe_from_dict(values).stages[0].warmup == warmup
    else:
        with pytest.raises(RecipeError, match=rf"stages\[0\]: warmup \({warmup}\) must be shorter than steps \(4\)"):
            recipe_from_dict(values)


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [
        ({"name": "sgd", "betas": [0.9, 0.99]}, "sgd has no setting 'betas'"),
        ({"name": "sgd", "eps": 1e-8}, "sgd has no setting 'eps'"),
        ({"name": "adamw", "momentum": 0.9}, "adamw has no setting 'momentum'"),
        ({"momentum": 0.9}, "adamw has no setting 'momentum'"),
    ],
)
def test_a_setting_of_another_optimizer_is_refused(optimizer, setting):
    with pytest.raises(RecipeError, match=setting):
        recipe_from_dict(minimal(stages=[{"learn": "all", "steps": 4, "lr": 1e-4, "optimizer": optimizer}]))


def stage_of(*lines):
    """The good recipe's head with one stage of these lines."""
    return GOOD.split("stages")[0] + "stages:\n  - learn: all\n" + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["steps: 8", "tokens: 4", "lr: 1e-3"],
            "recipe.yaml:7: stages[0]: give one of steps, tokens and epochs; found",
        ),
        (["steps: 8", "epochs: 1", "tokens: 4", "lr: 1"], "found steps and tokens and epochs"),
        (["epochs: 0", "lr: 1"], "recipe.yaml:8: 'stages[0].epochs': input should be greater than 0"),
        (["tokens: 1.5", "lr: 1"], "recipe.yaml:8: 'stages[0].tokens': input should be a valid integer"),
        (["steps: 8", "lr: {embed: fast, rest: 1e-4}"], "recipe.yaml:9: 'stages[0].lr.embed': input should be a valid"),
        (["steps: 8", "lr:", "  embed: 1", "  ffn: 0"], "recipe.yaml:11: 'stages[0].lr.ffn': input should be greater"),
        (["steps: 8", "lr: [1]"], "recipe.yaml:9: 'stages[0].lr': input should be a valid number, found [1]"),
        (
            ["steps: 8", "lr: 1", "optimizer:", "  weight_decay:", "    embed: -1"],
            "recipe.yaml:12: 'stages[0].optimizer.weight_decay.embed': input should be greater than or equal to 0",
        ),
        (
            ["steps: 8", "lr: 1", "optimizer: {betas: {embed: [0.9, 1.0]}}"],
            "recipe.yaml:10: 'stages[0].optimizer.betas.embed[1]': input should be less than 1, found 1.0",
        ),
        (["steps: 8", "lr: 1", "layer_decay: 1.5"], "recipe.yaml:10: 'stages[0].layer_decay': input should be less"),
        (["steps: 8", "lr: 1", "state: drop"], "'stages[0].state': input should be 'keep', 'reset' or 'offload'"),
        (["steps: 8", "lr: 1", "frozen_dropout: yes"], "'stages[0].frozen_dropout': input should be 'off' or 'on'"),
        (["steps: 8", "lr: 1", "plateau: {patience: 1}"], "recipe.yaml:10: 'stages[0].plateau.every' is missing"),
        (
            ["steps: 8", "lr: 1", "plateau: {every: 1, patienc: 1}"],
            "recipe.yaml:10: unknown key 'stages[0].plateau.pat",
        ),
    ],
)
def test_a_setting_of_a_stage_that_has_no_meaning_is_refused_with_its_line(tmp_path, lines, said):
    message = refused(tmp_path, stage_of(*lines))
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("every", "patience", "good"), [(2, 2, True), (1, 5, True), (4, 1, False), (2, 3, False), (7, 1, False)]
)
def test_a_plateau_can_end_its_stage_early(every, patience, good):
    """The first measurement is always a new best: `patience` more must come, and leave a step out."""
    plateau = {"every": every, "patience": patience}
    values = minimal(stages=[{"learn": "all", "steps": 7 + good, "lr": 1e-4, "plateau": plateau}])
    if good:
        assert recipe_from_dict(values).stages[0].plateau.patience == patience
    else:
        with pytest.raises(RecipeError, match=r"stages\[0\].plateau can never end the stage"):
            recipe_from_dict(values)


@pytest.mark.parametrize(
    ("stage", "across", "said"),
    [
        ({"warmup": 2}, {"warmup": 3}, r"stages\[0\] has a warmup or decay of its own beside lr_across"),
        ({"decay": "linear"}, {"decay": "linear"}, r"stages\[0\] has a warmup or decay of its own beside lr_across"),
        ({"plateau": {"every": 1}}, {"decay": "cosine"}, r"stages\[0\] may end early, so lr_across cannot decay"),
        ({"plateau": {"every": 1}}, {"warmup": 3}, None),
        ({}, {"warmup": 3, "decay": "cosine"}, None),
    ],
)
def test_the_rate_has_one_course(stage, across, said):
    values = minimal(stages=[{"learn": "all", "steps": 8, "lr": 1e-4, **stage}], lr_across=across)
    if said is None:
        assert recipe_from_dict(values).lr_across.warmup == 3
    else:
        with pytest.raises(RecipeError, match=said):
            recipe_from_dict(values)


# --- repetitions ----------------------------------------------------------------------------------------------------

REPEATED = (
    GOOD.split("stages")[0]
    + """\
stages:
  - {learn: all, steps: 4, lr: 1e-4, name: start}
  - repeat: 2
    stages:
      - learn: attn
        steps: 2
        lr: 1e-4
        name: a
      - learn: ffn
        steps: 2
        lr: 1e-3
  - {learn: all, steps: 4, lr: 1e-4, name: end}
"""
)


def repeated(old, new):
    assert REPEATED.count(old) == 1, old
    return REPEATED.replace(old, new)


def names(recipe):
    return [stage_name(recipe, i) for i in range(len(recipe.stages))]


def test_a_repetition_is_written_out_and_its_names_are_numbered(tmp_path):
    recipe = load(tmp_path, REPEATED)
    assert names(recipe) == ["start", "a-1", "stage-3", "a-2", "stage-5", "end"]
    assert [s.learn for s in recipe.stages] == ["all", "attn", "ffn", "attn", "ffn", "all"]
    assert recipe.stages[1].model_copy(update={"name": "a-2"}) == recipe.stages[3]


def test_repetitions_stand_in_one_another_and_count_outermost_first(tmp_path):
    inner = """\
      - repeat: 2
        stages:
          - {learn: attn, steps: 1, lr: 1, name: x}
"""
    recipe = load(tmp_path, repeated("  - {learn: all, steps: 4, lr: 1e-4, name: end}\n", inner))
    assert names(recipe) == ["start", "a-1", "stage-3", "x-1-1", "x-1-2", "a-2", "stage-7", "x-2-1", "x-2-2"]


def test_the_resolved_recipe_of_a_repetition_reads_back_equal(tmp_path):
    recipe = load(tmp_path, REPEATED)
    assert load(tmp_path, dump_yaml(recipe.as_dict())) == recipe


def test_an_override_reaches_into_a_repetition(tmp_path):
    recipe = load(tmp_path, REPEATED, "stages[1].stages[1].lr=1e-5", "stages[1].repeat=3")
    assert [s.lr for s in recipe.stages if s.learn == "ffn"] == [1e-5] * 3


def test_plain_data_may_hold_repetitions_and_is_left_alone():
    stage = {"learn": "all", "steps": 4, "lr": 1e-4, "name": "a"}
    values = minimal(stages=[{"repeat": 3, "stages": [stage]}])
    before = json.dumps(values)
    assert names(recipe_from_dict(values)) == ["a-1", "a-2", "a-3"]
    assert json.dumps(values) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (repeated("lr: 1e-3", "lr: fast"), "recipe.yaml:16: 'stages[1].stages[1].lr': input should be a valid number"),
        (
            repeated("lr: 1e-3", "lr: 1e-3\n        warm: 3"),
            "recipe.yaml:17: unknown key 'stages[1].stages[1].warm'. Did you mean 'warmup'",
        ),
        (repeated("        lr: 1e-3\n", ""), "recipe.yaml:14: 'stages[1].stages[1].lr' is missing"),
        (
            repeated("lr: 1e-3", "lr: 1e-3\n        warmup: 3"),
            "recipe.yaml:14: stages[1].stages[1]: warmup (3) must be shorter than steps (2)",
        ),
        (repeated("lr: 1e-3", "lr: 1e-3\n        name: a"), "two stages are named 'a-1'"),
        (
            repeated("repeat: 2", "repeat: 0"),
            "recipe.yaml:8: 'stages[1].repeat' must be a whole number from 1 on, found 0",
        ),
        (repeated("repeat: 2", "repeat: two"), "must be a whole number from 1 on, found 'two'"),
        (repeated("repeat: 2", "repeat: true"), "must be a whole number from 1 on, found True"),
        (
            repeated("repeat: 2", "repeat: 2\n    name: x"),
            "recipe.yaml:8: 'stages[1]': a repetition has the keys repeat and stages (a list), nothing else",
        ),
        (repeated("repeat: 2", "repeat: 9999"), "more than 10000 stages"),
        (
            GOOD.split("stages")[0] + "stages:\n  - {repeat: 2, stages: []}\n",
            "recipe.yaml:7: 'stages[0]': a repetition",
        ),
        (GOOD.split("stages")[0] + "stages:\n  - {repeat: 2}\n", "recipe.yaml:7: 'stages[0]': a repetition"),
        (
            GOOD.split("stages")[0] + "stages:\n  - {repeat: 2, stages: [3]}\n",
            "recipe.yaml:7: 'stages[0].stages[0]': input should be a valid dictionary",
        ),
    ],
)
def test_a_mistake_in_a_repetition_is_one_line_that_names_where_it_is_written(tmp_path, text, said):
    message = refused(tmp_path, text)
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("accumulate: 3", "stages[1].stages[1].accumulate (3) does not divide data.batch (8)"),
        ("plateau: {every: 9}", "stages[1].stages[1].plateau can never end the stage"),
    ],
)
def test_a_mistake_that_only_the_whole_recipe_shows_names_where_it_is_written_too(tmp_path, setting, said):
    """The file has no stages[2]: that is the stage's place after the repetition was written out."""
    message = refused(tmp_path, repeated("lr: 1e-3", f"lr: 1e-3\n        {setting}"))
    assert message.startswith("recipe.yaml:14: ")
    assert said in message


def test_bottomless_repetitions_are_refused():
    stage = {"learn": "all", "steps": 1, "lr": 1.0}
    for depth, times in ((100, 1), (4, 100)):
        nested = stage
        for _ in range(depth):
            nested = {"repeat": times, "stages": [nested]}
        with pytest.raises(RecipeError, match=r"a repetition has the keys|more than 10000 stages"):
            recipe_from_dict(minimal(stages=[nested]))


def test_a_recipe_cannot_be_changed_after_it_is_read():
    recipe = recipe_from_dict(minimal())
    for record, field in ((recipe, "seed"), (recipe.data, "batch"), (recipe.stages[0], "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(record, field, 1)
    assert isinstance(recipe.stages, tuple)


def test_reading_a_recipe_leaves_the_data_it_was_read_from_alone():
    values = minimal(data={"train": ["a.txt", "b.txt"]})
    before = json.dumps(values)
    recipe_from_dict(values)
    assert json.dumps(values) == before


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The working directory; the recipe lies in another folder, beside it."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def test_paths_in_the_file_are_relative_to_the_file(elsewhere):
    text = changed("text.txt", "[a.txt, ../b.txt, /c.txt]\n  held_out: later.txt")
    data = load(elsewhere / "recipes", text).data
    assert data.train == (f"{elsewhere}/recipes/a.txt", f"{elsewhere}/b.txt", "/c.txt")
    assert data.held_out == (f"{elsewhere}/recipes/later.txt",)


def test_a_recipe_named_by_a_relative_path_has_its_own_folder(elsewhere):
    (elsewhere / "recipes" / "r.yaml").write_text(GOOD)
    assert load_recipe("../recipes/r.yaml").data.train == (f"{elsewhere}/recipes/text.txt",)


@pytest.mark.parametrize(
    "override", ["data.train=text.txt", "data.train=[text.txt]", "data={train: text.txt, batch: 8}"]
)
def test_paths_in_an_override_are_relative_to_the_working_directory(elsewhere, override):
    recipe = load(elsewhere / "recipes", GOOD, override)
    assert recipe.data.train == (f"{elsewhere}/inside/text.txt",)


def test_one_path_of_a_list_in_an_override_is_relative_to_the_working_directory(elsewhere):
    recipe = load(elsewhere / "recipes", changed("text.txt", "[a.txt, b.txt]"), "data.train[1]=c.txt")
    assert recipe.data.train == (f"{elsewhere}/recipes/a.txt", f"{elsewhere}/inside/c.txt")


@pytest.mark.parametrize("train", ["text.txt", ["text.txt"]])
def test_paths_in_plain_data_are_relative_to_the_working_directory(elsewhere, train):
    assert recipe_from_dict(minimal(data={"train": train})).data.train == (f"{elsewhere}/inside/text.txt",)


def test_paths_in_a_tuple_are_relative_to_the_working_directory_too(elsewhere):
    assert recipe_from_dict(minimal(data={"train": ("text.txt",)})).data.train == (f"{elsewhere}/inside/text.txt",)


def test_a_hub_name_stays_a_name_unless_there_is_such_a_folder(elsewhere):
    (elsewhere / "recipes" / "org" / "here").mkdir(parents=True)
    for written, read in [
        ("gpt2", "gpt2"),
        ("org/other", "org/other"),
        ("org/here", f"{elsewhere}/recipes/org/here"),
        ("./gpt2", f"{elsewhere}/recipes/gpt2"),
    ]:
        text = changed("{architecture: llama, hidden_size: 32}", written) + f"tokenizer: {written}\n"
        recipe = load(elsewhere / "recipes", text)
        assert (recipe.model, recipe.tokenizer) == (read, read)


def test_home_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(tmp_path, changed("text.txt", "~/a.txt")).data.train == ("/home/someone/a.txt",)


@pytest.mark.parametrize("path", ['"a\\0b"', "~no_such_user_anywhere/a", '"\\ud800"', '""'])
def test_a_text_that_cannot_be_a_path_is_refused(tmp_path, path):
    assert "data.train" in refused(tmp_path, changed("text.txt", path))


def test_a_model_name_longer_than_a_file_name_is_read_or_refused(tmp_path):
    assert refused(tmp_path, changed("{architecture: llama, hidden_size: 32}", "a" * 5000))


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value_of", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        (" seed = 7 ", lambda r: r.seed, 7),
        ("stages[1].lr=1e-5", lambda r: r.stages[1].lr, 1e-5),
        ("stages[1].optimizer.momentum=0.5", lambda r: r.stages[1].optimizer.momentum, 0.5),
        ("stages[0].optimizer.name=sgd", lambda r: r.stages[0].optimizer.name, "sgd"),
        ("stages[0].clip=null", lambda r: r.stages[0].clip, None),
        ("eval.every=5", lambda r: r.eval.every, 5),
        ("tokenizer.train=byte-bpe", lambda r: r.tokenizer.train, "byte-bpe"),
        ("model.hidden_size=64", lambda r: r.model.config_fields["hidden_size"], 64),
        ("stages[0]={learn: embed, steps: 1, lr: 1}", lambda r: r.stages[0].learn, "embed"),
        ("stages[0].learn=all - embed | q", lambda r: r.stages[0].learn, "all - embed | q"),
        ("stages[0].learn='a=b'", lambda r: r.stages[0].learn, "a=b"),
        ("model=gpt2", lambda r: r.model, "gpt2"),
    ],
)
def test_an_override_sets_one_value_read_as_yaml(tmp_path, override, value_of, value):
    assert value_of(load(tmp_path, GOOD, override)) == value


def test_later_overrides_win(tmp_path):
    assert load(tmp_path, GOOD, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages[0].lr", "--set stages[0].lr: write key=value"),
        ("=3", "write a key as in stages[0].lr"),
        ("stages[x].lr=1", "--set stages[x].lr=1: write a key as in stages[0].lr"),
        ("stages[-1].lr=1", "write a key as in stages[0].lr"),
        ("stages.[0].lr=1", "write a key as in stages[0].lr"),
        ("a..b=1", "write a key as in stages[0].lr"),
        ("held-out=1", "write a key as in stages[0].lr"),
        ("stages[2].lr=1", "index 2 is out of range, the recipe has 2 (0-based)"),
        ("stages[2]={learn: all}", "index 2 is out of range, the recipe has 2 (0-based)"),
        ("data[0].train=1", "there is nothing at '0'"),
        ("stages.lr=1", "stages has no keys of its own"),
        ("stages[0].lr.x=1", "stages[0].lr has no keys of its own"),
        ("seed=[", "--set seed=[ (column 7): not valid YAML"),
        ("seed=a\0b", "--set seed=a b: not valid YAML: unacceptable character #x0000"),
        ("seed=!!python/name:os.system x", "could not determine a constructor"),
        ("sead=1", "unknown key 'sead'. Did you mean 'seed'"),
        ("stages[0].steps=1.5", "'stages[0].steps': input should be a valid integer, found 1.5"),
        ("seed=", "'seed': input should be a valid integer, found None"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(tmp_path, override, said):
    assert said in refused(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages[0].steps=1.5"], "--set stages[0].steps=1.5: 'stages[0].steps': input should be"),
        (["seed=1", "seed=x"], "--set seed=x: 'seed': input should be"),
        (["sead=1"], "--set sead=1: unknown key 'sead'"),
        (["stages[0]={learn: all, steps: 1}"], "--set stages[0]={learn: all, steps: 1}: 'stages[0].lr' is missing"),
        (["data={train: t, lenth: 8}", "data.batch=0"], "--set data.batch=0: 'data.batch': input should be"),
        (["stages[1].steps=1.5", "seed=1"], "--set stages[1].steps=1.5: 'stages[1].steps'"),
    ],
)
def test_what_an_override_says_wrong_names_the_override_and_not_a_line(tmp_path, overrides, said):
    found = refused(tmp_path, GOOD, *overrides)
    assert said in found
    assert "recipe.yaml:" not in found


def test_what_the_file_says_wrong_keeps_its_line_whatever_is_set(tmp_path):
    found = refused(tmp_path, changed("batch: 8", "batch: x"), "stages[0].steps=2", "data.length=8")
    assert found.startswith("recipe.yaml:5: 'data.batch'")
    assert "--set" not in found


def test_what_is_wrong_only_with_an_override_beside_it_names_both(tmp_path):
    found = refused(tmp_path, GOOD, "stages[0].warmup=9", "seed=1", "stages[0].tokens=5")
    assert re.search(r"yaml:\d+: stages\[0\]: give one of .* \(with --set stages\[0\].warmup=9, --set", found)
    assert "seed" not in found
    found = refused(tmp_path, GOOD, "stages[0].accumulate=3", "seed=1")
    assert "does not divide data.batch" in found
    assert found.endswith("(with --set stages[0].accumulate=3)")


LONG = "stages[0]={learn: ffn, optimizer: {name: adamw, device: cpu}, lr: 1e-4, steps: 3, x: [1, name: "


@pytest.mark.parametrize(
    ("override", "place", "what"),
    [
        ("stages[0]={:1:2", 15, "not valid YAML: expected ',' or '}', but got the end of it"),
        ("seed=@x", 5, "not valid YAML: found character '@' that cannot start any token"),
        ("seed= *x", 6, "a recipe has no aliases"),
        ("data={train: t, train: u}", 16, 'not valid YAML: found duplicate key "train"'),
        ("data=train: [\n  a: b: c", 20, "not valid YAML: expected ',' or ']', but got ':'"),
        (LONG + "}" * 80, len(LONG), "not valid YAML: "),
    ],
)
def test_broken_yaml_in_an_override_is_pointed_at_in_the_override_itself(tmp_path, override, place, what):
    said, text, pointer = refused(tmp_path, GOOD, override).split("\n")
    assert said.startswith(f"--set {override[:20]}".replace("\n", " "))
    assert f" (column {place + 1}): {what}" in said
    at = pointer.index("^")
    around = text[2:].strip("…")
    assert around in override.replace("\n", " ")
    assert (text + " ")[at] == (override + " ")[place]
    assert text[:at].endswith(override[max(0, place - 9) : place].replace("\n", " "))
    assert len(text) < 110


@pytest.mark.parametrize("override", [f"stages[{'9' * 5000}].lr=1", "seed=" + "[" * 500 + "]" * 500])
def test_an_enormous_override_is_refused(tmp_path, override):
    assert "--set" in refused(tmp_path, GOOD, override)


@given(st.lists(st.from_regex(r"[a-z_]+", fullmatch=True) | st.integers(0, 99), min_size=1, max_size=5))
@quick
def test_a_key_reads_back_as_it_is_written(path):
    path = ("first", *path)
    assert parse_key(format_key(path), "") == path


# --- writing --------------------------------------------------------------------------------------------------------

plain_text = st.text(st.characters(codec="utf-8", exclude_characters="\x85")) | st.sampled_from(
    ["1e-4", "null", "~", "yes", "1:30", "- a", "a: b", "#", "2001-01-01", "0o7", "<<", "=", "\u2028"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_text
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4), max_leaves=12
)


@given(plain)
@example("é" * 60 + " b")
@quick
def test_plain_values_read_back_equal_from_the_yaml_they_are_written_as(values):
    assert parse_yaml(dump_yaml(values), where="here").values == values


LONG_PATHS = (
    "/home/jose/proyectos/corpus en español/año 2024/canción de otoño/lección número ñ.txt",
    "/home/анна/проекты/языковые модели/учебные тексты/сказки",
    "/データ/言語モデル/訓練用テキスト/物語集 第一巻/すべて.txt",
    "/home/x/" + "é" * 60 + " b",
)
"""Texts that need quotes and are longer than a line, with a space inside."""


@pytest.mark.parametrize("path", LONG_PATHS)
def test_a_long_path_in_any_script_reads_back_without_a_space_more(path):
    assert parse_yaml(dump_yaml({"data": {"train": [path]}}), where="here").values == {"data": {"train": [path]}}


def test_the_next_line_character_reads_back_too():
    assert parse_yaml(dump_yaml("a\x85b"), where="here").values == "a\x85b"


finite = scalars.filter(lambda value: not isinstance(value, float) or math.isfinite(value))
numbers = st.floats(min_value=1e-30, max_value=1e30)
stage_settings = st.fixed_dictionaries(
    {"learn": plain_text, "steps": st.integers(5, 10**12), "lr": numbers | st.dictionaries(plain_text, numbers)},
    optional={
        "warmup": st.integers(0, 4),
        "decay": st.sampled_from(["none", "linear", "cosine"]),
        "clip": st.none() | numbers,
        "accumulate": st.sampled_from([1, 2, 4]),
        "state": st.sampled_from(["keep", "reset", "offload"]),
        "layer_decay": st.floats(0.1, 1.0),
        "frozen_dropout": st.sampled_from(["off", "on"]),
        "plateau": st.builds(dict, every=st.just(1), patience=st.integers(1, 3), min_delta=st.floats(0, 1)),
        "optimizer": st.sampled_from(
            [
                "adam",
                "lion",
                {"name": "sgd", "momentum": 0.5},
                {"betas": [0.8, 0.95], "eps": 1e-6},
                {"name": "muon", "betas": {"embed": [0.8, 0.9], "rest": [0.9, 0.95]}, "weight_decay": {"rest": 0.1}},
            ]
        ),
    },
)


@example([{"learn": "é" * 60 + " b", "steps": 1, "lr": 1.0}], 0, {})
@given(
    st.lists(stage_settings, min_size=1, max_size=3),
    st.integers(0, 2**63 - 1),
    st.dictionaries(st.sampled_from(["aaa", "bbb"]), finite | st.lists(finite, max_size=3)),
)
@settings(quick, max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes
def test_the_resolved_recipe_reads_back_equal(tmp_path_factory, stages, seed, fields):
    folder = tmp_path_factory.getbasetemp()
    model = {**fields, "architecture": "llama"}
    recipe = recipe_from_dict(minimal(model=model, stages=stages, seed=seed))
    (folder / "resolved.yaml").write_text(dump_yaml(recipe.as_dict()), encoding="utf-8")
    assert load_recipe(folder / "resolved.yaml") == recipe


def test_an_infinite_field_of_a_model_reads_back_too(tmp_path):
    recipe = load(tmp_path, changed("hidden_size: 32", "time_step_limit: [0.0, .inf]"))
    assert load(tmp_path, dump_yaml(recipe.as_dict())) == recipe


def test_the_resolved_recipe_states_every_default(tmp_path):
    values = load(tmp_path, GOOD).as_dict()
    assert set(values) == set(Recipe.model_fields)
    assert set(values["stages"][0]) == set(StageSpec.model_fields)
    assert values["stages"][0]["optimizer"]["weight_decay"] == 0.01


# --- nothing else can happen ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def recipe_or_refused(folder, text, *overrides):
    """Loads the text; any other exception than `RecipeError` is a failure."""
    file = folder / "any.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        assert isinstance(load_recipe(file, overrides=overrides), Recipe)
    except RecipeError as error:
        return str(error)
    return "read"


@given(st.text() | st.text(alphabet="abc:-[]{},&*!|>'\"#%@? \n\t01.~", max_size=40))
@example("not-a-word: 1")
@quick
def test_any_text_is_a_recipe_or_refused(folder, text):
    assert recipe_or_refused(folder, text)


@given(st.text(max_size=20) | st.from_regex(r"(stages|data|model)(\[\d\])?(\.\w+)?=[\[{\w:]*", fullmatch=True))
@quick
def test_any_override_makes_a_recipe_or_is_refused(folder, override):
    assert recipe_or_refused(folder, GOOD, override)


def places(value, path=()):
    """The path of every value inside plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


FULL = minimal(
    data={"train": ["a.txt"], "held_out": 0.1, "length": 8, "batch": 4},
    stages=[
        {"learn": "all", "steps": 4, "lr": 1e-4, "optimizer": {"name": "adamw", "betas": [0.9, 0.99]}, "name": "a"}
    ],
    tokenizer={"train": "byte-bpe"},
    eval={"every": 3},
    seed=1,
)


@st.composite
def spoiled(draw):
    """A full recipe with one value replaced by anything, or with one key more somewhere."""
    values = json.loads(json.dumps(FULL))
    *path, last = draw(st.sampled_from([p for p in places(FULL) if p]))
    target = values
    for key in path:
        target = target[key]
    if isinstance(target, dict) and draw(st.booleans()):
        last = draw(plain_text)
    target[last] = draw(plain)
    return values


@given(spoiled())
@example({**FULL, "not-a-word": 1})
@quick
def test_a_recipe_with_anything_anywhere_is_a_recipe_or_refused(folder, values):
    assert recipe_or_refused(folder, dump_yaml(values))
    try:
        assert isinstance(recipe_from_dict(values), Recipe)
    except RecipeError as error:
        assert str(error)  # noqa: PT017


def test_not_a_number_is_never_a_setting():
    for field in ("lr", "clip"):
        with pytest.raises(RecipeError, match="found nan"):
            recipe_from_dict(minimal(stages=[{"learn": "all", "steps": 4, "lr": 1e-4, field: math.nan}]))


def test_aliases_and_other_versions_of_yaml_are_refused(tmp_path):
    assert "aliases" in refused(tmp_path, GOOD + "seed: &s 3\neval: {every: *s}\n")
    assert "YAML 1.2, not 1.1" in refused(tmp_path, "%YAML 1.1\n---\n" + GOOD)
    assert load(tmp_path, "%YAML 1.2\n---\n" + GOOD).stages[0].lr == 1e-4
