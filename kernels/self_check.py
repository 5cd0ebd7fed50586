"""Every backend of a kernel on this device: is it right, and how fast is it at a model's shapes?

Right is what the tolerance rule says of outputs and gradients on a small packed batch, at the
model's heads, in the run's precision, against fp64."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from uno_ds.kernels.backends import KERNELS
from uno_ds.kernels.comparison import Compared, Outputs, compare
from uno_ds.kernels.selection import Demands, unsuitable_reason

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Of the error of the reference in the same dtype, as in the tests.
TOLERANCE = 2.0
WARMUP, REPEATS = 2, 5
# A candidate that the limit cut off is tried again at later starts, up to so many times in all: the
# first may have been slow to compile, and one that hangs must not cost every start its seconds.
MOST_TRIES = 3
# The device is kept busy while the host queues a call, about 2 ms at 2 GHz: a small kernel is
# otherwise timed by how fast the host starts it.
HIDDEN_CYCLES = 4_000_000


@dataclass(frozen=True)
class Shapes:
    """Of a model and of its fullest pack. `features`: of a regression target, None without a head.
    understanding, generation: live rows of the pack; captions: rows with a label; temperature: of
    the contrastive regression, None for a distance."""

    precision: str
    heads: int
    key_heads: int
    head_dim: int
    encoder_heads: int
    encoder_head_dim: int
    hidden: int
    mlp: int
    vocabulary: int
    features: int | None
    distance: str
    understanding: int
    generation: int
    captions: int
    metaqueries: int
    temperature: float | None = None

    @property
    def demands(self) -> Demands:
        heads, key_heads = self.heads * self.head_dim, self.key_heads * self.head_dim
        widths = (self.hidden, heads, key_heads, self.mlp)
        return Demands(self.precision, self.head_dim, (self.encoder_head_dim,), widths=widths)


@dataclass(frozen=True)
class Finding:
    """What a check found about one backend. `reason`: why it is not chosen, None if it can be.
    error, allowed: of the tensor that is worst. Milliseconds are medians; tflops: of forward and
    backward together, where they are counted; peak_mib: beyond what was there before. cut_off: in
    how many checks the time was over before its own was."""

    backend: str
    reason: str | None = None
    error: float | None = None
    allowed: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflops: float | None = None
    peak_mib: float | None = None
    cut_off: int = 0

    @property
    def ms(self) -> float:
        return (self.forward_ms or 0.0) + (self.backward_ms or 0.0)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


# By kernel.
Findings = dict[str, list[Finding]]


@dataclass(frozen=True)
class Check:
    """Outputs and gradients of small inputs, and their names."""

    names: tuple[str, ...]
    outputs: Outputs


@dataclass(frozen=True)
class Timing:
    """Calls at the shapes of the pack. flops: forward and backward together, None if not
    counted."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    flops: int | None = None


@dataclass(frozen=True)
class Case:
    """How one kernel is checked and, by `timing` of a backend's name, timed."""

    kernel: str
    checks: tuple[Check, ...]
    timing: Callable[[str], Timing]


def examine(
    case: Case,
    backend: str,
    shapes: Shapes,
    device: torch.device,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Finding:
    """Checks and times one backend. Never raises: what goes wrong is the finding's reason. `alone`:
    is entered while times are taken."""
    if reason := unsuitable_reason(case.kernel, backend, shapes.demands):
        return Finding(backend, f"cannot run here: {reason}")
    dtype, reference = DTYPES[shapes.precision], KERNELS[case.kernel].reference
    try:
        compared: list[Compared] = []
        for check in case.checks:
            compared += compare(check.names, check.outputs, backend, dtype, TOLERANCE, reference)
        worst = max(compared, key=lambda found: (not found.is_right, found.error / found.allowed))
        if not worst.is_right:
            return Finding(backend, f"is wrong: {worst}", worst.error, worst.allowed)
        timing = case.timing(backend)
        forward = torch.no_grad()(timing.forward)
        # Not within the lock: a candidate that compiles for long, or hangs, delays no other one.
        for function in (forward, timing.both):
            warm_up(function, device)
        with alone():
            before = _start_peak(device)
            forward_ms = median_ms(forward, device)
            both_ms = median_ms(timing.both, device)
        return Finding(
            backend,
            error=worst.error,
            allowed=worst.allowed,
            forward_ms=forward_ms,
            backward_ms=max(0.0, both_ms - forward_ms),
            tflops=timing.flops / both_ms / 1e9 if timing.flops else None,
            peak_mib=_peak_since(before, device),
        )
    except torch.OutOfMemoryError:
        return Finding(backend, "does not fit: the device has too little memory for it")
    except Exception as error:  # whatever a backend raises is why it is not chosen
        text = " ".join(str(error).split())[:300]
        return Finding(backend, f"raises {type(error).__name__}: {text}")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def fastest(kernel: str, findings: list[Finding]) -> str | None:
    """The right backend with the least time; None if there is none."""
    right = [finding for finding in findings if finding.reason is None]
    return min(right, key=lambda finding: finding.ms).backend if right else None


def nothing_right(findings: list[Finding]) -> bool:
    """Whether every candidate was checked to its end and none can be chosen."""
    return all(finding.reason is not None and not finding.cut_off for finding in findings)


def candidates(kernel: str) -> tuple[str, ...]:
    return KERNELS[kernel].candidates


def unfinished(findings: Findings) -> dict[str, list[str]]:
    """{kernel: candidates that the limit cut off and that are tried again}."""
    again = {
        kernel: [each.backend for each in found if 0 < each.cut_off < MOST_TRIES]
        for kernel, found in findings.items()
    }
    return {kernel: names for kernel, names in again.items() if names}


def with_tried_again(before: Findings, now: Findings) -> Findings:
    """The findings with those of a later check in place of their own."""
    merged: Findings = {}
    for kernel, found in before.items():
        newer = {each.backend: each for each in now.get(kernel, [])}
        merged[kernel] = [
            _counted(each, newer[each.backend]) if each.backend in newer else each for each in found
        ]
    return merged


def _counted(before: Finding, now: Finding) -> Finding:
    if not now.cut_off:
        return now
    tries = before.cut_off + now.cut_off
    return replace(now, cut_off=tries, reason=f"{now.reason} ({tries} of {MOST_TRIES} tries)")


def warm_up(function: Callable[[], Any], device: torch.device) -> None:
    """Untimed calls, to their end."""
    for _ in range(WARMUP):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    timed = _cuda_ms if device.type == "cuda" else _host_ms
    return statistics.median(timed(function) for _ in range(REPEATS))


def _cuda_ms(function: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HIDDEN_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def _host_ms(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def _peak_since(before: int, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
