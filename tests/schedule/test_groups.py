"""Settings by part: they partition what learns, and every element gets the value that it would get by hand.

The reference writes every setting into a tensor of the shape of each parameter, in the order in which the keys stand.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from frostline.anatomy import anatomy_of_parts, put
from frostline.errors import FrostlineError, RecipeError, SelectionError
from frostline.prepared import make_selections
from frostline.recipe import RunRateSpec, StageSpec
from frostline.schedule import Schedule, make_groups
from frostline.selection import Selection, select

quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])

LLAMA_PARTS = ("embed", "head", "norm", "attn", "ffn", "attn.q", "layers[0]", "layers[1:]", "ffn.up & layers[-1]")
PARTS = {
    "llama": (*LLAMA_PARTS, "layers[1].attn.heads[2]", "ffn.neurons[3:9]", "embed.rows[:16]"),
    "mixtral": (*LLAMA_PARTS[:-1], "experts[1]", "router", "experts[0,2].gate"),
    "gpt2": ("embed | head", "attn", "attn.k", "attn.heads[1]", "bias", "norm", "ffn", "layers[2]"),
}


def by_element(selection: Selection, value: Any) -> dict[str, torch.Tensor]:
    """A setting for every element of what learns, NaN elsewhere; keys in order, `rest` for what no key names."""
    anatomy = selection.anatomy
    out = {s.tensor: torch.full(anatomy.tensor[s.tensor].shape, torch.nan) for s in selection.slices}
    fill(out, selection, value["rest"] if isinstance(value, dict) and "rest" in value else value)
    for expression, one in value.items() if isinstance(value, dict) else ():
        if expression != "rest":
            named = select(anatomy, expression, ties="together")
            both = {n: t.clone() for n, t in out.items()}
            fill(both, named, one)
            for n, t in out.items():
                t[~t.isnan()] = both[n][~t.isnan()]
    return out


def fill(tensors: dict[str, torch.Tensor], selection: Selection, value: Any) -> None:
    for s in selection.slices:
        if s.tensor in tensors:
            put(tensors[s.tensor], s, torch.full(s.shape, float(value)))


def overlapping(anatomy_name: str, learn: str, keys: list[str]) -> bool:
    """Whether two keys name an element of what learns, or one names none of it."""
    anatomy = tiny.anatomy(anatomy_name)
    counts = {t.name: torch.zeros(t.shape) for t in anatomy.tensors}
    learning = select(anatomy, learn, ties="together")
    for key in keys:
        mine = {n: torch.zeros_like(t) for n, t in counts.items()}
        fill(mine, select(anatomy, key, ties="together"), 1)
        inside = {n: torch.zeros_like(t) for n, t in counts.items()}
        fill(inside, learning, 1)
        mine = {n: t * inside[n] for n, t in mine.items()}
        if not any(bool(t.any()) for t in mine.values()):
            return True
        counts = {n: t + mine[n] for n, t in counts.items()}
    return any(bool((t > 1).any()) for t in counts.values())


def groups_of(architecture: str, learn: str, **fields: Any):
    selection = select(tiny.anatomy(architecture), learn, ties="together")
    spec = StageSpec.model_validate({"learn": learn, "steps": 4, "lr": 1e-3, **fields})
    return selection, make_groups(selection, spec)


def spread(selection: Selection, groups: Any, setting: str) -> dict[str, torch.Tensor]:
    """What the groups give every element; every element at most once."""
    shapes = {s.tensor: selection.anatomy.tensor[s.tensor].shape for s in selection.slices}
    out = {n: torch.full(shape, torch.nan) for n, shape in shapes.items()}
    counts = {n: torch.zeros(shape) for n, shape in shapes.items()}
    for g in groups:
        for s in g.slices:
            put(out[s.tensor], s, torch.full(s.shape, float(getattr(g, setting))))
            one = torch.zeros_like(counts[s.tensor])
            put(one, s, torch.ones(s.shape))
            counts[s.tensor] += one
    assert all(bool((t <= 1).all()) for t in counts.values())
    return out


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def maps_of_parts(draw: Any) -> tuple[str, str, dict[str, float]]:
    architecture = draw(st.sampled_from(sorted(PARTS)))
    learn = draw(st.sampled_from(["all", "attn | ffn", "all - norm", "layers[1:]"]))
    keys = draw(st.lists(st.sampled_from(PARTS[architecture]), min_size=1, max_size=3, unique=True))
    assume(not overlapping(architecture, learn, keys))
    values = [0.001 * (i + 1) for i in range(len(keys) + 1)]
    return architecture, learn, dict(zip([*keys, "rest"], values, strict=True))


@given(maps_of_parts())
@quick
def test_settings_by_part_partition_what_learns(drawn: tuple[str, str, dict[str, float]]) -> None:
    architecture, learn, value = drawn
    selection, groups = groups_of(architecture, learn, lr=value)
    assert_equal(spread(selection, groups, "lr"), by_element(selection, value))
    assert sum(s.n_elements for g in groups for s in g.slices) == selection.n_elements


@given(maps_of_parts())
@quick
def test_a_map_without_rest_needs_every_part_that_learns(drawn: tuple[str, str, dict[str, float]]) -> None:
    architecture, learn, value = drawn
    selection = select(tiny.anatomy(architecture), learn, ties="together")
    rest = by_element(selection, value)
    is_whole = not any(bool((t == torch.tensor(value["rest"])).any()) for t in rest.values())
    without = {k: v for k, v in value.items() if k != "rest"}
    if is_whole:
        _, groups = groups_of(architecture, learn, lr=without)
        assert_equal(spread(selection, groups, "lr"), rest)
    else:
        with pytest.raises(SelectionError, match=r"lr: no value for .*; add 'rest: …' for what the other keys do not"):
            groups_of(architecture, learn, lr=without)


@given(maps_of_parts(), st.data())
@quick
def test_maps_of_several_settings_are_independent_of_each_other(drawn: Any, data: Any) -> None:
    """A part that has a rate of its own need not have a decay of its own, nor the other way round."""
    architecture, learn, rates = drawn
    keys = data.draw(st.lists(st.sampled_from(PARTS[architecture]), min_size=1, max_size=2, unique=True))
    assume(not overlapping(architecture, learn, keys))
    decays = {**{k: 0.1 * (i + 1) for i, k in enumerate(keys)}, "rest": 0.5}
    optimizer = {"weight_decay": decays, "decay_norms_and_biases": True}
    selection, groups = groups_of(architecture, learn, lr=rates, optimizer=optimizer)
    assert_equal(spread(selection, groups, "lr"), by_element(selection, rates))
    assert_equal(spread(selection, groups, "weight_decay"), by_element(selection, decays))


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ("lr", {"lr": {"embed": 1e-5, "rest": 1e-4}}),
        ("weight_decay", {"optimizer": {"weight_decay": {"embed": 0.3, "rest": 0.2}, "decay_norms_and_biases": True}}),
    ],
)
def test_a_rate_or_a_decay_by_part_stands_beside_layer_decay(setting: str, fields: dict[str, Any]) -> None:
    selection, groups = groups_of("llama", "all", layer_decay=0.5, **fields)
    found = spread(selection, groups, setting)
    value = fields["lr"] if setting == "lr" else fields["optimizer"]["weight_decay"]
    expected = by_element(selection, value)
    if setting == "lr":
        for name in expected:
            expected[name] *= 0.5 ** layers_before_the_last(name, 3)
    assert_equal(found, expected)


def layers_before_the_last(name: str, n_layers: int) -> int:
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    if layer:
        return n_layers - 1 - int(layer[1])
    return n_layers if re.search(r"embed|wte|wpe", name) else 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@given(decay=st.floats(0.1, 1.0))
@quick
def test_layer_decay_multiplies_the_rate_once_per_layer_before_the_last(architecture: str, decay: float) -> None:
    selection, groups = groups_of(architecture, "all", layer_decay=decay)
    expected = {
        s.tensor: torch.full(
            selection.anatomy.tensor[s.tensor].shape, 1e-3 * decay ** layers_before_the_last(s.tensor, 3)
        )
        for s in selection.slices
    }
    assert_equal(spread(selection, groups, "lr"), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("by_part", [False, True])
def test_norms_and_biases_are_not_decayed_unless_asked(architecture: str, by_part: bool) -> None:
    decay: Any = {"layers[0]": 0.2, "rest": 0.1} if by_part else 0.1
    selection, groups = groups_of(architecture, "all", optimizer={"weight_decay": decay})
    plain = {n for n in spread(selection, groups, "lr") if re.search(r"norm|ln_|bias$", n)}
    assert plain
    expected = by_element(selection, decay)
    for name in plain:
        expected[name] = torch.zeros_like(expected[name])
    assert_equal(spread(selection, groups, "weight_decay"), expected)
    _, everything = groups_of(architecture, "all", optimizer={"weight_decay": decay, "decay_norms_and_biases": True})
    assert_equal(spread(selection, everything, "weight_decay"), by_element(selection, decay))


def test_a_tied_part_is_named_by_either_of_its_names() -> None:
    for name in ("embed", "head"):
        selection, groups = groups_of("gpt2", "all", lr={name: 1e-5, "rest": 1e-3})
        rates = spread(selection, groups, "lr")
        assert {n for n, t in rates.items() if t.unique().tolist() == [torch.tensor(1e-5)]} == {
            "transformer.wte.weight"
        }


def test_equal_values_of_two_parts_are_one_group() -> None:
    _, groups = groups_of("llama", "all - norm", lr={"embed": 1e-3, "attn": 1e-4, "rest": 1e-3})
    assert sorted(g.lr for g in groups) == [1e-4, 1e-3]


# --- refused --------------------------------------------------------------------------------------------------------

REFUSED = {
    "overlap": ({"attn": 1e-4, "attn.q | ffn": 1e-5, "rest": 1e-3}, "'attn.q | ffn' overlaps with a part before it"),
    "taken": ({"attn": 1e-4, "attn.q": 1e-5, "rest": 1e-3}, "'attn.q': what it names has a value already"),
    "frozen": ({"embed": 1e-4, "rest": 1e-3}, "'embed': nothing of it learns in this stage"),
    "no rest": ({"attn": 1e-4}, r"no value for layers\[0\].ffn"),
    "unknown": ({"atn": 1e-4, "rest": 1e-3}, r"(?s)atn.*attn"),
    "empty": ({}, "no value for layers"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("setting", ["lr", "weight_decay", "betas"])
def test_parts_that_do_not_fit_are_refused_with_the_setting_and_the_part(setting: str, case: str) -> None:
    value, said = REFUSED[case]
    if setting == "lr":
        fields: dict[str, Any] = {"lr": value}
    else:
        one = (0.8, 0.9) if setting == "betas" else 0.1
        fields = {"optimizer": {setting: dict.fromkeys(value, one)}}
    with pytest.raises(SelectionError, match=said) as caught:
        groups_of("llama", "attn | ffn", **fields)
    assert str(caught.value).startswith(f"{setting}: ")


def test_a_part_that_does_not_fit_is_refused_before_anything_is_loaded_and_names_the_stage(tmp_path: Any) -> None:
    stages = [
        {"learn": "all", "steps": 1, "lr": 1e-3},
        {"learn": "ffn", "steps": 1, "lr": {"attn": 1e-3, "rest": 1e-4}},
    ]
    recipe = tiny.recipe(tmp_path, stages=stages)
    with pytest.raises(RecipeError, match=r"stages\[1\].*lr: 'attn': nothing of it learns in this stage"):
        make_selections(recipe, tiny.anatomy("llama"))


@given(
    st.dictionaries(
        st.sampled_from([*PARTS["llama"], "rest", "nothing", "attn -", "embed - embed", "", "experts[0]"]),
        st.just(1e-3),
        max_size=3,
    )
)
@quick
def test_any_map_of_parts_is_settings_or_a_typed_error(value: dict[str, float]) -> None:
    try:
        selection, groups = groups_of("llama", "attn | ffn", lr=value)
    except FrostlineError:
        return
    assert sum(s.n_elements for g in groups for s in g.slices) == selection.n_elements


# --- rates over the run ---------------------------------------------------------------------------------------------


def laid(lengths: list[int], across: RunRateSpec | None = None, **fields: Any) -> Schedule:
    module = torch.nn.Linear(2, 2, bias=False)
    selection = select(anatomy_of_parts(module, {"body": ["weight"]}), "body")
    specs = [
        (f"s{i}", StageSpec.model_validate({"learn": "body", "steps": n, "lr": 1e-3, **fields}), selection)
        for i, n in enumerate(lengths)
    ]
    return Schedule.of(specs, across=across)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
@quick
def test_one_course_across_the_run_does_not_see_the_stages(lengths: list[int], data: Any) -> None:
    n = sum(lengths)
    warmup = data.draw(st.integers(0, n - 1))
    decay = data.draw(st.sampled_from(["none", "linear", "cosine"]))
    schedule = laid(lengths, RunRateSpec(warmup=warmup, decay=decay))
    rising = np.arange(1, warmup + 1) / (warmup + 1)
    x = np.arange(n - warmup) / (n - warmup)
    falling = {"none": np.ones_like(x), "linear": 1 - x, "cosine": np.cos(np.pi * x / 2) ** 2}[decay]
    found = [schedule.rate_at(i) for i in range(n)]
    np.testing.assert_allclose(found, np.concatenate([rising, falling]), rtol=1e-12)


def test_the_course_across_the_run_multiplies_every_stages_own_rates(tmp_path: Any) -> None:
    import frostline
    from frostline.run_folder import RunFolder

    stages = [
        {"learn": "attn | ffn", "steps": 3, "lr": {"attn": 1e-3, "rest": 2e-3}},
        {"learn": "ffn", "steps": 3, "lr": 1e-2},
    ]
    recipe = tiny.recipe(tmp_path, stages=stages, lr_across={"warmup": 2, "decay": "linear"})
    assert frostline.train(recipe, out=tmp_path / "run").audit.passed
    run = RunFolder.open(tmp_path / "run")
    rates = [row["lr"] for row in run.read_lines(run.metrics) if "lr" in row]
    factors = np.array([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])
    np.testing.assert_allclose(rates, factors * np.array([2e-3] * 3 + [1e-2] * 3), rtol=1e-12)
