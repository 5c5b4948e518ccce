"""Named schedules against an independent statement of their papers' definitions: who learns at which step."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import tiny

from frostline.anatomy import Anatomy, read_anatomy
from frostline.errors import RecipeError
from frostline.expansion import always_on, expand
from frostline.model import load_skeleton, untie
from frostline.recipe import Recipe, ScratchModel, recipe_from_dict
from frostline.schedule import Schedule
from frostline.schedule.named import block_order, draw, turns
from frostline.selection import select

N = 3
"""Layers of the tiny models."""


def recipe_of(schedule: dict[str, Any], architecture: str = "llama", **changes: Any) -> Recipe:
    values = {"model": tiny.config(architecture, tie_word_embeddings=False), "data": {"train": "text.txt"}}
    return recipe_from_dict({**values, "schedule": {"lr": 1e-3, **schedule}, **changes})


def anatomy_of(recipe: Recipe) -> Anatomy:
    skeleton = load_skeleton(recipe.model)
    if recipe.ties == "untie":
        untie(skeleton)
    return read_anatomy(skeleton)


def learning_at(schedule: dict[str, Any], architecture: str = "llama", **changes: Any) -> list[set[str]]:
    """For every step, the parts that learn: `embed`, `0` for the first layer, `0.attn`, `final_norm`, `head`, …"""
    recipe = recipe_of(schedule, architecture, **changes)
    anatomy = anatomy_of(recipe)
    plain, _ = expand(recipe, anatomy)
    out = []
    for spec in plain.stages:
        parts = {c.name for c, _ in select(anatomy, spec.learn, ties="together").by_component()}
        assert spec.steps is not None
        out += [_summary(parts, anatomy)] * spec.steps
    return out


def _summary(parts: set[str], anatomy: Anatomy) -> set[str]:
    found = parts & {"embed", "position", "final_norm", "head"}
    learnable = {c.name for c in anatomy.components if any(anatomy.learnable(s) for s in c.slices)}
    for i in range(anatomy.n_layers):
        mine = {n for n in learnable if n.startswith(f"layers[{i}].")}
        if mine <= parts:
            found.add(str(i))
        else:
            found |= {f"{i}.{n.split('.')[1]}" for n in mine & parts}
    return found


# --- ULMFiT ---------------------------------------------------------------------------------------------------------


def test_gradual_unfreezing_thaws_from_the_last_layer_down_and_never_freezes_again():
    found = learning_at({"name": "gradual-unfreezing", "each": {"steps": 2}})
    head = {"final_norm", "head"}
    expected = [head, head | {"2"}, head | {"2", "1"}, head | {"2", "1", "0"}, head | {"2", "1", "0", "embed"}]
    assert found == [e for e in expected for _ in range(2)]


def test_gradual_unfreezing_takes_several_layers_at_once_and_its_last_stage_may_be_longer():
    found = learning_at({"name": "gradual-unfreezing", "each": {"steps": 1}, "last": {"steps": 3}, "layers": 2})
    head = {"final_norm", "head"}
    everything = head | {"0", "1", "2", "embed"}
    assert found == [head, head | {"2", "1"}, head | {"2", "1", "0"}, everything, everything, everything]


def test_gradual_unfreezing_counts_epochs_and_knows_positions_as_part_of_the_input():
    recipe = recipe_of({"name": "gradual-unfreezing", "each": {"epochs": 1}}, "gpt2")
    plain, _ = expand(recipe, anatomy_of(recipe))
    assert [(s.name, s.epochs) for s in plain.stages] == [
        (n, 1) for n in ("thaw-1", "thaw-2", "thaw-3", "thaw-4", "all")
    ]
    assert learning_at({"name": "gradual-unfreezing", "each": {"steps": 1}}, "gpt2")[3] == {
        "0", "1", "2", "final_norm", "head",
    }  # fmt: skip


# --- LP-FT ----------------------------------------------------------------------------------------------------------

LP_FT: dict[str, Any] = {"name": "lp-ft", "probe": {"steps": 2}, "probe_lr": 1e-2, "tune": {"steps": 1}}


def test_lp_ft_is_the_head_alone_then_everything():
    assert learning_at(LP_FT) == [{"head"}, {"head"}, {"embed", "0", "1", "2", "final_norm", "head"}]
    plain, _ = expand(recipe := recipe_of(LP_FT), anatomy_of(recipe))
    assert [s.lr for s in plain.stages] == [1e-2, 1e-3]


@pytest.mark.parametrize("ties", ["error", "together"])
def test_lp_ft_refuses_a_tied_head_and_says_the_remedy(ties):
    tied = tiny.config("llama", tie_word_embeddings=True)
    recipe = recipe_of(LP_FT, model=tied, ties=ties)
    with pytest.raises(RecipeError, match=r"schedule.head: head is tied to embed .* `ties: untie`"):
        expand(recipe, anatomy_of(recipe))
    assert learning_at(LP_FT, model=tied, ties="untie")[0] == {"head"}


# --- turns ----------------------------------------------------------------------------------------------------------


def test_attention_and_ffn_take_turns_and_the_last_turn_may_be_shorter():
    found = learning_at({"name": "alternate", "every": 2, "steps": 5})
    attn, ffn = ({f"{i}.{part}" for i in range(N)} for part in ("attn", "ffn"))
    assert found == [attn, attn, ffn, ffn, attn]


def test_turns_offload_their_state_unless_told_otherwise():
    for state, given in (("offload", {}), ("keep", {"state": "keep"})):
        recipe = recipe_of({"name": "alternate", "every": 2, "steps": 4, **given})
        assert [s.state for s in expand(recipe, anatomy_of(recipe))[0].stages] == [state] * 2


def test_pretraining_then_freezing_attention_leaves_everything_else_learning():
    schedule = {"name": "pretrain-then-freeze", "joint": {"steps": 1}, "then": {"steps": 1}, "then_lr": 1e-4}
    joint, rest = learning_at(schedule)
    assert joint == {"embed", "0", "1", "2", "final_norm", "head"}
    assert rest == {
        "embed",
        "final_norm",
        "head",
        *(f"{i}.{p}" for i in range(N) for p in ("ffn", "attn_norm", "ffn_norm")),
    }
    assert "embed" not in learning_at({**schedule, "freeze": "attn | embed | norm"})[1]


# --- LISA -----------------------------------------------------------------------------------------------------------


def test_lisa_trains_so_many_drawn_layers_and_what_is_always_on():
    found = learning_at({"name": "lisa", "layers": 2, "every": 3, "steps": 30})
    assert len(found) == 30
    for step, parts in enumerate(found):
        assert {"embed", "head", "final_norm"} < parts
        assert len(parts & {"0", "1", "2"}) == 2 == len(parts) - 3
        assert parts == found[step // 3 * 3]
    assert len({frozenset(p) for p in found}) == 3  # with 10 draws every pair comes up
    only = learning_at({"name": "lisa", "layers": 1, "every": 1, "steps": 8, "always": None})
    assert all(len(parts) == 1 for parts in only)


def test_lisas_draws_are_uniform_independent_and_a_function_of_the_seed():
    n, size, n_draws = 6, 2, 6000
    drawn = [draw(7, k, n, size) for k in range(n_draws)]
    assert drawn == [draw(7, k, n, size) for k in range(n_draws)]
    assert drawn != [draw(8, k, n, size) for k in range(n_draws)]
    pairs = Counter(drawn)
    expected = n_draws / 15
    assert set(pairs) == set(itertools.combinations(range(n), size))
    chi_squared = sum((pairs[p] - expected) ** 2 / expected for p in pairs)
    assert chi_squared < 36.1  # 14 degrees of freedom: exceeded by chance in one of a thousand seeds
    again = sum(a == b for a, b in itertools.pairwise(drawn)) / n_draws
    assert again == pytest.approx(1 / 15, abs=4 * (14 / 15**2 / n_draws) ** 0.5)


def test_lisas_seed_is_the_recipes_unless_it_has_its_own():
    schedule = {"name": "lisa", "layers": 1, "every": 1, "steps": 20}
    assert learning_at(schedule, seed=3) == learning_at({**schedule, "seed": 3}, seed=5)
    assert learning_at(schedule, seed=3) != learning_at(schedule, seed=5)


def test_the_memory_share_of_what_is_always_on_is_that_of_its_parameters():
    recipe = recipe_of({"name": "lisa", "layers": 1, "every": 1, "steps": 2, "always": "embed | head"})
    anatomy = anatomy_of(recipe)
    plain, expansion = expand(recipe, anatomy)
    stages = [(s.name or "", s, select(anatomy, s.learn)) for s in plain.stages]
    found = always_on(expansion, Schedule.of(stages))
    assert found is not None
    n_always = 2 * 320 * 32
    n_layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert (found.n_elements, found.stage_elements) == (n_always, n_always + n_layer)
    assert (found.n_bytes, found.stage_bytes) == (n_always * 12, (n_always + n_layer) * 12)  # gradient and two moments


# --- BAdam ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "blocks"), [("ascending", "01201201"), ("descending", "21021021")])
def test_badam_goes_through_the_layers_in_its_order(order, blocks):
    found = learning_at({"name": "badam", "every": 2, "steps": 16, "order": order})
    assert found == [{b} for b in blocks for _ in range(2)]


def test_badams_random_order_takes_every_block_once_before_any_again():
    order = block_order("random", 5, 23, seed=4)
    cycles = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(c) == [0, 1, 2, 3, 4] for c in cycles)
    assert len(set(cycles)) == 4
    assert len(set(order[20:])) == 3
    firsts = Counter(block_order("random", 5, 5, seed=s)[0] for s in range(2000))
    assert all(abs(n - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5 for n in firsts.values())


def test_badams_blocks_may_include_embedding_and_head_and_its_state_is_reset():
    schedule = {"name": "badam", "every": 1, "steps": 5, "order": "ascending", "embed": True, "head": True}
    assert learning_at(schedule) == [{"embed"}, {"0"}, {"1"}, {"2"}, {"final_norm", "head"}]
    recipe = recipe_of({**schedule, "always": "norm"})
    plain, _ = expand(recipe, anatomy_of(recipe))
    assert {s.state for s in plain.stages} == {"reset"}
    assert [s.learn for s in plain.stages][:2] == ["embed | norm", "layers[0] | norm"]


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "every", "expected"), [(5, 2, (2, 2, 1)), (4, 2, (2, 2)), (1, 9, (1,))])
def test_turns_add_up_to_the_steps(steps, every, expected):
    assert turns(steps, every) == expected


def test_settings_reach_every_stage_and_defaults_are_left_out():
    settings = {"optimizer": "sgd", "clip": None, "lr": {"embed": 1e-4, "rest": 1e-3}, "accumulate": 2}
    recipe = recipe_of({"name": "lisa", "layers": 1, "every": 2, "steps": 4, **settings})
    plain, expansion = expand(recipe, anatomy_of(recipe))
    for stage in plain.stages:
        assert (stage.optimizer.name, stage.clip, stage.accumulate) == ("sgd", None, 2)
        assert stage.lr == {"embed": 1e-4, "rest": 1e-3}
    assert expansion is not None
    assert set(expansion.stages[0]) == {"name", "learn", "steps", *settings}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "lisa", "layers": 4, "every": 1, "steps": 2}, "schedule.layers: 4 layers cannot be drawn from"),
        ({"name": "lisa", "layers": 1, "every": 1, "steps": 2, "always": "heed"}, r"schedule.always: .*heed"),
        ({"name": "lisa", "layers": 1, "every": 1, "steps": 20_000}, "more than 10000 stages"),
        ({"name": "alternate", "every": 4, "steps": 9, "warmup": 1}, "schedule alternate, its stage 'turn-3': warmup"),
        ({"name": "badam", "every": 1, "steps": 1, "accumulate": 3}, "its stage 'block-1': accumulate"),
        ({"name": "spectrum", "top": 0.5, "train": {"steps": 1}}, "a model from scratch has none"),
        (
            {"name": "pretrain-then-freeze", "joint": {"steps": 1}, "then": {"steps": 1}, "freeze": "atn"},
            "schedule.freeze: .*atn",
        ),
    ],
)
def test_what_makes_no_sense_over_a_model_is_said_in_the_schedules_own_words(schedule, said):
    recipe = recipe_of(schedule)
    with pytest.raises(RecipeError, match=said) as caught:
        expand(recipe, anatomy_of(recipe))
    assert "stages[" not in str(caught.value)


def test_a_recipe_with_plain_stages_is_left_as_it_is(tmp_path):
    recipe = tiny.recipe(tmp_path)
    assert expand(recipe, tiny.anatomy("llama")) == (recipe, None)


def test_every_architecture_with_layers_can_be_scheduled():
    for architecture in ("gpt2", "mixtral", "olmo2"):
        for schedule in (
            {"name": "lisa", "layers": 1, "every": 1, "steps": 2, "always": "final_norm"},
            {"name": "badam", "every": 1, "steps": 4, "order": "random"},
            {"name": "alternate", "every": 1, "steps": 2},
        ):
            recipe = recipe_of(schedule, architecture)
            anatomy = read_anatomy(load_skeleton(ScratchModel(**tiny.config(architecture))))
            assert len(expand(recipe, anatomy)[0].stages) == schedule["steps"]
