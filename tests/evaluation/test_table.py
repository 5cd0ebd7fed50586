"""Means of columns and headlines, their intervals, and paired differences."""

import numpy as np
import pytest

from uno_ds.evaluation.report import gap_lines, sections_of
from uno_ds.evaluation.results import Result
from uno_ds.evaluation.table import Row, Table, differences


def rows(scores: list[float], stratum: str = "", column: str = "x", first: int = 0) -> list[Row]:
    return [
        Row(f"{stratum}{number}", {column: (score, 1.0)}, stratum)
        for number, score in enumerate(scores, start=first)
    ]


def test_a_column_is_a_ratio_of_sums_and_a_headline_the_mean_of_columns():
    table = Table(
        [Row("a", {"x": (3.0, 4.0)}), Row("b", {"x": (1.0, 1.0), "y": (1.0, 2.0)})],
        {"overall": ["x", "y"]},
    )
    assert table.names() == ["overall", "x", "y"]
    # x: 4 of 5, not the mean of 3/4 and 1; y: 1 of 2.
    assert table.means()[0].tolist() == pytest.approx([(0.8 + 0.5) / 2, 0.8, 0.5])


def test_the_mean_of_columns_does_not_weigh_them_by_their_prompts():
    table = Table(rows([1.0] * 9, "a", "a") + rows([0.0], "b", "b"), {"overall": ["a", "b"]})
    assert table.means()[0][0] == 0.5


def test_an_interval_is_that_of_the_mean_of_a_sample():
    """Of 0 and 1, each half of n prompts: the standard error is .5 / sqrt(n)."""
    table = Table(rows([0.0, 1.0] * 200), {"overall": ["x"]})
    found = table.estimates()["overall"]
    width = 1.96 * 0.5 / 400**0.5
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - width, abs=0.15 * width)
    assert found.high == pytest.approx(0.5 + width, abs=0.15 * width)
    assert table.estimates() == table.estimates()
    assert Table(rows([1.0]), {"overall": ["x"]}).estimates()["overall"].low is None


def test_prompts_are_resampled_within_their_stratum():
    """A quarter of the prompts is always right and the others never: the share has no spread, which
    it would have if kinds of prompts were drawn too."""
    table = Table(rows([1.0] * 5, "a") + rows([0.0] * 15, "b"), {"overall": ["x"]})
    found = table.estimates()["overall"]
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_equal_tables_differ_by_zero_with_an_interval_at_zero():
    scores = np.random.default_rng(0).random(50).tolist()
    first, second = (Table(rows(scores), {"overall": ["x"]}) for _ in range(2))
    gap = differences(first, second)["overall"]
    assert (gap.low, gap.value, gap.high) == (0.0, 0.0, 0.0)


def test_a_difference_is_paired_by_prompt_and_over_those_of_both():
    """Every prompt gains exactly 1: the paired interval has no width, however the scores spread."""
    scores = np.random.default_rng(0).normal(0, 10, 40)
    first = Table(rows(scores.tolist()), {"overall": ["x"]})
    better = rows((scores + 1).tolist())
    second = Table([*reversed(better), Row("elsewhere", {"x": (99.0, 1.0)})], {"overall": ["x"]})
    gap = differences(first, second)["overall"]
    assert [gap.low, gap.value, gap.high] == pytest.approx([1.0, 1.0, 1.0])
    lone = first.estimates()["overall"]
    assert lone.low is not None and lone.high is not None and lone.high - lone.low > 3
    assert differences(first, Table(rows([1.0], "other"), {"overall": ["x"]})) == {}


def test_only_results_of_one_scorer_are_paired():
    """Not by its name alone: other prompts or options of a judge, or other weights, are another
    one. Where it lies makes no difference."""
    judge = {"kind": "judge", "name": "m", "endpoint": "here", "fields": {}, "prompts_sha256": "a"}
    clip = {"kind": "local", "name": "clip", "clip": "here", "weights": "a"}

    def paired(first: dict, second: dict) -> bool:
        results = [
            Result("gedit", "en", scorer, rows([1.0, 2.0]), {"overall": ["x"]})
            for scorer in (first, second)
        ]
        (section,) = sections_of(results)
        return bool(gap_lines(section))

    assert paired(judge, judge | {"endpoint": "there", "prompts": "copy.py"})
    assert paired(clip, clip | {"clip": "there"})
    for change in ({"name": "n"}, {"prompts_sha256": "b"}, {"fields": {"seed": 1}}):
        assert not paired(judge, judge | change), change
    assert not paired(clip, clip | {"weights": "b"})
