"""Traces steps of a run with torch's profiler: those of `logging.trace.steps`, and those that a
file `trace` in the run's folder asks for while it trains."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from uno_ds.ranges import STEP, recorded_ranges
from uno_ds.settings import SettingsError, build, printable
from uno_ds.training.collectives import gather_objects
from uno_ds.training.trace_settings import TraceRequest, TraceSettings, check_ranks
from uno_ds.yaml_text import read_yaml

REQUEST = "trace"
LONGEST_REQUEST = 1000


@dataclass(frozen=True)
class Window:
    """Steps, both included, and the ranks that trace them."""

    first: int
    last: int
    ranks: tuple[int, ...]


class Tracer:
    """Called between steps on every rank. While no step is traced, that costs a few comparisons,
    and on rank 0 a look for the file.

    A trace is FOLDER/traces/step_FIRST-LAST_rankR.json.gz, in the format of Chrome and Perfetto. To
    be entered around the steps; what was recorded is written when the block ends, too."""

    def __init__(
        self,
        settings: TraceSettings,
        folder: Path,
        rank: int,
        world_size: int,
        total_steps: int,
        device: torch.device,
        report: Callable[[str], None],
        heartbeat: Callable[[str], None] = lambda phase: None,
    ):
        self.folder, self.rank = folder / "traces", rank
        self._total_steps = total_steps
        self._on_gpu = device.type == "cuda"
        self._report, self._heartbeat = report, heartbeat
        self._planned: Window | None = None
        if settings.steps:
            first, last = settings.steps
            self._planned = self._window(first, last, settings.ranks)
        self._requests = _RequestFile(folder / REQUEST, world_size, report)
        self._asked: Window | None = None
        self._request: TraceRequest | None = None
        self._profiler: profile | None = None
        self._is_recording = False
        self._first = self._last = 0
        self._step: record_function | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()

    def requested_steps(self) -> int:
        """On rank 0 the number of steps that the file asks for, once; else 0. The ranks learn of it
        by `Signals.traced_steps`."""
        if self.rank or self._asked is not None:
            return 0
        self._request = self._requests.take()
        return 0 if self._request is None else self._request.steps

    def before_step(self, step: int) -> None:
        """Before the first step, and by `after_step` before each later one."""
        for window in (self._asked, self._planned):
            if window is None or self.rank not in window.ranks:
                continue
            # The profiler starts a step early, since starting takes time.
            if window.first - 1 <= step <= window.last and self._profiler is None:
                self._prepare()
            if window.first <= step <= window.last and not self._is_recording:
                self._start(step)
        if self._is_recording:
            self._last = step
            self._step = record_function(f"{STEP}{step}")
            self._step.__enter__()

    def after_step(self, step: int, traced_steps: int) -> None:
        """Also what comes before the next step. `traced_steps`: for how many steps a trace was
        asked for, the same on all ranks. Collective if there are such."""
        self._end_step()
        windows = [window for window in (self._asked, self._planned) if window is not None]
        mine = [window for window in windows if self.rank in window.ranks]
        if not any(window.first <= step < window.last for window in mine):
            if self._is_recording:
                self._finish()
        if self._asked is not None and step >= self._asked.last:
            self._asked = None
        if traced_steps:
            self._accept(step, traced_steps)
        if step < self._total_steps:
            self.before_step(step + 1)

    def _accept(self, step: int, traced_steps: int) -> None:
        """The requested steps come after the next one, during which the profiler starts."""
        ranks = gather_objects(self._request.ranks if self._request else [])[0]
        asked = self._window(step + 2, step + 1 + traced_steps, ranks)
        if self.rank == 0:
            shown = ", ".join(map(str, ranks))
            self._report(
                f"a trace was asked for: steps {asked.first} to {asked.last} of rank(s) {shown}"
                if asked is not None
                else "a trace was asked for, but the run ends before it could begin"
            )
        self._asked = asked

    def _window(self, first: int, last: int, ranks: list[int]) -> Window | None:
        """None if the run ends before."""
        last = min(last, self._total_steps)
        return Window(first, last, tuple(ranks)) if first <= last else None

    def _prepare(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.prepare_trace()

    def _start(self, step: int) -> None:
        assert self._profiler is not None, "prepared before"
        self._profiler.start_trace()
        self._is_recording, self._first = True, step
        self._open.enter_context(recorded_ranges())

    def _end_step(self) -> None:
        if self._is_recording and self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _finish(self) -> None:
        """Stops the profiler, if it runs, and writes what it recorded."""
        self._end_step()
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._open.close()
        was_recording, self._is_recording = self._is_recording, False
        self._heartbeat("writing a trace")
        profiler.stop_trace()
        if was_recording:
            self._write(profiler)

    def _write(self, profiler: profile) -> None:
        path = self.folder / f"step_{self._first}-{self._last}_rank{self.rank}.json.gz"
        # With the suffix by which torch compresses it, which `replacing` would not keep.
        part = path.with_name(f"part_{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            self._report(f"WARNING: the trace {path} could not be written: {printable(error)}")
            return
        finally:
            with suppress(OSError):
                part.unlink()
        self._report(
            f"trace of steps {self._first} to {self._last} of rank {self.rank}: {path}. Open it at "
            "ui.perfetto.dev, or run scripts/trace_summary.py on it."
        )


class _RequestFile:
    """The file that asks for a trace. It is read and removed when it has not changed between two
    looks, so that one that is being written is not read."""

    def __init__(self, path: Path, world_size: int, report: Callable[[str], None]):
        self.path, self._world_size, self._report = path, world_size, report
        self._seen: tuple[int, int] | None = None
        self._read_before: tuple[int, int] | None = None

    def take(self) -> TraceRequest | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        seen, self._seen = self._seen, (found.st_size, found.st_mtime_ns)
        if self._seen != seen or self._seen == self._read_before:
            return None
        self._read_before = self._seen
        try:
            return self._read()
        except (OSError, ValueError) as error:
            reason = printable(error, 300).rstrip(".")
            self._report(
                f"WARNING: {self.path} asks for no trace that can be made: {reason}. Leave it "
                "empty, or write e.g. {steps: 5, ranks: [0]} into it."
            )
            return None

    def _read(self) -> TraceRequest:
        """Raises OSError where the file cannot be read or removed, ValueError for its content."""
        with self.path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_REQUEST + 1)
        if len(text) > LONGEST_REQUEST:
            raise SettingsError("", f"it is longer than {LONGEST_REQUEST} characters")
        request: TraceRequest = build(TraceRequest, read_yaml(text) or {})
        check_ranks(request.ranks, self._world_size)
        self.path.unlink()
        return request
