"""Which steps a rank traces, without a run: the recipe's, those asked for, and what ends early."""

import os
from pathlib import Path

import pytest
import torch

from uno_ds.training import tracing
from uno_ds.training.trace_reading import Trace
from uno_ds.training.trace_settings import TraceSettings
from uno_ds.training.tracing import Tracer


def tracer(
    folder: Path, steps: list[int], total: int, ranks: list[int], lines: list[str]
) -> Tracer:
    settings = TraceSettings(steps=steps, ranks=ranks)
    return Tracer(settings, folder, 0, 2, total, torch.device("cpu"), lines.append)


def traced(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "traces").glob("*"))


@pytest.mark.parametrize(
    ("steps", "start", "total", "ranks", "files"),
    [
        ([3, 4], 0, 9, [0], ["step_3-4_rank0.json.gz"]),
        ([1, 1], 0, 9, [0], ["step_1-1_rank0.json.gz"]),
        # The run was resumed in the middle, ends in the middle, or before.
        ([3, 5], 3, 9, [0], ["step_4-5_rank0.json.gz"]),
        ([3, 9], 0, 4, [0], ["step_3-4_rank0.json.gz"]),
        ([5, 6], 0, 4, [0], []),
        ([1, 2], 2, 4, [0], []),
        ([3, 4], 0, 9, [1], []),
        ([], 0, 9, [0], []),
    ],
)
def test_the_steps_of_the_recipe_that_the_run_has_are_traced(
    tmp_path: Path, steps: list[int], start: int, total: int, ranks: list[int], files: list[str]
):
    lines: list[str] = []
    with tracer(tmp_path, steps, total, ranks, lines) as traces:
        traces.before_step(start + 1)
        for step in range(start + 1, total + 1):
            torch.ones(2).sum()
            traces.after_step(step, 0)
    assert traced(tmp_path) == files and len(lines) == len(files)


def test_what_was_recorded_is_written_when_the_run_ends_in_a_step(tmp_path: Path):
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="stopped"), tracer(tmp_path, [2, 5], 9, [0], lines) as t:
        t.before_step(1)
        t.after_step(1, 0)
        t.after_step(2, 0)
        raise RuntimeError("stopped")
    (name,) = traced(tmp_path)
    trace = Trace(tmp_path / "traces" / name)
    assert [step.name for step in trace.steps] == ["ProfilerStep#2", "ProfilerStep#3"]


def test_a_request_is_read_once_it_has_stopped_changing_and_starts_a_step_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracing, "gather_objects", lambda own: [own])
    lines: list[str] = []
    request = tmp_path / "trace"
    with tracer(tmp_path, [], 9, [0], lines) as traces:
        traces.before_step(1)
        assert traces.requested_steps() == 0
        request.touch()
        assert traces.requested_steps() == 0
        request.write_text("{steps: 2}")
        assert traces.requested_steps() == 0 and request.exists()
        asked = traces.requested_steps()
        assert asked == 2 and not request.exists()
        for step in range(1, 6):
            traces.after_step(step, asked if step == 1 else 0)
    assert traced(tmp_path) == ["step_3-4_rank0.json.gz"]
    assert lines[0] == "a trace was asked for: steps 3 to 4 of rank(s) 0"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps: 0", "steps: must be at least 1, got 0"),
        ("ranks: [2]", "ranks: names rank 2, but the run has ranks 0 to 1"),
        ("[", "expected the node content"),
        ("x" * 2000, "it is longer than 1000 characters"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_one_line_and_kept(
    tmp_path: Path, text: str, reason: str
):
    lines: list[str] = []
    (tmp_path / "trace").write_text(text)
    traces = tracer(tmp_path, [], 9, [0], lines)
    assert [traces.requested_steps() for _ in range(4)] == [0] * 4
    (line,) = lines
    assert line.startswith("WARNING: ") and reason in line and "\n" not in line
    assert (tmp_path / "trace").read_text() == text


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path):
    lines: list[str] = []
    (tmp_path / "traces").write_text("a file where the folder should be")
    with tracer(tmp_path, [1, 1], 2, [0], lines) as traces:
        traces.before_step(1)
        traces.after_step(1, 0)
    assert len(lines) == 1 and lines[0].startswith("WARNING: the trace ")


def test_a_trace_that_the_disk_does_not_take_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    lines: list[str] = []
    with tracer(tmp_path, [1, 1], 2, [0], lines) as traces:
        traces.before_step(1)
        monkeypatch.setattr(os, "replace", full)
        traces.after_step(1, 0)
    assert len(lines) == 1 and "could not be written" in lines[0]
    assert list((tmp_path / "traces").iterdir()) == []
