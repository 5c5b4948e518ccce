"""Schedules: a table with a pure lookup, and learning rates against closed forms written with numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

quick = settings(deadline=None, max_examples=25)


def spec(steps, **fields):
    return StageSpec(**{"learn": "ffn", "steps": steps, "lr": 1e-3, **fields})


def schedule(*lengths):
    selection = select(tiny.anatomy("llama"), "ffn")
    return Schedule.of([(f"s{i}", spec(n), selection) for i, n in enumerate(lengths)])


def rates(start=0, **fields):
    """The learning rate of every step of one stage that starts at `start`."""
    s = spec(**fields)
    selection = select(tiny.anatomy("llama"), "ffn")
    before = [("before", spec(start), selection)] if start else []
    table = Schedule.of([*before, ("s", s, selection)])
    return np.array([s.lr * table.rate_at(start + i) for i in range(s.steps)])


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(lengths)
@quick
def test_stages_follow_one_another_without_gaps(numbers):
    table = schedule(*numbers)
    owners = np.repeat(np.arange(len(numbers)), numbers)
    assert table.n_steps == len(owners) == sum(numbers)
    assert [table.at(step).index for step in range(table.n_steps)] == list(owners)


@given(lengths)
@quick
def test_a_stage_starts_where_the_one_before_it_ends(numbers):
    stages = schedule(*numbers).stages
    assert [s.start for s in stages] == [0, *np.cumsum(numbers)[:-1]]
    assert [s.end for s in stages] == list(np.cumsum(numbers))
    assert [(s.index, s.name) for s in stages] == [(i, f"s{i}") for i in range(len(numbers))]


def test_the_step_before_a_boundary_belongs_to_the_stage_before_it():
    table = schedule(3, 1, 2)
    assert [table.at(step).name for step in (0, 2, 3, 4, 5)] == ["s0", "s0", "s1", "s2", "s2"]


@given(lengths, st.randoms())
@quick
def test_the_lookup_depends_on_the_step_alone(numbers, random):
    table = schedule(*numbers)
    steps = list(range(table.n_steps)) * 2
    expected = {step: table.at(step) for step in steps}
    random.shuffle(steps)
    assert all(table.at(step) is expected[step] for step in steps)


@pytest.mark.parametrize("step", [-1, 6, 7])
def test_a_step_outside_the_run_belongs_to_no_stage(step):
    with pytest.raises((AssertionError, ValueError, IndexError)):
        schedule(3, 1, 2).at(step)


@pytest.mark.parametrize("starts", [(1, 4), (0, 2), (0, 4), (3, 0)])
def test_a_table_with_a_gap_or_an_overlap_cannot_exist(starts):
    good = schedule(3, 2).stages
    moved = tuple(replace(s, start=start) for s, start in zip(good, starts, strict=True))
    with pytest.raises(AssertionError, match="follow one another from step 0"):
        Schedule(stages=moved)


# --- learning rates -------------------------------------------------------------------------------------------------


def test_without_warmup_and_decay_the_rate_is_the_peak():
    assert (rates(steps=5, lr=0.25) == 0.25).all()


@pytest.mark.parametrize("warmup", [1, 2, 7])
def test_warmup_rises_in_equal_steps_from_above_zero_to_the_peak(warmup):
    measured = rates(steps=warmup + 3, warmup=warmup, lr=0.3)
    np.testing.assert_allclose(measured[: warmup + 1], np.linspace(0, 0.3, warmup + 2)[1:], rtol=1e-12)
    assert measured[0] > 0
    assert measured[warmup] == 0.3


@pytest.mark.parametrize("warmup", [0, 3])
def test_linear_decay_is_a_line_that_would_reach_zero_one_step_after_the_end(warmup):
    measured = rates(steps=warmup + 8, warmup=warmup, lr=0.2, decay="linear")
    np.testing.assert_allclose(measured[warmup:], np.linspace(0.2, 0, 9)[:-1], rtol=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_decay_is_half_a_wave_that_would_reach_zero_one_step_after_the_end(warmup):
    measured = rates(steps=warmup + 8, warmup=warmup, lr=0.2, decay="cosine")
    angles = np.linspace(0, np.pi, 9)[:-1]
    np.testing.assert_allclose(measured[warmup:], 0.2 * np.cos(angles / 2) ** 2, rtol=1e-12)


settings_of_a_stage = st.integers(1, 60).flatmap(
    lambda steps: st.fixed_dictionaries(
        {
            "steps": st.just(steps),
            "warmup": st.integers(0, steps - 1),
            "decay": st.sampled_from(["none", "linear", "cosine"]),
            "lr": st.floats(1e-12, 1e6),
        }
    )
)


@given(settings_of_a_stage)
@quick
def test_the_rate_is_always_above_zero_and_reaches_the_peak_but_never_passes_it(fields):
    measured = rates(**fields)
    assert (measured > 0).all()
    assert measured.max() == measured[fields["warmup"]] == fields["lr"]


@given(settings_of_a_stage)
@quick
def test_the_rate_rises_during_warmup_and_never_after_it(fields):
    measured, warmup = rates(**fields), fields["warmup"]
    assert (np.diff(measured[: warmup + 1]) > 0).all()
    assert (np.diff(measured[warmup:]) <= 0).all()


@given(settings_of_a_stage, st.integers(0, 10**6))
@quick
def test_the_rate_depends_on_the_steps_done_in_the_stage_not_in_the_run(fields, start):
    assert (rates(**fields) == rates(start=start, **fields)).all()
