"""Finds slow ranks and lost data files: at intervals, all ranks exchange how long they were busy
and which files they have lost."""

import statistics
from typing import Any

from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream
from uno_ds.settings import printable
from uno_ds.training.collectives import Collectives, gather_objects
from uno_ds.training.engine import Engine

# A rank is slow if it is busy for more than SLOW times the median rank's time, and if the
# difference is more than SHARE_OF_STEP of a step.
SLOW, SHARE_OF_STEP = 1.2, 0.1


class StragglerMonitor:
    """Every `every` steps, all ranks compare for how many seconds per step each was busy, so that
    others had to wait for it.

    On a CPU that is the time outside of collectives. On a GPU the host cannot measure how long the
    device waits in collectives; there it is the time that the rank waits for its batches."""

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
        self._all_steps = 0
        self._slow_before: int | None = None
        self._reported: int | None = None
        self._start_interval()

    def after_step(self, step: int, seconds: float) -> list[str]:
        """Lines to log; `seconds`: duration of the step. Collective every `every` steps."""
        self._steps += 1
        self._seconds += seconds
        if step % self.every:
            return []
        lines = [
            f"warning: the data file {printable(path, 300)} is lost: {reason}; its rows are "
            "skipped."
            for path, reason in self._new_lost_files().items()
        ]
        busy = gather_objects(self._busy() / self._steps)
        lines += self._warn_of_slowest(busy, self._seconds / self._steps)
        self._add_to_totals(busy)
        return lines

    def summary(self) -> dict[str, Any]:
        """{ranks, lost_files, unreadable_files}: seconds per step that each rank was busy, and the
        reason for each file that was lost or could not be read from the start. Collective."""
        self._new_lost_files()
        self._add_to_totals(gather_objects(self._busy() / max(1, self._steps)))
        means = [total / max(1, self._all_steps) for total in self.totals]
        unreadable_files: dict[str, str] = {}
        for source in self.sources:
            unreadable_files |= source.unreadable_files
        return {
            "ranks": {
                "busy_seconds": [round(seconds, 4) for seconds in means],
                "slowest": means.index(max(means)),
            },
            "lost_files": self.lost_files,
            "unreadable_files": unreadable_files,
        }

    def _start_interval(self) -> None:
        """An interval lasts from one comparison to the next."""
        self._steps, self._seconds = 0, 0.0
        self._waited_at_start = self._waited()

    def _waited(self) -> float:
        """Seconds since the start of the run: for batches on a GPU, in collectives on a CPU."""
        on_gpu = self.engine.device.type == "cuda"
        return self.stream.waited if on_gpu else self.collectives.blocked

    def _busy(self) -> float:
        """Seconds of this interval."""
        waited = self._waited() - self._waited_at_start
        return waited if self.engine.device.type == "cuda" else self._seconds - waited

    def _new_lost_files(self) -> dict[str, str]:
        """{path: reason} of files that any rank has lost since the last call. Collective."""
        own: dict[str, str] = {}
        for source in self.sources:
            own |= source.lost_files
        new: dict[str, str] = {}
        for files in gather_objects(own):
            new |= {path: files[path] for path in files if path not in self.lost_files}
        self.lost_files |= new
        return new

    def _add_to_totals(self, busy: list[float]) -> None:
        """busy: seconds per step of each rank in this interval, which ends."""
        for rank, seconds in enumerate(busy):
            self.totals[rank] += seconds * self._steps
        self._all_steps += self._steps
        self._start_interval()

    def _warn_of_slowest(self, busy: list[float], step_seconds: float) -> list[str]:
        """A line if the same rank is slow in two intervals in a row: a single long step is no
        reason. Each rank is reported once in a row."""
        slowest, median = busy.index(max(busy)), statistics.median_low(busy)
        difference = busy[slowest] - median
        is_slow = busy[slowest] > SLOW * median and difference > SHARE_OF_STEP * step_seconds
        was_slow = self._slow_before == slowest
        self._slow_before = slowest if is_slow else None
        if not is_slow or not was_slow or self._reported == slowest:
            return []
        self._reported = slowest
        return [
            f"warning: rank {slowest} is slow: busy for {busy[slowest]:.3f} s of a step of "
            f"{step_seconds:.3f} s, the median rank for {median:.3f} s."
        ]
