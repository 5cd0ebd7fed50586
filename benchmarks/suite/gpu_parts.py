"""The parts of `make bench-gpu`, made for ten rented minutes.

Part 1, at most 7.5 minutes, answers what matters most; part 2, at most 3.5, the rest. Each row is
on the disk as soon as it is measured, and backends have processes of their own, so that a wrong
kernel costs its own rows only. A rehearsal runs the same parts on a CPU: kernels are interpreted,
shapes are small, and times mean nothing."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uno_ds.kernels.backends import KERNELS

# Tests marked `gpu` are in these.
TESTS = ("tests/kernels", "tests/training/test_host_waits.py")
SECONDS = {1: 450, 2: 210}
SMOKE = "smoke.json"
BAGEL = "--recipe bagel_7b_uno --random-weights --encoded-latents --no-count"
# The same code on a CPU: the tiny shape, one layer, and a pack of a few samples.
TINY = "--recipe tiny --random-weights --layers 1 --no-count --threads 1"
SMALL = {
    "A": "prompt=8,latents=49,caption=8,metaqueries=9,samples=2",
    "D": "prompt=8,latents=16,caption=8,metaqueries=9,samples=4",
    "F": "prompt=8,latents=49,caption=8,metaqueries=9,samples=1,vit=9",
}
# Backends of one process and its seconds; sdpa is in the smoke test. Our own kernels first: nothing
# is known of them yet.
ATTENTION = {("triton", "triton_ahead"): 40, ("flash",): 25, ("flex",): 55}


@dataclass(frozen=True)
class GpuPart:
    """One command. It is stopped after `seconds`; `result` is the file that it writes, `log` the
    one that takes what it prints. environment: variables in addition to those of the suite."""

    title: str
    command: list[str]
    seconds: float
    result: str | None
    log: str
    environment: dict[str, str] = field(default_factory=dict)


def parts(part: int, rehearse: bool, out: Path) -> Iterator[GpuPart]:
    """In order. Later ones run with the backends that the smoke test found right and fastest."""
    make = _Maker(rehearse, out)
    yield from _part_1(make) if part == 1 else _part_2(make)


def _part_1(make: "_Maker") -> Iterator[GpuPart]:
    # On a GPU a fifth of the time is for starting, as of `overhead`.
    seconds = 120 if make.rehearse else 36
    flag = "--rehearse" if make.rehearse else ""
    yield make.benchmark("smoke", f"smoke {flag} --seconds {seconds}", 45, interpreted=True)
    yield make.tests(85)
    for backends, limit in ATTENTION.items():
        yield make.attention("A", backends, limit)
    yield make.overhead("A", "flow,uno", "graph", 85)
    yield make.overhead("D", "flow,uno", "step", 60)
    # At most 30 s of it are the check of `auto`.
    yield make.training(55)


def _part_2(make: "_Maker") -> Iterator[GpuPart]:
    yield make.overhead("A", "flow,naive flow", "graph", 50, name="naive-A")
    yield make.overhead("F", "flow,uno", "graph", 43)
    yield make.overhead("D", "flow,uno", "graph", 42)
    yield make.experts(15)
    yield make.launch_table(60)


def chosen_backends(smoke: Path) -> dict[str, str]:
    """{kernel: the fastest right backend}, of what a smoke test wrote, for the kernels whose `auto`
    is chosen so; empty without one."""
    try:
        rows = json.loads(smoke.read_text(encoding="utf-8"))["measurements"]
    except (OSError, ValueError, KeyError):
        return {}
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["reason"] is None and KERNELS[row["name"]].chosen_by_check:
            entry = row["forward_ms"] + row["backward_ms"], row["backend"]
            best[row["name"]] = min(best.get(row["name"], entry), entry)
    return {kernel: name for kernel, (_, name) in best.items()}


class _Maker:
    """Commands of the parts, for a GPU or for a rehearsal."""

    def __init__(self, rehearse: bool, out: Path):
        self.rehearse, self.out = rehearse, out

    def benchmark(
        self, name: str, arguments: str, seconds: float, interpreted: bool = False
    ) -> GpuPart:
        environment = {"TRITON_INTERPRET": "1"} if interpreted and self.rehearse else {}
        command = [sys.executable, "-m", "benchmarks", *shlex.split(arguments)]
        return GpuPart(name, command, seconds, f"{name}.json", f"{name}.log", environment)

    def tests(self, seconds: float) -> GpuPart:
        workers = 2 if self.rehearse else max(1, len(os.sched_getaffinity(0)) - 2)
        # Without the cache of pytest; all tests, even where one fails or a file lacks a package.
        options = f"-m gpu -n {workers} -v --maxfail 1000 -p no:cacheprovider"
        options += " --continue-on-collection-errors"
        command = [sys.executable, "-m", "pytest", *shlex.split(options), *TESTS]
        return GpuPart("gpu-tests", command, seconds, None, "gpu-tests.log")

    def attention(self, scenario: str, backends: Sequence[str], seconds: float) -> GpuPart:
        repeats = 1 if self.rehearse else 10
        arguments = (
            f"kernels --kernel conditioning_attention --scenarios {scenario} "
            f"--backends {','.join(backends)} --repeats {repeats}"
        )
        name = f"attention-{scenario}-{backends[0]}"
        return self.benchmark(name, arguments, seconds, interpreted=True)

    def overhead(
        self, scenario: str, modes: str, stage: str, seconds: float, name: str | None = None
    ) -> GpuPart:
        """A fifth of the time is for starting."""
        where = f"{TINY} --scenarios {SMALL[scenario]}" if self.rehearse else self._bagel(scenario)
        rounds = 1 if self.rehearse else 6
        arguments = (
            f"overhead {where} --stages {stage} --modes '{modes}' --rounds {rounds} --splits 1 "
            f"--warmup 0 --seconds {0.8 * seconds:.0f}"
        )
        return self.benchmark(name or f"overhead-{stage}-{scenario}", arguments, seconds)

    def _bagel(self, scenario: str) -> str:
        chosen = chosen_backends(self.out / SMOKE)
        kernels = " ".join(f"--set kernels.{kernel}={name}" for kernel, name in chosen.items())
        return f"{BAGEL} --layers fit --scenarios {scenario} {kernels}"

    def training(self, seconds: float) -> GpuPart:
        """The recipe of the demo, from data to summary, with every kernel on `auto`."""
        out = self.out.resolve()
        steps = 2 if self.rehearse else 30
        settings = (
            f"steps={steps}",
            f"output={out}/runs",
            f"data.folder={out}/data",
            "data.scenes.rows=100",
            f"kernels.cache={out}/cache",
            "engine.packs_per_step=1",
            "checkpoint.export=false",
            "checkpoint.every=0",
            "health.kernel_check_every=10" if not self.rehearse else "health.kernel_check_every=0",
        )
        command = [sys.executable, "scripts/train.py", "--recipe", "tiny", "--overwrite"]
        for setting in settings:
            command += ["--set", setting]
        return GpuPart("training", command, seconds, None, "training.log")

    def experts(self, seconds: float) -> GpuPart:
        arguments = f"kernels --kernel experts --repeats {1 if self.rehearse else 10}"
        return self.benchmark("experts", arguments, seconds)

    def launch_table(self, seconds: float) -> GpuPart:
        options = "--rehearse" if self.rehearse else "--precision half --dims 128"
        arguments = f"launch_table --time {options} --out {shlex.quote(str(self.out))}/launch.json"
        return self.benchmark("launch-table", arguments, seconds, interpreted=True)
