"""Names for the parts of a training step in a profiler's trace.

Outside of a trace `named_range` returns one and the same object that does nothing; what it costs is
the call."""

import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.profiler import record_function


class Range(enum.Enum):
    DATA = "data"
    ENCODERS = "encoders"
    FORWARD = "forward"
    LOSSES = "losses"
    BACKWARD = "backward"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"
    AVERAGE = "moving average"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"


# Between the name of a range and what of it runs, as in `forward: layer 3`.
SEPARATOR = ": "
# The profiler's own name for a step, which other readers of traces look for.
STEP = "ProfilerStep#"

_NOTHING: AbstractContextManager[Any] = nullcontext()
_is_recording = False


def named_range(kind: Range, *details: object) -> AbstractContextManager[Any]:
    """The block is a range of the trace, named by its kind and, after a colon, the details; they
    are formatted only while a trace is recorded."""
    if not _is_recording:
        return _NOTHING
    detail = " ".join(map(str, details))
    return record_function(f"{kind.value}{SEPARATOR}{detail}" if details else kind.value)


def record_ranges(is_on: bool) -> None:
    """Whether named ranges are recorded from now on, in this process."""
    global _is_recording
    _is_recording = is_on


@contextmanager
def recorded_ranges() -> Iterator[None]:
    """Named ranges are recorded within the block."""
    record_ranges(True)
    try:
        yield
    finally:
        record_ranges(False)
