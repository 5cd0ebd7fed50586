"""When and where understanding losses count, by hand-computed values."""

import math

import pytest

from uno_ds.sequence.schedule import (
    SupervisionSchedule,
    check_weight_by_t,
    largest_weight,
    weight_at,
)
from uno_ds.settings import SettingsError


def test_without_decay_the_weight_is_one_until_the_last_step_and_then_zero():
    schedule = SupervisionSchedule(3)
    assert [schedule.weight(step) for step in range(1, 6)] == [1, 1, 1, 0, 0]


def test_a_cosine_starts_at_one_is_a_half_in_the_middle_and_would_reach_zero_after_the_last_step():
    schedule = SupervisionSchedule(4, cosine=True)
    weights = [schedule.weight(step) for step in range(1, 7)]
    half = math.sqrt(0.5)
    assert weights == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0])
    assert weights[3] > 0 and weights[4:] == [0, 0]


@pytest.mark.parametrize(
    "t, expected", [(0.0, 2.0), (0.2, 2.0), (0.35, 1.5), (0.5, 1.0), (0.6, 0.5), (0.7, 0), (1, 0)]
)
def test_weights_are_linear_between_the_pairs_and_constant_beyond_them(t, expected):
    assert weight_at([[0.2, 2.0], [0.5, 1.0], [0.7, 0.0]], t) == pytest.approx(expected)
    assert weight_at([], t) == 1


def test_the_largest_weight_of_a_window_is_at_a_corner():
    hill = [[0.2, 0.0], [0.5, 3.0], [0.8, 0.0]]
    assert largest_weight(hill, 0.0, 1.0) == 3
    assert largest_weight(hill, 0.0, 0.35) == pytest.approx(1.5)
    assert largest_weight(hill, 0.8, 1.0) == 0
    assert largest_weight([], 0.0, 1.0) == 1


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([[0.1]], "must be a list of [t, weight], got [0.1]."),
        ([[0.5, 1], [0.2, 1]], "has t = 0.2 after t = 0.5; each t must be above"),
        ([[0.5, 1], [0.5, 0]], "has t = 0.5 after t = 0.5; each t must be above"),
        ([[-0.1, 1]], "has t = -0.1; noise levels are 0 (clean) to 1 (noise)."),
        ([[0.1, 1], [1.1, 1]], "has t = 1.1; noise levels are 0 (clean) to 1 (noise)."),
        ([[0.1, -1]], "has the weight -1 at t = 0.1; weights are 0 to 1e+06."),
        ([[0, 0], [1, 0]], "is 0 at every t; set the weight of the loss to 0 instead."),
    ],
)
def test_pairs_that_are_no_function_of_t_are_refused(pairs, words):
    with pytest.raises(SettingsError) as refused:
        check_weight_by_t("key", pairs)
    assert str(refused.value).startswith(f"key: {words}")
