"""The suite: its parts, their time limits, and what is left of a part that fails."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.commands import overhead as overhead_command
from benchmarks.commands import suite as suite_command


def test_the_suite_on_a_gpu_stays_within_its_time_and_says_no_without_one(
    capsys: pytest.CaptureFixture,
):
    for quick, minutes in ((False, 9), (True, 3)):
        parts = suite_command.gpu_parts(quick)
        assert sum(part.seconds for part in parts) <= minutes * 60 - 20 and any(
            "gpu" in part.command for part in parts
        )
        overhead = [
            part for part in parts if "overhead" in part.command and "fit" not in part.command
        ]
        assert overhead
        for part in overhead:
            options = overhead_command.parse(part.command[part.command.index("overhead") + 1 :])
            assert options.random_weights
            assert set(options.modes) >= {"flow", "uno"}
            assert options.seconds < part.seconds
    if not torch.cuda.is_available():
        assert command_line.main(["suite", "gpu"]) == 2 and "make bench" in capsys.readouterr().err


@pytest.mark.parametrize("slower", [1, 8])
def test_limits_of_the_suite_follow_the_measured_speed_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, slower: int
):
    """On two cores. What a part needs beyond the time that it measures for grows with the probe,
    and so does its limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    parts = {part.title: part for part in suite_command.cpu_parts(False, 3.0 * slower)}
    measured = {"sweeps": 35, "overhead, whole step": 45, "overhead, forward and backward": 45}
    for title, seconds in measured.items():
        assert float(parts[title].command[parts[title].command.index("--seconds") + 1]) == seconds
        assert parts[title].seconds - seconds == pytest.approx(60 * slower)
    communication = parts["communication"]
    each = float(communication.command[communication.command.index("--seconds") + 1])
    # Four ranks take turns on two cores.
    assert each == 60 * slower and communication.seconds > (1 + 1 + 2) * each


def test_the_suite_measures_the_machine_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(suite_command, "PROBE", "import time; time.sleep(1.5)")
    given = []
    monkeypatch.setattr(suite_command, "run_part", lambda part, _: given.append(part.seconds))
    assert suite_command.main(["cpu", "--quick", "--out", str(tmp_path)]) == 0
    assert min(given) >= 45 + 1.5 * suite_command.PROBES


def test_a_part_that_fails_or_is_stopped_is_reported_and_keeps_its_file(tmp_path: Path):
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sys, time, pathlib"], check=True)
    # Long enough for a start, also on a machine that is busier in a moment.
    limit = 1 + 10 * (time.monotonic() - began)
    script = "import sys, time, pathlib; pathlib.Path(sys.argv[2]).write_text('kept'); {}"
    cut = suite_command.Part(
        "cut", [sys.executable, "-c", script.format("time.sleep(600)")], limit, "cut.json"
    )
    failed = suite_command.Part(
        "failed", [sys.executable, "-c", script.format("sys.exit(3)")], 100, "failed.json"
    )
    assert (
        f"stopped after {limit:.0f} s" in suite_command.run_part(cut, tmp_path)
        and suite_command.run_part(failed, tmp_path) == "ended with code 3"
    )
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "failed.json").read_text() == "kept"


def test_arguments_of_a_benchmark_are_split_as_a_shell_does():
    command = suite_command.benchmark("overhead --modes 'flow,naive flow' --rounds 5")
    assert command[1:] == [
        "-m",
        "benchmarks",
        "overhead",
        "--modes",
        "flow,naive flow",
        *"--rounds 5".split(),
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_every_part_names_a_command_and_flags_that_exist(quick: bool):
    parts = suite_command.cpu_parts(quick, probe=1.0) + suite_command.gpu_parts(quick)
    for part in parts:
        if part.command[2] != "benchmarks":
            continue
        name, *arguments = part.command[3:]
        assert name in command_line.COMMANDS
        if "fit" in arguments:  # needs a GPU
            arguments[arguments.index("fit")] = "1"
        module = importlib.import_module(f"benchmarks.commands.{name}")
        parse = module.parse if name == "overhead" else module._parse
        if name == "kernels" and not torch.cuda.is_available():
            # A CPU has scenarios of its own.
            arguments = [word for word in arguments if word not in ("--scenarios", "A")]
        parse(arguments)
