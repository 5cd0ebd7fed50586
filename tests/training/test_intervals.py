"""Sets of times, compared with sets of integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uno_ds.training.intervals import (
    Interval,
    Nesting,
    Span,
    difference,
    intersection,
    total,
    union,
)

bounds = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple)
interval_lists = st.lists(bounds, max_size=8)


def units(intervals: list[Interval]) -> set[int]:
    return {unit for start, end in intervals for unit in range(int(start), int(end))}


@given(interval_lists, interval_lists)
def test_operations_on_intervals_are_those_on_the_sets_of_their_units(
    first: list[Interval], second: list[Interval]
):
    one, two = union(first), union(second)
    assert units(one) == units(first) and total(one) == len(units(first))
    assert units(intersection(one, two)) == units(first) & units(second)
    left = difference(one, two)
    assert units(left) == units(first) - units(second) and total(left) == len(units(left))
    assert all(end <= start for (_, end), (start, _) in zip(left, left[1:], strict=False))


def test_a_span_has_the_time_in_which_no_inner_span_runs():
    outer, inner, innermost = Span("a", 0, 10), Span("b", 2, 6), Span("c", 3, 4)
    nesting = Nesting.of([innermost, outer, Span("b", 7, 8), inner, Span("a", 20, 21)])
    assert nesting.own == pytest.approx({"a": 6, "b": 4, "c": 1})
    found = {time: nesting.at(time) for time in (-1, 0, 2, 3.5, 5, 6, 9, 12, 20.5)}
    names = {time: span.name if span else None for time, span in found.items()}
    assert names == {
        -1: None,
        0: "a",
        2: "b",
        3.5: "c",
        5: "b",
        6: "a",
        9: "a",
        12: None,
        20.5: "a",
    }
