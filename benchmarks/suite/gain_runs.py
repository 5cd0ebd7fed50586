"""The runs of an experiment: training by scripts/train.py and measuring, in processes of their own.

Each arm and seed is a run folder that anyone can train on with the same command, and what is
measured of it lies beside it, a file for each point. A call that is killed leaves checkpoints and
whole files; the next call continues from there."""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite.gain_experiment import (
    ALL_CHECKPOINTS,
    BASE,
    REFERENCE_FLOPS,
    Experiment,
)
from benchmarks.suite.results import ROOT
from uno_ds.files_on_disk import replace_text
from uno_ds.recipe_file import read_tree
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import complete_checkpoints, step_of
from uno_ds.training.metrics import read_metrics

TIMED_STEPS, NOT_TIMED = 12, 4
# glibc keeps what is freed instead of giving it back and faulting it in again, which takes time in
# every step on a CPU (docs/gain.md).
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# So that children end, with a checkpoint, when this process is killed.
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildFailed(SettingsError):
    """A training or a measurement ended with an error."""


@dataclass(frozen=True)
class Machine:
    """How processes are started. threads: of each, on a CPU; None: all cores."""

    jobs: int
    threads: int | None


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed. `output`: the folder of the experiment."""

    experiment: Experiment
    arm: str
    seed: int
    output: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @property
    def measured_folder(self) -> Path:
        return self.output / "measured" / self.name

    def measured(self, step: int, split: str) -> Path:
        return self.measured_folder / f"step_{step:06d}-{split}.json"

    def branch(self, step: int) -> Path:
        return self.output / f"{self.name}-to-{step}"

    def checkpoint(self, step: int) -> Path | None:
        """The complete checkpoint of this step, if there is one."""
        for folder in (self.folder, self.branch(step)):
            for path in complete_checkpoints(folder / "checkpoints"):
                if step_of(path) == step:
                    return path
        return None

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        found = complete_checkpoints(self.folder / "checkpoints")
        return sorted(step_of(path) for path in found)

    def flops(self) -> list[float]:
        """FLOP of every step that was trained, by the cost model over the packs it trained on."""
        rows = self._metrics()
        return [row["mfu"] * row["step_seconds"] * REFERENCE_FLOPS for row in rows]

    def is_trained(self) -> bool:
        """To the step at which arms are compared."""
        return len(self.flops()) >= self.experiment.steps_of(self.arm)

    def step_seconds(self) -> float | None:
        """Median of the steps, without the first ones; None before there are enough."""
        seconds = [row["step_seconds"] for row in self._metrics()[NOT_TIMED:]]
        return statistics.median(seconds) if len(seconds) >= 2 else None

    def _metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def train_command(self, steps: int, machine: Machine, hours: float | None = None) -> list[str]:
        """Trains to `steps`, from the newest checkpoint if there is one. A run that is beyond them
        and has no checkpoint there trains them again in a folder of their own, from the newest
        checkpoint before."""
        name, resume = self.name, "auto"
        if self.saved_steps() and self.saved_steps()[-1] > steps:
            branch = self.branch(steps)
            name = branch.name
            before = [step for step in self.saved_steps() if step <= steps]
            if before and not complete_checkpoints(branch / "checkpoints"):
                resume = str(self.folder / "checkpoints" / f"step_{before[-1]}")
        experiment = self.experiment
        decided = [
            f"name={name}",
            f"output={self.output}",
            f"seed={self.seed}",
            f"steps={steps}",
            f"checkpoint.every={experiment.steps // experiment.curve}",
            f"checkpoint.keep_last={ALL_CHECKPOINTS}",
            "checkpoint.export=false",
            "samples.prompts=[]",
            f"hardware.peak_flops={REFERENCE_FLOPS:.1e}",
        ]
        if machine.threads is not None:
            decided.append(f"engine.cpu_threads={machine.threads}")
        given = [text for text in experiment.overrides_of(self.arm) if not _sets_steps(text)]
        words = [str(ROOT / "scripts" / "train.py"), "--recipe", experiment.recipe]
        for assignment in [*given, *decided]:
            words += ["--set", assignment]
        words += ["--resume", resume]
        if hours is not None:
            words += ["--max-hours", f"{hours:.4f}"]
        return words

    def equal_flop_step(self, arm: "ArmRun") -> int:
        """Of the baseline: the first step at which it has cost what `arm` cost at its last step.

        Beyond the steps at which arms are compared a step of the baseline is taken to cost what it
        costs over the arm's on the same samples, and beyond the arm's steps what one costs in the
        mean: alike before and after it is trained."""
        own = self.flops()[: self.experiment.steps]
        theirs = arm.flops()[: arm.experiment.steps_of(arm.arm)]
        shared = min(len(own), len(theirs))
        ratio = sum(own[:shared]) / sum(theirs[:shared])
        expected = [*own, *(ratio * flops for flops in theirs[len(own) :])]
        mean = sum(own) / len(own)
        cost, total, step = sum(theirs), 0.0, 0
        while total < cost * (1 - 1e-12):
            total += expected[step] if step < len(expected) else mean
            step += 1
        return step

    def remember(self) -> None:
        """Keeps what makes this arm. Raises SettingsError as `check` does."""
        self.check()
        self._record.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._record, json.dumps(self._made_of(), indent=1) + "\n")

    def check(self) -> None:
        """Raises SettingsError if the folder was trained with other settings than this arm has now:
        its numbers would be taken for theirs."""
        if not self._record.exists():
            return
        if json.loads(self._record.read_text(encoding="utf-8")) != self._made_of():
            raise SettingsError(
                str(self.folder),
                f"was trained as another arm '{self.arm}' ({self._record} has its settings); give "
                "the experiment another name, or remove the folder and what was measured of it.",
            )

    @property
    def _record(self) -> Path:
        return self.output / "arms" / f"{self.name}.json"

    def _made_of(self) -> dict[str, Any]:
        experiment = self.experiment
        return {
            "recipe": read_tree(experiment.recipe),
            "overrides": experiment.overrides_of(self.arm),
            "every": experiment.steps // experiment.curve,
        }


def measured_base(output: Path) -> Path:
    return output / "measured" / BASE / "step_000000-validation.json"


def _sets_steps(assignment: str) -> bool:
    return assignment.partition("=")[0].strip() == "steps"


def read_measured(path: Path, wanted: str) -> dict[str, Any] | None:
    """What was measured, None if nothing was yet. `wanted`: the identity of the measurement. Raises
    SettingsError for a file of other prompts or settings."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["identity"] != wanted:
        raise SettingsError(
            str(path),
            "was measured with other prompts, sampler settings, held-out scenes or another base; "
            "give the experiment another name, or remove the folder.",
        )
    return content


def run_child(words: Sequence[str], log: Path, machine: Machine) -> float:
    """Runs a Python program with its output appended to `log`; returns its seconds. Raises
    ChildFailed with the last line of the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**_KEEP_MEMORY, **os.environ, "PYTHONUNBUFFERED": "1"}
    if machine.threads is not None:
        environment |= {"OMP_NUM_THREADS": str(machine.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        code = subprocess.call(
            [sys.executable, "-W", "ignore", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            preexec_fn=_end_with_parent,
        )
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        raise ChildFailed(str(log), f"ended with code {code}: {last}")
    return time.monotonic() - started


def _end_with_parent() -> None:
    """In the child, before its program: SIGTERM when the parent dies, at which training saves."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
