"""Runs the check of kernels in processes of their own, so that a backend that hangs, or leaves the
device unusable, costs its own row only."""

import fcntl
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uno_ds.cost.scenario import Scenario
from uno_ds.cost.scenario_plan import live_plan
from uno_ds.data.files import one_line
from uno_ds.kernels.check_cases import case_of
from uno_ds.kernels.self_check import Finding, Findings, Shapes, candidates, examine

# Of the whole check, once for a machine and model.
LIMIT_SECONDS = 30.0
TIME_IS_OVER = "was stopped: the time of the check was over"


@dataclass(frozen=True)
class Request:
    """What every process of a check is given. deadline: by time.monotonic(); setup: called first in
    the process; clock: the file whose lock a process holds while it times."""

    shapes: Shapes
    pack: Scenario
    device: torch.device
    deadline: float
    setup: Callable[[], None] | None
    clock: str


def check(
    kernels: Sequence[str],
    shapes: Shapes,
    pack: Scenario,
    device: torch.device,
    limit: float = LIMIT_SECONDS,
    setup: Callable[[], None] | None = None,
    report: Callable[[str, Finding], None] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Findings:
    """Findings of every candidate, or of `names` of each kernel, within `limit` seconds. `setup` is
    called first in the process that checks, `report` with each finding as soon as it is there. A
    candidate that ends this process, or that is running when the time is over, gets that as its
    reason."""
    deadline = time.monotonic() + limit
    names = names or {kernel: candidates(kernel) for kernel in kernels}
    groups: dict[str, list[tuple[str, str]]] = {}
    for kernel in kernels:
        for name in names[kernel]:
            groups.setdefault(_group(kernel, name), []).append((kernel, name))
    findings = _Reported(report)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(groups) or 1) as threads:
        clock = str(Path(folder, "clock"))
        request = Request(shapes, pack, device, deadline, setup, clock)
        list(threads.map(lambda pairs: _check_group(pairs, request, findings), groups.values()))
    for kernel in kernels:
        for name in names[kernel]:
            if (kernel, name) not in findings:
                reason = f"was not checked: the {limit:.0f} s of the check were over"
                findings[kernel, name] = Finding(name, reason, cut_off=1)
    return {kernel: [findings[kernel, name] for name in names[kernel]] for kernel in kernels}


class _Reported(dict[tuple[str, str], Finding]):
    """Findings by kernel and backend; each is reported when it is added, one at a time."""

    def __init__(self, report: Callable[[str, Finding], None] | None):
        super().__init__()
        self._report, self._lock = report, threading.Lock()

    def __setitem__(self, pair: tuple[str, str], finding: Finding) -> None:
        with self._lock:
            super().__setitem__(pair, finding)
            if self._report is not None:
                self._report(pair[0], finding)


def _group(kernel: str, name: str) -> str:
    """Candidates of one group are checked one after the other, groups at the same time: they
    compile for seconds, each on one core. Both of triton have their backward kernels in common."""
    if kernel == "attention" and name == "flex":
        return "flex"
    if kernel == "attention" and name in ("triton", "triton_ahead"):
        return "triton"
    return "compiled" if name in ("triton", "liger") else "ready"


def _check_group(
    pairs: list[tuple[str, str]],
    request: Request,
    findings: dict[tuple[str, str], Finding],
) -> None:
    """Adds findings, but none of those that the time did not reach."""
    waiting = pairs
    while waiting and time.monotonic() < request.deadline:
        reason = _check_in_process(waiting, request, findings)
        waiting = [pair for pair in pairs if pair not in findings]
        if reason is not None and waiting:
            kernel, name = waiting.pop(0)
            findings[kernel, name] = Finding(name, reason, cut_off=int(reason == TIME_IS_OVER))


def _check_in_process(
    pairs: list[tuple[str, str]],
    request: Request,
    findings: dict[tuple[str, str], Finding],
) -> str | None:
    """Adds what the process finds; the reason why the first pair without a finding has none, or
    None if all have one."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine_all, args=(sender, pairs, request), daemon=True)
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, request.deadline - time.monotonic())):
            kernel, finding = receiver.recv()
            findings[kernel, finding.backend] = finding
            if all(pair in findings for pair in pairs):
                return None
        return TIME_IS_OVER
    except EOFError:
        process.join(5)
        return f"ended the process of the check (exit code {process.exitcode})"
    finally:
        if process.is_alive():
            process.kill()
        process.join(5)
        receiver.close()


@contextmanager
def _alone(clock: str) -> Iterator[None]:
    """Only one process times at a time. A lock of a file, which a process that dies gives back."""
    with open(clock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _examine_all(sender: Any, pairs: list[tuple[str, str]], request: Request) -> None:
    shapes, device = request.shapes, request.device
    if request.setup is not None:
        request.setup()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Groups share the cores.
        torch.set_num_threads(1)
    plan = live_plan(request.pack)
    for kernel, name in pairs:
        try:
            case = case_of(kernel, shapes, plan, device)
        except Exception as error:
            finding = Finding(name, f"cannot be checked: {one_line(error)}")
        else:
            finding = examine(case, name, shapes, device, partial(_alone, request.clock))
        sender.send((kernel, finding))
    sender.close()
    # Without the interpreter's shutdown, which waits for threads of compilers.
    os._exit(0)
