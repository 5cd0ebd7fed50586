"""All benchmarks within a time limit, and their report: `make bench` (any machine, 3 minutes),
`make bench-gpu` (a CUDA machine, 9 minutes; QUICK=1: 3).

    python -m benchmarks suite {cpu,gpu} [--quick] [--out FOLDER]

Each part is a command of its own with a time limit. It writes its result after every measurement,
so that a part that fails or is stopped keeps what it had and does not affect the others."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.suite.command_line import Parser
from uno_ds.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]
# Half of the recipe's packs: the demo's step is too long for a dozen rounds of six modes in a
# minute.
TINY = "--recipe tiny --threads 1 --set data.scenes.rows=400 --set sequence.token_budget=768"
# `auto` chooses none of our own kernels until a GPU has passed their tests; this is the place to.
BAGEL = (
    "--recipe bagel_7b_uno --random-weights --set kernels.attention=triton "
    "--set kernels.regression=triton --set kernels.norm_rope=triton"
)
ALL_MODES = "flow,flow+caption,flow+regression,uno,naive flow,naive uno"
MAIN_MODES = "flow,uno,naive flow"
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
KERNELS = ("conditioning_attention", "metaquery_regression", "qk_norm_rope", "plan")


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


def gpu_parts(quick: bool) -> list[Part]:
    """At most 9 minutes, quick 3, the limits of all parts together."""
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
    if quick:
        return [
            Part("tests on the GPU", tests, 30),
            _kernel_part("conditioning_attention", 30, "--scenarios A"),
            _bagel_part("A", MAIN_MODES, 90),
        ]
    return [
        Part("tests on the GPU", tests, 75),
        *(_kernel_part(kernel, 75 if kernel == KERNELS[0] else 15) for kernel in KERNELS),
        # Each scenario has its own result, the most important one first: a suite that is
        # interrupted lacks the last ones.
        _bagel_part("A", ALL_MODES, 100),
        _bagel_part("F", MAIN_MODES, 60),
        _bagel_part("D", MAIN_MODES, 60),
        Part(
            "whole step under ZeRO-3",
            benchmark(
                f"overhead {BAGEL} --stages step --scenarios D --layers fit --modes flow,uno "
                "--rounds 4 --splits 1 --warmup 0 --seconds 55"
            ),
            75,
            "overhead-zero3.json",
        ),
    ]


def _kernel_part(kernel: str, seconds: float, options: str = "") -> Part:
    command = benchmark(f"kernels --kernel {kernel} {options}")
    return Part(f"kernel {kernel}", command, seconds, f"kernel-{kernel}.json")


def _bagel_part(scenario: str, modes: str, seconds: float) -> Part:
    """Forward and backward at BAGEL-7B's size. A fifth of the time is for starting."""
    command = benchmark(
        f"overhead {BAGEL} --stages graph --scenarios {scenario} --modes '{modes}' "
        f"--rounds 5 --splits 1 --warmup 0 --seconds {0.8 * seconds:.0f}"
    )
    title = f"overhead at BAGEL-7B size, scenario {scenario}"
    return Part(title, command, seconds, f"overhead-{scenario}.json")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.machine == "gpu" and not torch.cuda.is_available():
        message = "there is no CUDA device here; `make bench` runs on any machine."
        raise SettingsError("gpu", message)
    out = options.out or default_folder()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    match options.machine:
        case "cpu":
            parts = cpu_parts(options.quick, seconds_of_a_probe())
        case "gpu":
            parts = gpu_parts(options.quick)
        case unknown:
            raise ValueError(f"There is no suite for the machine {unknown!r}.")
    failed = run_parts(parts, out)
    print(f"\n{time.monotonic() - began:.0f} s; results and report.html in {out}")
    if failed:
        print(f"failed or stopped: {', '.join(failed)}")
    return 1 if failed else 0


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


def run_part(part: Part, out: Path) -> str | None:
    """Why the part is not complete, or None."""
    command = part.command
    if part.result:
        target = out / part.result
        target.unlink(missing_ok=True)
        command = [*command, "--json", str(target)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"was stopped after {part.seconds:.0f} s; what it had written is kept"
    return f"ended with code {code}" if code else None


def default_folder() -> Path:
    """benchmarks/results/DATE-MACHINE"""
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
        help="cpu: any machine, about 3 minutes; gpu: a CUDA machine, at most 9",
    )
    parser.add_argument(
        "--quick", action="store_true", help="gpu: in 3 minutes; cpu: without sweeps and ranks"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results/DATE-MACHINE)"
    )
    return parser.parse_args(arguments)
