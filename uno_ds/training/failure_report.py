"""Ends a rank whose memory, device or connection failed with one line that says what failed, where,
and what to do, and with an exit code that says whether to start again."""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from uno_ds.cost.fit import changes_that_save, largest_need
from uno_ds.data.files import one_line
from uno_ds.settings import SettingsError, printable
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.failures import TO_DO, WHAT, Failure, Kind, failure_of
from uno_ds.training.memory_snapshot import memory_of, write_snapshot
from uno_ds.training.run_files import write_exit

# For the report, the snapshot included: a failed device or disk may never answer.
MOST_SECONDS = 120.0


class FailureReport:
    """Around a run. An error of a kind in `failures` is reported in one line on stderr, the last
    one that this process prints, and in --exit-file; its traceback is written to
    FOLDER/failure_rankR.txt; then the process ends. Any other error passes.

    `device`: None until it is known. `progress`: what the rank does."""

    def __init__(self, run: CheckedRun, end: Callable[[int], None] = os._exit):
        self.device: torch.device | None = None
        self.progress: Callable[[], str] = lambda: "before the first step"
        self._run, self._end = run, end

    def __enter__(self) -> "FailureReport":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, SettingsError):
            return
        failure = failure_of(error)
        if failure is None:
            return
        guard = threading.Timer(MOST_SECONDS, self._end, (int(failure.kind),))
        guard.daemon = True
        guard.start()
        self._report(failure, error)
        sys.stdout.flush()
        # Not by the interpreter's own end, at which a process group whose ranks are gone, or a
        # device that is, may hang or abort with another code.
        self._end(int(failure.kind))

    def _report(self, failure: Failure, error: Exception) -> None:
        rank = int(os.environ.get("RANK", "0"))
        where = f"host {socket.gethostname()}: rank {rank}"
        line = f"{where}: {WHAT[failure.kind]} {self.progress()}: {printable(failure.reason, 400)}"
        line = f"{line.rstrip('.')}. {TO_DO[failure.kind]}."
        is_cause = failure.kind is not Kind.CONNECTION_LOST
        # Before what follows, which may take long or fail.
        write_exit(self._run.exit_file, failure.kind, line, replace=is_cause)
        if failure.kind is Kind.OUT_OF_MEMORY:
            line += "".join(f" {sentence}" for sentence in self._of_memory(rank))
        line += f" Exit code {int(failure.kind)}."
        folder = self._run.recipe.folder
        line += _write_traceback(folder / f"failure_rank{rank}.txt", line, error)
        print(f"error: {line}", file=sys.stderr, flush=True)

    def _of_memory(self, rank: int) -> list[str]:
        device = self.device
        if device is None:
            return []
        sentences = []
        try:
            sentences.append(self._advice(device))
        except Exception as error:  # the report is written without the estimate
            sentences.append(f"What to change could not be computed: {one_line(error)}.")
        try:
            path = write_snapshot(device, self._run.recipe.folder, rank)
            sentences.append(f"What memory held: {path}.")
        except Exception as error:  # the device may have failed, or the disk be full
            sentences.append(f"No snapshot of memory could be written: {one_line(error)}.")
        return sentences

    def _advice(self, device: torch.device) -> str:
        recipe = self._run.recipe
        layouts = [source.layout for source in self._run.sources]
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        now = largest_need(recipe, ranks, layouts).peak
        changes = changes_that_save(
            recipe, ranks, layouts, memory_of(device), on_gpu=device.type == "cuda"
        )
        estimated = f"By the estimate a rank needs {now / 1e9:.2f} GB at its peak"
        if not changes:
            return f"{estimated}; neither a smaller token budget nor recomputation would save any."
        shown = " or ".join(
            f"--set {change.assignment} ({change.peak / 1e9:.2f} GB)" for change in changes
        )
        return f"{estimated}; it needs less with {shown}."


def _write_traceback(path: Path, line: str, error: Exception) -> str:
    """The end of the line: where the traceback is."""
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{line}\n\n{text}", encoding="utf-8", errors="backslashreplace")
    except OSError:
        print(text, file=sys.stderr)
        return ""
    return f" Traceback: {path}."
