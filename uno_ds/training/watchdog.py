"""Ends a rank that makes no progress, with everything known about where it hangs. Runs in a thread
of its own: a rank that waits in a collective waits without end."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from uno_ds.training.collectives import Collectives

# The exit code of a stalled rank: not 0, so that the launcher ends the job; EX_TEMPFAIL, starting
# again may help.
STALLED = 75
# Between the report and the end of the process: a stall reaches all ranks at nearly the same time,
# and the launcher ends the others as soon as one has gone.
SECONDS_FOR_OTHERS = 3.0


class Watchdog:
    """Progress is a `beat` or a collective that DeepSpeed starts; after `stall_seconds` without
    either the process reports and ends with code STALLED. `stall_seconds` 0: never.

    The report goes to stderr and to FOLDER/stall_rankR.txt: phase, DeepSpeed's last collective, and
    the stacks of all Python threads."""

    def __init__(self, stall_seconds: float, folder: Path, rank: int, collectives: Collectives):
        self.stall_seconds, self.rank = stall_seconds, rank
        self.path = folder / f"stall_rank{rank}.txt"
        self._collectives = collectives
        self._beaten, self._where = time.monotonic(), "before the first step"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.stall_seconds:
            self.path.unlink(missing_ok=True)
            self.beat("before the first step")
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

    def beat(self, where: str) -> None:
        """`where`: what begins now, for the report."""
        self._beaten, self._where = time.monotonic(), where

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.stall_seconds / 4)):
            silent = time.monotonic() - max(self._beaten, self._collectives.started)
            if silent > self.stall_seconds:
                # The disk may be what hangs, and then the report would never end.
                threading.Timer(2 * SECONDS_FOR_OTHERS, os._exit, (STALLED,)).start()
                self._report(silent)
                time.sleep(SECONDS_FOR_OTHERS)
                os._exit(STALLED)

    def _report(self, silent: float) -> None:
        head = (
            f"rank {self.rank} made no progress for {silent:.0f} s (health.stall_seconds = "
            f"{self.stall_seconds:g}), {self._where}; "
            f"last collective of DeepSpeed: {self._collectives}. It ends with code {STALLED}; go "
            "on with --resume auto.\n"
        )
        print(head, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        try:
            with self.path.open("w") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError:
            pass  # stderr has it
