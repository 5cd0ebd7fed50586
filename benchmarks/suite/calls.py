"""Times single calls, and the rate of a large matrix product."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 256 * 1024**2
CUDA_WARMUP, CPU_WARMUP = 3, 1
# The device is kept busy while the host queues a call, about 2 ms at 2 GHz: a small kernel is
# otherwise timed by how fast the host starts it.
HIDDEN_CYCLES = 4_000_000


def milliseconds(function: Callable[[], Any], device: str, repeats: int = 20) -> dict[str, float]:
    """20, 50 and 80 % quantiles of the time of one call, the cache flushed before each."""
    on_gpu = device == "cuda"
    timed = _cuda_milliseconds if on_gpu else _cpu_milliseconds
    warmup = CUDA_WARMUP if on_gpu else CPU_WARMUP
    cache = torch.empty(L2_BYTES if on_gpu else 1, dtype=torch.int8, device=device)
    times = []
    for number in range(warmup + repeats):
        cache.zero_()
        passed = timed(function)
        if number >= warmup:
            times.append(passed)
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"20": cuts[1], "50": cuts[4], "80": cuts[7]}


def _cuda_milliseconds(function: Callable[[], Any]) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HIDDEN_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _cpu_milliseconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def matmul_tflops(device: str) -> float:
    """The measured rate of a large bf16 matrix product on random data, which rates are given as
    shares of."""
    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: a @ b, device)["50"] / 1e9


def interval(times: dict[str, float], digits: int = 3) -> str:
    """The quantiles of `milliseconds` as text."""
    return f"{times['50']:.{digits}f} ms ({times['20']:.{digits}f} to {times['80']:.{digits}f})"
