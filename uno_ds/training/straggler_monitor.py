"""What the ranks tell each other now and then: how long their own work takes, and which data files
they have lost."""

import statistics
from typing import Any

from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream
from uno_ds.settings import printable
from uno_ds.training.collectives import Collectives, gather_objects
from uno_ds.training.engine import Engine

# A rank is slow if its own work takes so much more of its time than the median rank's, and of a
# step.
SLOW, SHARE_OF_STEP = 1.2, 0.1


class StragglerMonitor:
    """Every `every` steps, all ranks compare the seconds per step that they were busy themselves,
    while the others waited.

    On a CPU that is all the time outside of collectives. On a GPU the host cannot tell it from the
    device's waiting, and it is the time that the rank waits for its batches."""

    def __init__(
        self,
        engine: Engine,
        collectives: Collectives,
        stream: Stream,
        sources: list[Source],
        every: int,
    ):
        self.engine, self.collectives = engine, collectives
        self.stream, self.sources = stream, sources
        self.every = every
        self.totals = [0.0] * engine.world_size
        self.lost_files: dict[str, str] = {}
        self._steps = self._all_steps = 0
        self._seconds = self._idle = 0.0
        self._slow_before: int | None = None
        self._named: int | None = None
        self._mark()

    def after_step(self, step: int, seconds: float) -> list[str]:
        """Lines to log; `seconds`: what the step took. Collective every `every` steps."""
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        if step % self.every:
            return []
        lost, busy = self._lost(), gather_objects(self._busy() / self._steps)
        lines = [
            f"warning: the data file {printable(path, 300)} is lost: {reason}; its rows are "
            "skipped."
            for path, reason in lost.items()
        ]
        lines += self._slowest(busy, self._seconds / self._steps)
        self._count(busy)
        return lines

    def summary(self) -> dict[str, Any]:
        """{ranks, lost_files, unreadable_files}: seconds per step that each rank was busy, and the
        reason for each file that was lost or could not be read from the start. Collective."""
        self._lost()
        self._count(gather_objects(self._busy() / max(1, self._steps)))
        means = [total / max(1, self._all_steps) for total in self.totals]
        return {
            "ranks": {
                "busy_seconds": [round(seconds, 4) for seconds in means],
                "slowest": means.index(max(means)),
            },
            "lost_files": self.lost_files,
            "unreadable_files": {
                path: reason
                for source in self.sources
                for path, reason in source.unreadable_files.items()
            },
        }

    def _busy(self) -> float:
        """Seconds since the last comparison."""
        if self.engine.device.type == "cuda":
            return self.stream.waited - self._idle
        return self._seconds - (self.collectives.blocked - self._idle)

    def _lost(self) -> dict[str, str]:
        """{path: reason} of what any rank has lost since it was asked last."""
        own = {
            path: reason for source in self.sources for path, reason in source.lost_files.items()
        }
        new = {
            path: reason
            for files in gather_objects(own)
            for path, reason in files.items()
            if path not in self.lost_files
        }
        self.lost_files |= new
        return new

    def _count(self, busy: list[float]) -> None:
        self.totals = [
            total + own * self._steps for total, own in zip(self.totals, busy, strict=True)
        ]
        self._all_steps += self._steps
        self._mark()

    def _slowest(self, busy: list[float], step_seconds: float) -> list[str]:
        slowest, usual = busy.index(max(busy)), statistics.median_low(busy)
        slow = busy[slowest] > SLOW * usual and busy[slowest] - usual > SHARE_OF_STEP * step_seconds
        # Named at the second time in a row: one long step of a busy machine is no slow rank.
        self._slow_before, before = slowest if slow else None, self._slow_before
        if not slow or before != slowest or self._named == slowest:
            return []
        self._named = slowest
        return [
            f"warning: rank {slowest} is slow: busy for {busy[slowest]:.3f} s of a step of "
            f"{step_seconds:.3f} s, the median rank for {usual:.3f} s."
        ]

    def _mark(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._idle = (
            self.stream.waited if self.engine.device.type == "cuda" else self.collectives.blocked
        )
