"""What a trace of torch's profiler says of the steps in it: time by range, communication that
computing hides and that it does not, times in which nothing runs, and the kernels that take
longest.

On a GPU, computing and communication are those of the device; a kernel belongs to the range in
which the host launched it. On a CPU they are those of the thread that runs the steps."""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from uno_ds.ranges import SEPARATOR, STEP, Range
from uno_ds.settings import SettingsError, printable
from uno_ds.training.intervals import (
    Interval,
    Nesting,
    Span,
    difference,
    intersection,
    total,
    union,
)

MICROSECONDS = 1e-6
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
# Kernels of NCCL, and the records of gloo's threads.
NCCL, GLOO = "nccl", "gloo:"
KINDS = tuple(kind.value for kind in Range)
OUTSIDE = "outside of ranges"

Event = dict[str, Any]


def kind_of(name: str) -> str:
    return name.partition(SEPARATOR)[0]


@dataclass(frozen=True)
class RangeTime:
    """Seconds in all steps. own: on the host without inner ranges. device: of work that the host
    launched within it and not within an inner range."""

    name: str
    calls: int
    host: float
    own: float
    device: float


@dataclass(frozen=True)
class Communication:
    """Seconds. hidden: while the rank computed. exposed: while it did not, waiting for other ranks
    included."""

    total: float
    hidden: float
    exposed: float


@dataclass(frozen=True)
class Gap:
    """Nothing runs for `seconds`, from `start` (since the first step) on; `during`: the range that
    the host was in."""

    start: float
    seconds: float
    during: str


@dataclass(frozen=True)
class Kernel:
    name: str
    calls: int
    seconds: float


