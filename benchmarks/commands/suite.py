"""All benchmarks within a time limit, and their report: `make bench` (any machine, 3 minutes),
`make bench-gpu` (a CUDA machine, 7.5 minutes for part 1 and 3.5 for part 2).

    python -m benchmarks suite cpu [--quick] [--out FOLDER]
    python -m benchmarks suite gpu [--part 1|2] [--rehearse] [--out FOLDER]

Each part is a command of its own with a time limit. It writes its result after every measurement,
so that a part that fails or is stopped keeps what it had and does not affect the others."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.suite import gpu_parts, gpu_report
from benchmarks.suite.command_line import Parser
from uno_ds.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]
# Half of the recipe's packs: the demo's step is too long for a dozen rounds of six modes in a
# minute.
TINY = "--recipe tiny --threads 1 --set data.scenes.rows=400 --set sequence.token_budget=768"
# What every part does before it measures, and some of what it measures: imports and matrix
# products, on one thread.
PROBE = """
import torch
from uno_ds.training.engine import Engine
torch.set_num_threads(1)
matrix = torch.rand(1024, 1024)
for _ in range(20):
    matrix @ matrix
"""
# A limit is a guard against hangs, in probes beyond the time that a part is given to measure. One
# rank of `scale` has taken 5 probes of processor time, and four 15.
PROBES = 20
RANKS = (1, 2, 4)
# Between the request to end and the end.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """One command. It is stopped after `seconds`; `result` is the file that it writes."""

    title: str
    command: list[str]
    seconds: float
    result: str | None = None


def benchmark(arguments: str) -> list[str]:
    """The command `python -m benchmarks ARGUMENTS`, split as a shell does."""
    return [sys.executable, "-m", "benchmarks", *shlex.split(arguments)]


def seconds_of_a_probe() -> float:
    """How slow this machine is now, in wall-clock time."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def cpu_parts(quick: bool, probe: float) -> list[Part]:
    """About 3 minutes on 2 quiet cores. `probe`: seconds of a probe; limits are proportional to
    it."""
    guard = PROBES * probe
    parts = [
        Part(
            "overhead, forward and backward",
            benchmark(
                f"overhead {TINY} --stages graph --rounds 12 --splits 3 --warmup 1 --seconds 45"
            ),
            45 + guard,
            "overhead-graph.json",
        ),
        Part(
            "overhead, whole step",
            benchmark(
                f"overhead {TINY} --stages step --rounds 8 --splits 2 --warmup 1 --seconds 45"
            ),
            45 + guard,
            "overhead-step.json",
        ),
    ]
    if quick:
        return parts
    # Ranks beyond the number of cores share them.
    shares = [max(1.0, ranks / len(os.sched_getaffinity(0))) for ranks in RANKS]
    ranks = ",".join(map(str, RANKS))
    return [
        *parts,
        Part(
            "sweeps",
            benchmark("sweep --rounds 5 --seconds 35 --threads 1"),
            35 + guard,
            "sweep.json",
        ),
        Part(
            "communication",
            benchmark(f"scale --ranks {ranks} --seconds {guard:.0f}"),
            guard * (1 + sum(shares)),
            "scale.json",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.machine == "gpu" and not options.rehearse and not torch.cuda.is_available():
        message = "there is no CUDA device here; `make bench` runs on any machine."
        raise SettingsError("gpu", message)
    if options.rehearse and options.machine != "gpu":
        raise SettingsError("--rehearse", "goes with gpu; `suite cpu` needs no rehearsal.")
    # Parts are in sessions of their own, which a signal to this one does not reach: `run_part` ends
    # them on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    out = options.out or default_folder(options.rehearse)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    match options.machine:
        case "cpu":
            failed = run_parts(cpu_parts(options.quick, seconds_of_a_probe()), out)
            report = "report.html"
        case "gpu":
            failed = run_gpu_parts(options.part, options.rehearse, out)
            report = "report.md"
        case unknown:
            raise ValueError(f"There is no suite for the machine {unknown!r}.")
    print(f"\n{time.monotonic() - began:.0f} s; results and {report} in {out}")
    if failed:
        print(f"failed or stopped: {', '.join(failed)}")
    return 1 if failed else 0


def run_gpu_parts(part: str, rehearse: bool, out: Path) -> list[str]:
    """Names of those that failed or were stopped. The page is rewritten after every one of them, so
    that a suite that is interrupted has one. What a part leaves of its time, those that follow may
    use."""
    numbers = (1, 2) if part == "all" else (int(part),)
    parts = chain.from_iterable(gpu_parts.parts(number, rehearse, out) for number in numbers)
    expected = [each.title for each in parts]
    # A CPU's limits are guards against hangs, in proportion to its speed now.
    slower = PROBES * seconds_of_a_probe() if rehearse else 0.0
    notes: dict[str, str] = {}
    planned = 0.0
    began = time.monotonic()
    for number in numbers:
        for each in gpu_parts.parts(number, rehearse, out):
            passed = time.monotonic() - began
            planned += each.seconds + slower
            limit = max(each.seconds + slower, planned - passed)
            print(f"\n== {each.title} (limit {limit:.0f} s; {passed:.0f} s so far)", flush=True)
            environment = os.environ | each.environment
            with open(out / each.log, "w", encoding="utf-8") as log:
                shown = Part(each.title, each.command, limit, each.result)
                reason = run_part(shown, out, environment, log)
            lines = (out / each.log).read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-8:]))
            if reason:
                notes[each.title] = reason
                print(f"   {each.title}: {reason}", flush=True)
            gpu_report.write(out, expected, notes, rehearse)
    return list(notes)


