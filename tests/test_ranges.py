"""Named ranges are recorded within a trace, and outside of one do nothing at all."""

import torch
from torch.profiler import ProfilerActivity, profile

from uno_ds.ranges import Range, named_range, recorded_ranges


class Unprintable:
    def __str__(self) -> str:
        raise AssertionError("details are formatted only while a trace is recorded")


def names(recorded: profile) -> list[str]:
    return [event.name for event in recorded.events()]


def test_outside_of_a_trace_every_range_is_one_object_and_no_detail_is_formatted():
    ranges = {id(named_range(kind, Unprintable())) for kind in Range}
    assert len(ranges) == 1
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with named_range(Range.LOSSES):
            torch.ones(1).add(1)
    assert "aten::add" in names(recorded) and "losses" not in names(recorded)


def test_within_a_trace_a_range_has_its_kind_and_details_as_name():
    with profile(activities=[ProfilerActivity.CPU]) as recorded, recorded_ranges():
        with named_range(Range.FORWARD, "layer", 3), named_range(Range.COMMUNICATION, "wait"):
            torch.ones(1).add(1)
        with named_range(Range.LOSSES):
            pass
    assert {"forward: layer 3", "communication: wait", "losses"} <= set(names(recorded))
    assert named_range(Range.LOSSES) is named_range(Range.DATA)
