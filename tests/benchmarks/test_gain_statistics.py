"""The statistics of an experiment against tables and hand-computed values."""

import math

import numpy as np
import pytest

from benchmarks.suite.gain_statistics import (
    compare,
    t_interval,
    t_probability,
    t_quantile,
    table_of,
    verdict,
)
from uno_ds.evaluation.table import Estimate

# Two-sided 95 % points of Student's t, as printed in statistical tables.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}
ASPECTS = ("count", "colours", "shapes", "relation", "all")


def rows(right: list[int], kinds: str = "pair") -> list[dict]:
    """A row of each content, wholly right or wholly wrong."""
    return [
        {
            "content": f"content {place}",
            "kind": kinds,
            "right": {aspect: value for aspect in ASPECTS},
        }
        for place, value in enumerate(right)
    ]


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_of_t_are_those_of_the_table(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=5.1e-4)
    assert t_probability(t_quantile(degrees), degrees) == pytest.approx(0.95, abs=1e-12)


def test_another_level_has_another_quantile():
    assert t_quantile(4, 0.99) == pytest.approx(4.604, abs=5.1e-4)
    assert t_quantile(10_000) == pytest.approx(1.960, abs=1e-3)


def test_an_interval_over_seeds_is_the_textbook_one():
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.3027 / math.sqrt(3)
    assert found.value == 2
    assert found.low == pytest.approx(2 - half, abs=1e-4)
    assert found.high == pytest.approx(2 + half, abs=1e-4)
    assert t_interval([7.0]) == Estimate(7.0)
    assert t_interval([5.0, 5.0]) == Estimate(5.0, 5.0, 5.0)


def test_pictures_of_one_content_are_one_row_and_means_are_by_kind():
    many = [*rows([1, 0, 1]), *rows([0, 0, 1]), *rows([1, 1], "triple")]
    table = table_of([many[:6]])
    assert table.keys == ["content 0", "content 1", "content 2"]
    assert table.means()[0][table.names().index("all")] == pytest.approx(50)
    assert "all, pair" not in table.names()  # the only kind
    mixed = [*rows([1, 0]), *[{**row, "content": f"t {row['content']}"} for row in many[6:]]]
    table = table_of([mixed])
    values = dict(zip(table.names(), table.means()[0]))
    assert (values["all"], values["all, pair"], values["all, triple"]) == (75, 50, 100)


def test_equal_arms_differ_by_exactly_0():
    right = np.random.default_rng(0).integers(0, 2, 60).tolist()
    runs = {seed: rows(right) for seed in range(3)}
    found = compare("twin", "flow", "at equal steps", runs, runs)
    for estimate in (*found.over_prompts.values(), *found.over_seeds.values()):
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert found.by_seed == [0, 0, 0]
    assert found.verdict.startswith("No difference shown between twin and flow at equal steps")


def test_a_planted_difference_is_found_and_its_sign():
    rng = np.random.default_rng(1)
    flow, uno = {}, {}
    for seed in range(4):
        before = rng.random(200) < 0.3
        flow[seed] = rows(before.astype(int).tolist())
        uno[seed] = rows((before | (rng.random(200) < 0.2)).astype(int).tolist())
    found = compare("uno", "flow", "at equal steps", uno, flow)
    assert found.over_prompts["all"].value == pytest.approx(np.mean(found.by_seed))
    assert found.over_seeds["all"].low > 5
    assert found.verdict.startswith("uno is better than flow at equal steps: +")
    opposite = compare("flow", "uno", "at equal steps", flow, uno)
    assert opposite.verdict.startswith("flow is worse than uno at equal steps: -")


def test_arms_that_differ_by_chance_alone_are_seldom_told_apart():
    """Fifty experiments of five seeds without a difference: by the t interval 1 in 20 is expected
    to exclude 0, and the bootstrap has to agree; more than 8 have a probability below 0.2 %."""
    rng = np.random.default_rng(2)
    shown = 0
    for _ in range(50):
        hard = rng.random(80)
        first, second = (
            {seed: rows((rng.random(80) < hard).astype(int).tolist()) for seed in range(5)}
            for _ in range(2)
        )
        found = compare("a", "b", "", first, second)
        shown += not found.verdict.startswith("No difference")
    assert shown <= 8


def test_both_intervals_have_to_exclude_0():
    wide, narrow = Estimate(3.0, -1.0, 7.0), Estimate(3.0, 1.0, 5.0)
    for prompts, seeds in ((wide, narrow), (narrow, wide), (wide, wide)):
        assert verdict("a", "b", "", prompts, seeds, 3).startswith("No difference shown")
    assert "better" in verdict("a", "b", "", narrow, narrow, 3)
    below = Estimate(-3.0, -5.0, -1.0)
    assert "worse" in verdict("a", "b", "", below, below, 3)
    assert verdict("a", "b", "", narrow, below, 3).startswith("No difference shown")


def test_one_run_each_shows_nothing():
    found = compare("a", "b", "at equal steps", {0: rows([1] * 50)}, {0: rows([0] * 50)})
    assert "in one run each" in found.verdict and "better" not in found.verdict
    assert compare("a", "b", "", {0: rows([1])}, {1: rows([1])}) is None


def test_only_seeds_that_both_have_are_compared():
    ours = {0: rows([1, 1]), 1: rows([1, 1]), 7: rows([0, 0])}
    found = compare("a", "b", "", ours, {0: rows([0, 1]), 1: rows([0, 1]), 2: rows([1, 1])})
    assert found.seeds == [0, 1] and found.by_seed == [50, 50]