def run_parts(parts: list[Part], out: Path) -> list[str]:
    """Titles of the parts that failed or were stopped. The report is rewritten after every part
    with a result, so that a suite that is interrupted has one."""
    began = time.monotonic()
    written: list[str] = []
    failed: list[str] = []
    for part in parts:
        passed = time.monotonic() - began
        print(f"\n== {part.title} (limit {part.seconds:.0f} s; {passed:.0f} s so far)", flush=True)
        reason = run_part(part, out)
        if reason:
            failed.append(part.title)
            print(f"   {part.title}: {reason}", flush=True)
        if part.result and (out / part.result).exists():
            written.append(str(out / part.result))
            report = benchmark("report") + [*written, "--out", str(out)]
            subprocess.run(report, cwd=ROOT, check=False)
    return failed


def run_part(
    part: Part, out: Path, environment: dict[str, str] | None = None, log: TextIO | None = None
) -> str | None:
    """Why the part is not complete, or None. `log`: what it prints goes there."""
    command = part.command
    if part.result:
        target = out / part.result
        target.unlink(missing_ok=True)
        command = [*command, "--json", str(target)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        _signal_all(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return f"was stopped after {part.seconds:.0f} s; what it had written is kept"
    finally:
        # Also what the part has started: a process that hangs in a kernel would hold the GPU and
        # its memory while later parts are measured.
        _signal_all(process, signal.SIGKILL)
        process.wait()
    return f"ended with code {code}" if code else None


def _signal_all(process: subprocess.Popen, number: signal.Signals) -> None:
    """To a process that leads a session, and to all that is left of those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def default_folder(rehearse: bool = False) -> Path:
    """benchmarks/results/DATE-MACHINE; a rehearsal is no result, and goes to build/."""
    if rehearse:
        return ROOT / "build" / "bench-gpu-rehearsal"
    machine = "cpu"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-")
    return ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{machine}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="suite", description="Runs all benchmarks within a time limit and writes a report."
    )
    parser.add_argument(
        "machine",
        choices=("cpu", "gpu"),
        help="cpu: any machine, about 3 minutes; gpu: a CUDA machine, 7.5 and 3.5 minutes",
    )
    parser.add_argument("--quick", action="store_true", help="cpu: without sweeps and ranks")
    parser.add_argument(
        "--part", choices=("1", "2", "all"), default="all", help="gpu: only this one (default all)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="gpu: the same parts on a CPU, interpreted and small; times mean nothing",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results/DATE-MACHINE)"
    )
    return parser.parse_args(arguments)
