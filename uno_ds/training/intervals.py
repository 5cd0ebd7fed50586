"""Sets of times, as sorted lists of disjoint intervals, and spans that are nested in each other."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# (start, end) in any unit of time.
Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        elif end > start:
            merged.append((start, end))
    return merged


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Of two unions."""
    common: list[Interval] = []
    place = 0
    for start, end in first:
        while place < len(second) and second[place][1] <= start:
            place += 1
        current = place
        while current < len(second) and second[current][0] < end:
            common.append((max(start, second[current][0]), min(end, second[current][1])))
            current += 1
    return common


def difference(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What is in the first of two unions and not in the second."""
    left: list[Interval] = []
    for start, end in first:
        begin = start
        for cut_start, cut_end in intersection([(start, end)], second):
            if cut_start > begin:
                left.append((begin, cut_start))
            begin = cut_end
        if end > begin:
            left.append((begin, end))
    return left


def total(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True)
class Span:
    name: str
    start: float
    end: float


@dataclass
class Nesting:
    """Spans of one thread, each within another or apart from it. `own`: time of each name in which
    no inner span runs."""

    own: dict[str, float] = field(default_factory=dict)
    _times: list[float] = field(default_factory=list)
    _innermost: list[Span | None] = field(default_factory=list)

    @classmethod
    def of(cls, spans: Iterable[Span]) -> "Nesting":
        nesting = cls()
        open_spans: list[Span] = []
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1].end <= span.start:
                nesting._close(open_spans)
            open_spans.append(span)
            nesting._change(span.start, span)
        while open_spans:
            nesting._close(open_spans)
        nesting._sum_up()
        return nesting

    def at(self, time: float) -> Span | None:
        """The innermost span that runs at this time."""
        place = bisect.bisect_right(self._times, time) - 1
        return self._innermost[place] if place >= 0 else None

    def _close(self, open_spans: list[Span]) -> None:
        closed = open_spans.pop()
        self._change(closed.end, open_spans[-1] if open_spans else None)

    def _change(self, time: float, span: Span | None) -> None:
        # Rounding may let an inner span end after its outer one.
        self._times.append(max(time, self._times[-1]) if self._times else time)
        self._innermost.append(span)

    def _sum_up(self) -> None:
        for place, span in enumerate(self._innermost[:-1]):
            if span is not None:
                seconds = self._times[place + 1] - self._times[place]
                self.own[span.name] = self.own.get(span.name, 0.0) + seconds
