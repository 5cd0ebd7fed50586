"""A made-up trace of a GPU, whose times are known, and files that are no traces."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from uno_ds.commands import trace_summary
from uno_ds.settings import SettingsError
from uno_ds.training.trace_reading import OUTSIDE, Trace

MAIN, BACKWARD, STREAM, NCCL_STREAM = 1, 2, 7, 8


def event(
    name: str, category: str, start: float, duration: float, thread: int = MAIN, **more: Any
) -> dict[str, Any]:
    """Times in milliseconds."""
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": 5e9 + start * 1e3,
        "dur": duration * 1e3,
        "pid": 0 if category in ("kernel", "gpu_memcpy") else 100,
        "tid": thread,
        **more,
    }


def launched(
    name: str, launch: float, start: float, duration: float, number: int, **places: int
) -> list[dict[str, Any]]:
    """A launch on the host and the kernel, by their correlation."""
    thread, stream = places.get("thread", MAIN), places.get("stream", STREAM)
    arguments = {"correlation": number}
    return [
        event("cudaLaunchKernel", "cuda_runtime", launch, 0.01, thread, args=arguments),
        event(name, "kernel", start, duration, stream, args=arguments),
    ]


def gpu_trace(path: Path) -> Path:
    """One step of 100 ms. The device computes in [10, 30], [40, 50] and [60, 90], and sends in
    [25, 45]: 5 + 5 of 20 ms are hidden, 10 exposed; nothing runs in [0, 10], [50, 60], [90,
    100]."""
    events = [
        event("ProfilerStep#5", "user_annotation", 0, 100),
        event("forward: layer 1", "user_annotation", 5, 20),
        event("communication: all_gather", "user_annotation", 22, 1),
        event("backward", "user_annotation", 30, 60),
        event("some other annotation", "user_annotation", 30, 60),
        *launched("matmul", 6, 10, 20, 1),
        *launched("ncclDevKernel_AllGather", 22.5, 25, 20, 2, stream=NCCL_STREAM),
        # From autograd's thread, which has no ranges.
        *launched("softmax", 35, 40, 10, 3, thread=BACKWARD),
        *launched("matmul", 40, 60, 30, 4, thread=BACKWARD),
        # Of the step before.
        *launched("matmul", -8, -5, 3, 5),
    ]
    content = {"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}
    path.write_bytes(
        gzip.compress(json.dumps({**content, "distributedInfo": {"rank": 3}}).encode())
    )
    return path


def test_a_gpu_trace_says_what_computing_hides_and_when_nothing_runs(tmp_path: Path):
    trace = Trace(gpu_trace(tmp_path / "a.json.gz"))
    assert trace.on_gpu and trace.rank == 3 and trace.seconds == pytest.approx(0.1)
    sent = trace.communication()
    assert (sent.total, sent.hidden, sent.exposed) == pytest.approx((0.02, 0.01, 0.01))
    gaps = [(round(gap.start, 4), round(gap.seconds, 4), gap.during) for gap in trace.gaps()]
    assert sorted(gaps) == [
        (0.0, 0.01, "forward: layer 1"),
        (0.05, 0.01, "backward"),
        (0.09, 0.01, OUTSIDE),
    ]
    kernels = [(kernel.name, kernel.calls, round(kernel.seconds, 4)) for kernel in trace.kernels()]
    assert kernels == [
        ("matmul", 2, 0.05),
        ("ncclDevKernel_AllGather", 1, 0.02),
        ("softmax", 1, 0.01),
    ]


def test_a_kernel_belongs_to_the_range_in_which_the_host_launched_it(tmp_path: Path):
    rows = {row.name: row for row in Trace(gpu_trace(tmp_path / "a.json.gz")).time_by_range()}
    device = {name: round(row.device, 4) for name, row in rows.items()}
    assert device == {
        "forward: layer 1": 0.02,
        "communication: all_gather": 0.02,
        "backward": 0.04,
        OUTSIDE: 0.0,
    }
    own = {name: round(row.own, 4) for name, row in rows.items()}
    assert own == {
        "forward: layer 1": 0.019,
        "communication: all_gather": 0.001,
        "backward": 0.06,
        OUTSIDE: 0.02,
    }


def test_the_summary_of_a_gpu_trace_has_the_time_of_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = gpu_trace(tmp_path / "a.json.gz")
    assert trace_summary.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "device s" in printed and (tmp_path / "a.png").exists()
    assert (
        "0.0200 s (20.0% of the steps), 0.0100 s hidden by computing, 0.0100 s exposed" in printed
    )
    assert "kernels that take longest" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"no json", "is not a trace of torch's profiler"),
        (b"\x1f\x8b broken", "is not a trace of torch's profiler"),
        (b"[]", "no list traceEvents."),
        (b'{"traceEvents": [1, {"ph": "X"}]}', "holds no step of a run"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture
):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        Trace(path)
    assert trace_summary.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