class Trace:
    """The events of the traced steps; times in seconds since the first of them. Raises
    SettingsError for a file that is no trace of a run."""

    def __init__(self, path: Path):
        self.path = path
        content = _read(path)
        events = [event for event in content["traceEvents"] if _is_complete(event)]
        steps = [event for event in events if _is_step(event)]
        if not steps:
            raise SettingsError(
                str(path), f"holds no step of a run, an event named {STEP}N; is it its trace?"
            )
        self.thread = steps[0]["pid"], steps[0]["tid"]
        origin = min(event["ts"] for event in steps)
        for event in events:
            event["ts"] = (event["ts"] - origin) * MICROSECONDS
            event["dur"] *= MICROSECONDS
        self.steps = sorted(map(_span, steps), key=lambda span: span.start)
        self.window = union((span.start, span.end) for span in self.steps)
        self.seconds = total(self.window)
        self.rank: int | None = (content.get("distributedInfo") or {}).get("rank")
        self._events = [event for event in events if self._is_within(event)]
        self.device = [event for event in self._events if event.get("cat") in DEVICE_WORK]

    @property
    def on_gpu(self) -> bool:
        return bool(self.device)

    @cached_property
    def ranges(self) -> list[Span]:
        """Of the thread that runs the steps."""
        return self._ranges_by_thread.get(self.thread, [])

    @cached_property
    def nesting(self) -> Nesting:
        return Nesting.of(self.ranges)

    @cached_property
    def _ranges_by_thread(self) -> dict[tuple[Any, Any], list[Span]]:
        annotations = [e for e in self._events if e.get("cat") == "user_annotation"]
        return _by_thread(e for e in annotations if kind_of(e["name"]) in KINDS)

    def time_by_range(self) -> list[RangeTime]:
        """In the order in which the ranges first run; finally what is in none."""
        host: dict[str, list[Interval]] = defaultdict(list)
        for span in sorted(self.ranges, key=lambda span: span.start):
            host[span.name].append((span.start, span.end))
        device = self._device_time()
        rows = [
            RangeTime(
                name,
                len(calls),
                total(union(calls)),
                self.nesting.own.get(name, 0.0),
                device.get(name, 0.0),
            )
            for name, calls in host.items()
        ]
        rest = self.seconds - total(union((span.start, span.end) for span in self.ranges))
        rows.append(RangeTime(OUTSIDE, len(self.steps), rest, rest, device.get(OUTSIDE, 0.0)))
        return rows

    @cached_property
    def communicating(self) -> list[Interval]:
        if self.on_gpu:
            return union(_interval(event) for event in self.device if _is_nccl(event))
        by_gloo = [event for event in self._events if event["name"].startswith(GLOO)]
        return intersection(union([*map(_interval, by_gloo), *self._blocked]), self.window)

    @cached_property
    def computing(self) -> list[Interval]:
        if self.on_gpu:
            return union(_interval(event) for event in self.device if not _is_nccl(event))
        busy = union((span.start, span.end) for span in self._on_thread("cpu_op"))
        return difference(busy, union(self._blocked))

    def communication(self) -> Communication:
        whole = total(self.communicating)
        hidden = total(intersection(self.communicating, self.computing))
        return Communication(whole, hidden, whole - hidden)

    def gaps(self) -> list[Gap]:
        """Times in which neither computing nor communication runs, the longest first."""
        running = union([*self.computing, *self.communicating])
        gaps = []
        for start, end in difference(self.window, running):
            during = self.nesting.at((start + end) / 2)
            gaps.append(Gap(start, end - start, during.name if during else OUTSIDE))
        return sorted(gaps, key=lambda gap: -gap.seconds)

    def kernels(self) -> list[Kernel]:
        """Kernels of the device, else operators of the CPU without those that they call; those that
        take longest first."""
        seconds: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        events = self.device or [event for event in self._events if event.get("cat") == "cpu_op"]
        for event in events:
            calls[event["name"]] += 1
        if self.on_gpu:
            for event in events:
                seconds[event["name"]] += event["dur"]
        else:
            for spans in _by_thread(events).values():
                for name, own in Nesting.of(spans).own.items():
                    seconds[name] += own
        found = [Kernel(name, calls[name], seconds[name]) for name in calls]
        return sorted(found, key=lambda kernel: -kernel.seconds)

    @cached_property
    def _blocked(self) -> list[Interval]:
        """Times in which the host starts a collective or waits for one."""
        waiting = [span for span in self.ranges if kind_of(span.name) == Range.COMMUNICATION.value]
        return [(span.start, span.end) for span in waiting]

    def _device_time(self) -> dict[str, float]:
        """{range: seconds of the device}. Backward launches from a thread of its own, which has few
        ranges, while the main thread waits within its range."""
        launched: dict[int, Event] = {}
        for event in self._events:
            if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {}):
                launched[event["args"]["correlation"]] = event
        nestings = {thread: Nesting.of(spans) for thread, spans in self._ranges_by_thread.items()}
        seconds: dict[str, float] = defaultdict(float)
        for event in self.device:
            launch = launched.get(event.get("args", {}).get("correlation"))
            during = None
            if launch is not None:
                own = nestings.get((launch["pid"], launch["tid"]))
                during = own.at(launch["ts"]) if own else None
                during = during or self.nesting.at(launch["ts"])
            seconds[during.name if during else OUTSIDE] += event["dur"]
        return seconds

    def _on_thread(self, category: str) -> list[Span]:
        return [
            _span(event)
            for event in self._events
            if event.get("cat") == category and (event["pid"], event["tid"]) == self.thread
        ]

    def _is_within(self, event: Event) -> bool:
        start, end = _interval(event)
        return start < self.window[-1][1] and end > self.window[0][0]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        content = json.loads(data)
    except OSError as error:
        raise SettingsError(str(path), f"cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise SettingsError(
            str(path), f"is not a trace of torch's profiler: {printable(error, 200)}."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise SettingsError(str(path), "is not a trace of torch's profiler: no list traceEvents.")
    return content


def _is_complete(event: Any) -> bool:
    """Whether this is an event with a duration."""
    if not isinstance(event, dict) or event.get("ph") != "X":
        return False
    numbers = isinstance(event.get("ts"), (int, float)) and isinstance(
        event.get("dur"), (int, float)
    )
    return numbers and isinstance(event.get("name"), str) and {"pid", "tid"} <= event.keys()


def _is_step(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(STEP)


def _is_nccl(event: Event) -> bool:
    return event["name"].startswith(NCCL)


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _span(event: Event) -> Span:
    return Span(event["name"], *_interval(event))


def _by_thread(events: Iterable[Event]) -> dict[tuple[Any, Any], list[Span]]:
    threads: dict[tuple[Any, Any], list[Span]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(_span(event))
    return threads
