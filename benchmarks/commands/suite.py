"""The whole suite within a time: `make bench` (any machine, 3 minutes), `make bench-gpu` (a CUDA machine, 9 minutes; QUICK=1: 3).

    python -m benchmarks suite {cpu,gpu} [--quick] [--out FOLDER]

Each part is a command of its own with a time limit; it writes as it goes, so a part that is cut or fails loses nothing of the others.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.suite.results import new_result, write_result

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = [sys.executable, "-m", "benchmarks"]
# Half of the recipe's packs: the demo's step is too long for a dozen rounds of six modes in a minute.
TINY = ["--set", "data.scenes.rows=400", "--set", "sequence.token_budget=768"]
# `auto` names none of our own kernels until a GPU has passed their tests; this is where one does.
BAGEL = [
    "--recipe",
    "bagel_7b_uno",
    "--random-weights",
    *(
        word
        for kernel in ("attention", "regression", "norm_rope")
        for word in ("--set", f"kernels.{kernel}=triton")
    ),
]
# What every part does before it measures, and some of what it measures: imports and matrix products, on one thread.
PROBE = """
import torch
from uno_ds.training.engine import Engine
torch.set_num_threads(1)
matrix = torch.rand(1024, 1024)
for _ in range(20):
    matrix @ matrix
"""
# A limit is a guard against hangs, in probes beyond the time that a part is told to measure for. One rank of scale.py has taken
# 5 of processor time, and four 15.
PROBES = 20
RANKS = (1, 2, 4)
KERNELS = ("conditioning_attention", "metaquery_regression", "qk_norm_rope", "plan")


@dataclass(frozen=True)
class Part:
    """One command. `seconds`: it is ended after that; `result`: the file that it writes; `kernel`: of kernels.py, whose file is
    put into the envelope of a result."""

    title: str
    command: list[str]
    seconds: float
    result: str | None = None
    kernel: str | None = None


def seconds_of_a_probe() -> float:
    """How slow this machine is now, by the wall's clock."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def cpu_parts(quick: bool, probe: float) -> list[Part]:
    """About 3 minutes on 2 quiet cores. `probe`: seconds of a probe; limits are in proportion to it."""
    guard = PROBES * probe
    # Ranks beyond the cores take turns.
    turns = [max(1.0, ranks / len(os.sched_getaffinity(0))) for ranks in RANKS]
    threads = ["--threads", "1"]
    parts = [
        Part(
            "overhead, forward and backward",
            [
                *BENCHMARK,
                "overhead",
                "--recipe",
                "tiny",
                "--stages",
                "graph",
                "--rounds",
                "12",
                "--splits",
                "3",
                "--warmup",
                "1",
                "--seconds",
                "45",
                *threads,
                *TINY,
            ],
            45 + guard,
            "overhead-graph.json",
        ),
        Part(
            "overhead, whole step",
            [
                *BENCHMARK,
                "overhead",
                "--recipe",
                "tiny",
                "--stages",
                "step",
                "--rounds",
                "8",
                "--splits",
                "2",
                "--warmup",
                "1",
                "--seconds",
                "45",
                *threads,
                *TINY,
            ],
            45 + guard,
            "overhead-step.json",
        ),
    ]
    if not quick:
        parts += [
            Part(
                "sweeps",
                [*BENCHMARK, "sweep", "--rounds", "5", "--seconds", "35", *threads],
                35 + guard,
                "sweep.json",
            ),
            Part(
                "communication",
                [
                    *BENCHMARK,
                    "scale",
                    "--ranks",
                    ",".join(map(str, RANKS)),
                    "--seconds",
                    f"{guard:.0f}",
                ],
                guard * (1 + sum(turns)),
                "scale.json",
            ),
        ]
    return parts


