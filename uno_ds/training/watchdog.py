"""Ends a rank that makes no progress and reports where it hangs. Runs in its own thread, because a
rank that hangs in a collective never returns from it."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from uno_ds.training.collectives import Collectives
from uno_ds.training.run_files import write_exit

# The exit code of a stalled rank: EX_TEMPFAIL, since starting again may help.
STALLED = 75
# Between the report and the exit: all ranks stall at nearly the same time, and the launcher kills
# the others as soon as one exits.
SECONDS_FOR_OTHERS = 3.0


class Watchdog:
    """A `heartbeat` or the start of a collective of DeepSpeed counts as progress; after
    `stall_seconds` without either the process writes a report and exits with code STALLED.
    `stall_seconds` 0: never.

    The report goes to stderr and to FOLDER/stall_rankR.txt: phase, DeepSpeed's last collective, and
    the stacks of all Python threads. exit_file: receives code and reason, if given: a launcher may
    make another code of it, above all when the machine of another rank is gone."""

    def __init__(
        self,
        stall_seconds: float,
        folder: Path,
        rank: int,
        collectives: Collectives,
        exit_file: Path | None = None,
    ):
        self.stall_seconds, self.rank, self.exit_file = stall_seconds, rank, exit_file
        self.path = folder / f"stall_rank{rank}.txt"
        self._collectives = collectives
        self.heartbeat("before the first step")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.stall_seconds:
            self.path.unlink(missing_ok=True)
            self.heartbeat("before the first step")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.stall_seconds:
            self._thread.join()

    def heartbeat(self, phase: str) -> None:
        """`phase`: what begins now, for the report."""
        self._last_heartbeat, self._phase = time.monotonic(), phase

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.stall_seconds / 4)):
            last_progress = max(self._last_heartbeat, self._collectives.started)
            seconds = time.monotonic() - last_progress
            if seconds > self.stall_seconds:
                # In case that the disk hangs, and with it the report.
                threading.Timer(2 * SECONDS_FOR_OTHERS, os._exit, (STALLED,)).start()
                self._report(seconds)
                time.sleep(SECONDS_FOR_OTHERS)
                os._exit(STALLED)

    def _report(self, seconds: float) -> None:
        """seconds: without progress."""
        reason = (
            f"rank {self.rank} made no progress for {seconds:.0f} s (health.stall_seconds = "
            f"{self.stall_seconds:g}), {self._phase}; last collective of DeepSpeed: "
            f"{self._collectives}"
        )
        head = f"{reason}. It exits with code {STALLED}; continue with --resume auto.\n"
        print(head, file=sys.stderr, flush=True)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        try:
            with self.path.open("w") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass  # it is in stderr
        write_exit(self.exit_file, STALLED, f"stalled: {reason}")
