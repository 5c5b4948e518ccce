"""Schedules: a table with a pure lookup, and learning rates against closed forms written with numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.recipe import PlateauSpec, StageSpec
from frostline.schedule import Schedule, StepSize, plateaued
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


# --- durations ------------------------------------------------------------------------------------------------------

sizes = st.builds(
    lambda rows, length, n: StepSize(tokens=rows * length, rows=rows, n_rows=n),
    st.integers(1, 64), st.integers(1, 4096), st.integers(1, 10**9),
)  # fmt: skip


def duration(**fields):
    return StageSpec(**{"learn": "ffn", "lr": 1e-3, **fields})


@given(sizes, st.integers(1, 10**15))
@quick
def test_tokens_are_the_fewest_steps_that_hold_them(size, tokens):
    n = size.n_steps(duration(tokens=tokens))
    assert (n - 1) * size.tokens < tokens <= n * size.tokens


@given(sizes, st.integers(1, 10**6), st.integers(0, 4))
@quick
def test_epochs_are_the_fewest_steps_that_hold_their_rows(size, digits, places):
    """Of the number as it is written: 0.1 epochs of 30 rows are 3 rows, not a little more."""
    epochs = Fraction(digits, 10**places)
    rows = epochs * size.n_rows
    n = size.n_steps(duration(epochs=float(epochs)))
    assert n == max(1, math.ceil(rows / size.rows))


@pytest.mark.parametrize(
    ("epochs", "n_rows", "rows", "n"),
    [(0.1, 30, 1, 3), (0.7, 10, 1, 7), (1.1, 10, 1, 11), (3, 10, 4, 8), (1e-9, 5, 4, 1)],
)
def test_no_rounding_error_decides_about_a_step(epochs, n_rows, rows, n):
    assert StepSize(tokens=rows * 8, rows=rows, n_rows=n_rows).n_steps(duration(epochs=float(epochs))) == n


@given(sizes, st.integers(1, 10**12))
@quick
def test_steps_are_steps_whatever_the_data(size, steps):
    assert size.n_steps(duration(steps=steps)) == steps


def test_stages_of_every_duration_follow_one_another():
    size = StepSize(tokens=80, rows=8, n_rows=100)
    selection = select(tiny.anatomy("llama"), "ffn")
    specs = [duration(steps=3), duration(tokens=81), duration(epochs=0.5)]
    table = Schedule.of([(f"s{i}", s, selection) for i, s in enumerate(specs)], step_size=size)
    assert [(s.start, s.end) for s in table.stages] == [(0, 3), (3, 5), (5, 12)]
    for one in specs[1:]:
        with pytest.raises(ValueError, match="stage s: without training rows, a duration is in steps"):
            Schedule.of([("s", one, selection)])


# --- endings --------------------------------------------------------------------------------------------------------


@st.composite
def ended_schedules(draw):
    """Stages, and how many steps the first few of them had when they ended: at most their own."""
    planned = draw(lengths)
    shorter = [draw(st.integers(1, n)) for n in planned[: draw(st.integers(0, len(planned)))]]
    return planned, shorter


@given(ended_schedules())
@quick
def test_after_endings_the_table_is_that_of_the_steps_there_were(drawn):
    planned, shorter = drawn
    table = schedule(*planned)
    endings = [int(n) for n in np.cumsum(shorter)]
    after = table.ended(endings)
    owners = np.repeat(np.arange(len(planned)), shorter + planned[len(shorter) :])
    assert [after.at(step).index for step in range(after.n_steps)] == list(owners)
    assert [table.at(step, endings).index for step in range(after.n_steps)] == list(owners)
    assert [s.n_steps for s in table.stages] == planned, "a schedule is a value"
    with pytest.raises(IndexError):
        table.at(len(owners), endings)


@given(ended_schedules())
@quick
def test_endings_decided_one_after_another_give_the_table_that_they_give_at_once(drawn):
    planned, shorter = drawn
    endings = [int(n) for n in np.cumsum(shorter)]
    table = schedule(*planned)
    for i in range(len(endings)):
        table = table.ended(endings[: i + 1])
    assert table == schedule(*planned).ended(endings)
    assert table.ended(endings) is table


def test_a_decay_starts_over_where_the_stage_before_it_ended_early():
    selection = select(tiny.anatomy("llama"), "ffn")
    decaying = spec(4, warmup=1, decay="linear")
    table = Schedule.of([("a", spec(9), selection), ("b", decaying, selection)]).ended([2])
    np.testing.assert_allclose([table.rate_at(i) for i in range(6)], [1, 1, 1 / 2, 1, 2 / 3, 1 / 3])


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0]))
@quick
def test_a_plateau_is_patience_measurements_after_the_last_new_best(values, patience, min_delta):
    losses = [float(v) for v in values]
    bests = [0] if losses else []
    for i, loss in enumerate(losses):
        if i and loss < losses[bests[-1]] - min_delta:
            bests.append(i)
    expected = bool(losses) and len(losses) - 1 - bests[-1] >= patience
    assert plateaued(losses, PlateauSpec(every=1, patience=patience, min_delta=min_delta)) == expected


def test_a_held_out_loss_that_is_no_number_is_no_new_best():
    plateau = PlateauSpec(every=1, patience=2)
    assert plateaued([1.0, math.nan, math.nan], plateau)
    assert not plateaued([1.0, math.nan, 0.5], plateau)