def gpu_parts(quick: bool) -> list[Part]:
    """At most 9 minutes, quick 3, the limits of all parts together."""

    scenarios = ["A"] if quick else ["A", "F", "D"]
    parts = [
        Part(
            "tests on the GPU",
            [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"],
            30 if quick else 75,
        )
    ]
    for kernel in KERNELS[:1] if quick else KERNELS:
        options = ["--scenarios", "A"] if quick and kernel == KERNELS[0] else []
        limit = 30 if quick else 75 if kernel == KERNELS[0] else 15
        parts.append(
            Part(
                f"kernel {kernel}",
                [*BENCHMARK, "kernels", "--kernel", kernel, *options],
                limit,
                f"kernel-{kernel}.json",
                kernel,
            )
        )
    seconds = 90 if quick else 225
    # Each scenario writes for itself: what runs last is what a cut run lacks.
    for scenario in scenarios:
        modes = (
            "flow,uno,naive flow"
            if quick or scenario != "A"
            else "flow,flow+caption,flow+regression,uno,naive flow,naive uno"
        )
        share = (
            seconds * (0.45 if scenario == "A" and not quick else 0.275)
            if len(scenarios) > 1
            else seconds
        )
        parts.append(
            Part(
                f"overhead at BAGEL-7B size, scenario {scenario}",
                [
                    *BENCHMARK,
                    "overhead",
                    *BAGEL,
                    "--stages",
                    "graph",
                    "--scenarios",
                    scenario,
                    "--modes",
                    modes,
                    "--rounds",
                    "5",
                    "--splits",
                    "1",
                    "--warmup",
                    "0",
                    "--seconds",
                    f"{0.8 * share:.0f}",
                ],
                share,
                f"overhead-{scenario}.json",
            )
        )
    if not quick:
        parts.append(
            Part(
                "whole step under ZeRO-3",
                [
                    *BENCHMARK,
                    "overhead",
                    *BAGEL,
                    "--stages",
                    "step",
                    "--scenarios",
                    "D",
                    "--layers",
                    "fit",
                    "--modes",
                    "flow,uno",
                    "--rounds",
                    "4",
                    "--splits",
                    "1",
                    "--warmup",
                    "0",
                    "--seconds",
                    "55",
                ],
                75,
                "overhead-zero3.json",
            )
        )
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.machine == "gpu" and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device here; `make bench` runs on any machine.",
            file=sys.stderr,
        )
        return 2
    out = (
        options.out
        or ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{_machine_name()}"
    )
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if options.machine == "cpu":
        parts = cpu_parts(options.quick, seconds_of_a_probe())
    else:
        parts = gpu_parts(options.quick)
    written, failed = [], []
    for part in parts:
        print(
            f"\n== {part.title} (at most {part.seconds:.0f} s; {time.monotonic() - began:.0f} s have passed)",
            flush=True,
        )
        reason = run_part(part, out)
        if reason:
            failed.append(part.title)
            print(f"   {part.title}: {reason}", flush=True)
        if part.result and (out / part.result).exists():
            written.append(str(out / part.result))
        # Early, so that a run that is cut has a report of what it had.
        if part.result and (part is parts[-1] or not part.kernel):
            subprocess.run(
                [*BENCHMARK, "report", *written, "--out", str(out)],
                cwd=ROOT,
                check=False,
            )
    print(
        f"\n{time.monotonic() - began:.0f} s; results and report.html in {out}"
        + (f"; failed or cut: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def run_part(part: Part, out: Path) -> str | None:
    """Why the part is not whole, or None."""
    target = out / part.result if part.result else None
    for stale in [target] if target else []:
        stale.unlink(missing_ok=True)
    raw = out / f"{part.kernel}.raw.json" if part.kernel else target
    command = [*part.command, *(["--json", str(raw)] if raw else [])]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(part.seconds)
        reason = f"ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reason = f"was cut after {part.seconds:.0f} s; what it had written is kept"
    if part.kernel and raw.exists():
        envelop(part.kernel, raw, target)
    return reason


def envelop(kernel: str, raw: Path, target: Path) -> None:
    """The file of benchmarks/kernels.py as a result: its rows are the measurements, the rest lies in `details`."""
    content = json.loads(raw.read_text())
    rows = content.pop("rows", [])
    result = new_result("kernels")
    result |= {
        "measurements": [{"name": kernel, **row} for row in rows],
        "command": content.get("command", result["command"]),
        "details": {name: value for name, value in content.items() if name not in result},
    }
    write_result(target, result, complete=True)
    raw.unlink()


def _machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-")
    return "cpu"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="suite.py", description="Runs the whole suite within a time and makes its report."
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
