"""`make bench-gpu`: its parts and their limits, the order of what is known first, the page that is
written from whatever there is."""

import fcntl
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.commands import kernels as kernels_command
from benchmarks.commands import overhead as overhead_command
from benchmarks.commands import smoke
from benchmarks.commands import suite as suite_command
from benchmarks.suite import attention, calls, gpu_parts, gpu_report, results
from benchmarks.suite.launch_times import kernel_time
from benchmarks.suite.scenarios import SCENARIOS, SMALL_SCENARIOS
from uno_ds.cost.scenario_plan import live_plan
from uno_ds.kernels.backends import backend_names
from uno_ds.kernels.conditioning_attention.launch import KERNELS, parameters

EVERY = [(part, rehearse) for part in (1, 2) for rehearse in (False, True)]


def finding(kernel: str, backend: str, ms: float, reason: str | None = None) -> dict:
    return {
        "name": kernel,
        "backend": backend,
        "reason": reason,
        "error": None,
        "allowed": None,
        "forward_ms": ms,
        "backward_ms": ms,
        "tflops": None,
        "peak_mib": None,
    }


def result_file(path: Path, kind: str, rows: list[dict], complete: bool = True) -> None:
    result = results.new_result(kind)
    result["measurements"] = rows
    results.write_result(path, result, complete=complete)


@pytest.mark.parametrize("part", [1, 2])
def test_the_limits_of_a_part_are_within_its_time(part: int, tmp_path: Path):
    limits = [each.seconds for each in gpu_parts.parts(part, False, tmp_path)]
    assert sum(limits) <= gpu_parts.SECONDS[part] == (450 if part == 1 else 210)


@pytest.mark.parametrize(("part", "rehearse"), EVERY)
def test_every_part_names_a_command_and_flags_that_exist(
    part: int, rehearse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for each in gpu_parts.parts(part, rehearse, tmp_path):
        if each.command[1:3] != ["-m", "benchmarks"]:
            continue
        name, *arguments = each.command[3:]
        assert name in command_line.COMMANDS and each.result == f"{each.title}.json"
        if "fit" in arguments:  # needs a GPU
            arguments[arguments.index("fit")] = "1"
        module = importlib.import_module(f"benchmarks.commands.{name}")
        options = (module.parse if name == "overhead" else module._parse)(arguments)
        assert name != "overhead" or options.random_weights and options.seconds < each.seconds


def test_a_rehearsal_has_the_same_parts_and_files(tmp_path: Path):
    for part in (1, 2):
        real, rehearsed = (
            [(each.title, each.result, each.log) for each in gpu_parts.parts(part, mode, tmp_path)]
            for mode in (False, True)
        )
        assert real == rehearsed


def test_each_attention_backend_has_a_process_of_its_own_and_sdpa_is_in_the_smoke_test():
    timed = itertools.chain.from_iterable(gpu_parts.ATTENTION)
    assert {*timed, "sdpa", "reference"} == set(backend_names("attention"))


def test_later_parts_run_with_what_the_smoke_test_found_right_and_fastest(tmp_path: Path):
    def kernels_of(each: gpu_parts.GpuPart) -> list[str]:
        return [word for word in each.command if word.startswith("kernels.")]

    parts = gpu_parts.parts(1, False, tmp_path)
    assert next(parts).title == "smoke"
    rows = [
        finding("attention", "triton", 1.0, "is wrong: the output is off by nan"),
        finding("attention", "flash", 3.0),
        finding("attention", "sdpa", 4.0),
        finding("regression", "triton", 0.1),
        # `auto` of the experts is not chosen by a check.
        finding("experts", "grouped", 0.1),
    ]
    result_file(tmp_path / "smoke.json", "smoke", rows)
    overhead = [each for each in parts if each.title.startswith("overhead")]
    assert kernels_of(overhead[0]) == ["kernels.attention=flash", "kernels.regression=triton"]
    assert overhead_command.parse(
        ["1" if word == "fit" else word for word in overhead[0].command[4:]]
    ).modes == ["flow", "uno"]
    (tmp_path / "smoke.json").write_text("{")
    assert gpu_parts.chosen_backends(tmp_path / "smoke.json") == {}


def test_a_page_is_written_from_nothing_and_says_what_is_missing(tmp_path: Path):
    page = gpu_report.write(tmp_path, ["smoke", "training"], {}, rehearsed=False).read_text()
    assert "No part has left a result." in page
    assert "- smoke: not run" in page and "- training: not run" in page


def test_a_page_is_written_from_whatever_there_is(tmp_path: Path):
    rows = [finding("attention", "flash", 3.0), finding("attention", "flex", 9.0, "raises X: a|b")]
    result_file(tmp_path / "smoke.json", "smoke", rows)
    part = {"ms": {"20": 1.0, "50": 2.0, "80": 3.0}, "tflops": 410.0}
    named = {"name": "conditioning_attention"}
    whole = {**named, "scenario": "A", "backend": "triton", "forward": part, "both": part}
    result_file(tmp_path / "attention-A-triton.json", "kernels", [whole], complete=False)
    other = {**named, "scenario": "A", "backend": "flex", "both": part | {"ms": {"50": 3.0}}}
    other["forward"] = part
    result_file(tmp_path / "attention-A-flex.json", "kernels", [other])
    (tmp_path / "overhead-graph-A.json").write_text('{"cut')
    (tmp_path / "gpu-tests.log").write_text("FAILED tests/x.py::y\n3 passed, 1 failed in 5 s\n")
    expected = ["smoke", "attention-A-triton", "attention-A-flex", "overhead-graph-A", "training"]
    notes = {"overhead-graph-A": "was stopped after 95 s; what it had written is kept"}
    page = gpu_report.write(tmp_path, expected, notes, rehearsed=True).read_text()
    assert "no time in it means anything" in page
    assert "| attention | flex | raises X: a/b |" in page
    assert "| A | triton | 2.000 ms, 410 | - | 2.000 ms, 410 |" in page
    assert "- A: `triton` is 1.50 times as fast as `flex`" in page
    assert "target of `triton` in A: 400 forward, 300 backward" in page
    assert "FAILED tests/x.py::y" in page and "3 passed, 1 failed" in page
    missing = page[page.index("## What is missing") :]
    assert "- attention-A-triton: incomplete" in missing
    assert "- overhead-graph-A: was stopped after 95 s" in missing and "- training: not" in missing
    assert "attention-A-flex" not in missing and "- smoke" not in missing


def test_projections_of_both_experts_are_compared_with_the_copies_that_a_joint_one_makes(
    tmp_path: Path,
):
    file = tmp_path / "experts.json"
    assert kernels_command.main(["--kernel", "experts", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["measurements"]
    cases = {(row["projection"], row["trains"]) for row in rows}
    assert len(cases) == 6
    for case in cases:
        of_case = [row for row in rows if (row["projection"], row["trains"]) == case]
        by_backend = {row["backend"]: row for row in of_case}
        assert set(by_backend) == {"copy of both weights", *backend_names("experts")}
        for name in ("separate", "grouped"):
            assert by_backend[name]["forward"]["50"] > 0 and by_backend[name]["tflops"] > 0
        assert by_backend["separate"]["copied_bytes"] == 0 < by_backend["grouped"]["copied_bytes"]
        assert by_backend["megablocks"]["skipped"]
    page = gpu_report.write(tmp_path, ["experts"], {}, rehearsed=True).read_text()
    assert "## Projections of both experts" in page and "| gate_proj | all | grouped |" in page


def test_a_part_that_fails_or_prints_to_its_log_does_not_end_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def parts(part, rehearse, out):
        for name, code in (("first", "print('hello'); raise SystemExit(3)"), ("second", "pass")):
            command = [sys.executable, "-c", code]
            yield gpu_parts.GpuPart(name, command, 60, None, f"{name}.log", {"A": "b"})

    monkeypatch.setattr(gpu_parts, "parts", parts)
    monkeypatch.setattr(suite_command, "seconds_of_a_probe", lambda: 1.0)
    assert suite_command.run_gpu_parts("1", True, tmp_path) == ["first"]
    assert (tmp_path / "first.log").read_text() == "hello\n"
    page = (tmp_path / "report.md").read_text()
    assert "- first: ended with code 3" in page and "- second" not in page


def is_given_back(lock: TextIO) -> bool:
    """Whether a lock is free within seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def test_what_a_part_has_started_ends_with_it(tmp_path: Path):
    """Also where the part itself has ended: what is left holds memory of the GPU."""
    lock = tmp_path / "lock"
    grandchild = f"exec 9> {lock}; flock 9; echo ready; exec sleep 60"
    code = (
        "import subprocess, sys\n"
        f"left = subprocess.Popen(['sh', '-c', {grandchild!r}], stdout=subprocess.PIPE)\n"
        "print(left.stdout.readline().decode(), flush=True)\n"
        "sys.exit(3)"
    )
    log = tmp_path / "log"
    with open(log, "w") as file:
        part = suite_command.Part("part", [sys.executable, "-c", code], 60)
        assert suite_command.run_part(part, tmp_path, log=file) == "ended with code 3"
    assert "ready" in log.read_text()
    with open(lock) as file:
        assert is_given_back(file), "the process that holds the lock is still there"


def test_a_part_may_use_what_earlier_ones_have_left_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limits = {}

    def run_part(part, out, environment, log):
        limits[part.title] = part.seconds

    def parts(part, rehearse, out):
        for name in ("first", "second"):
            yield gpu_parts.GpuPart(name, ["true"], 60, None, f"{name}.log")

    monkeypatch.setattr(gpu_parts, "parts", parts)
    monkeypatch.setattr(suite_command, "run_part", run_part)
    assert suite_command.run_gpu_parts("1", False, tmp_path) == []
    assert limits["first"] == 60 and 60 < limits["second"] <= 120


def test_the_smoke_test_ends_before_it_is_stopped(tmp_path: Path):
    part = next(gpu_parts.parts(1, False, tmp_path))
    given = float(part.command[part.command.index("--seconds") + 1])
    assert part.title == "smoke" and given <= 0.8 * part.seconds


def test_a_row_that_cannot_be_read_costs_its_section_alone(tmp_path: Path):
    result_file(tmp_path / "smoke.json", "smoke", [finding("attention", "flash", 3.0)])
    row = {"name": "conditioning_attention", "scenario": "A", "backend": "triton", "both": {}}
    result_file(tmp_path / "attention-A-triton.json", "kernels", [row | {"forward": {"ms": {}}}])
    page = gpu_report.write(tmp_path, ["smoke"], {}, rehearsed=False).read_text()
    assert "The section attention cannot be written: KeyError" in page
    assert "| attention | flash | right |" in page and "## What is missing" in page


def test_what_is_faster_than_the_faster_one_of_our_attentions_is_named():
    def row(backend: str, ms: float) -> dict[str, Any]:
        part = {"ms": {"50": ms}}
        return {"scenario": "A", "backend": backend, **dict.fromkeys(attention.PARTS, part)}

    ours = [row("triton_ahead", 1.0), row("triton", 2.0)]
    assert not list(attention._losses([*ours, row("flash", 1.5)]))
    lines = list(attention._losses([*ours, row("flash", 0.5)]))
    assert len(lines) == 3 and all("triton_ahead takes 2.00 times" in line for line in lines)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_attention_kernel_is_timed_alone(kernel: str, monkeypatch: pytest.MonkeyPatch):
    launched: list[str] = []

    def noted(*arguments: Any) -> dict[str, Any]:
        launched.append(arguments[3])
        return parameters(*arguments)

    monkeypatch.setattr("uno_ds.kernels.conditioning_attention.triton_operator.parameters", noted)
    plan = live_plan(SMALL_SCENARIOS["A"]).to("cuda" if torch.cuda.is_available() else "cpu")
    assert kernel_time(kernel, plan, torch.float16, 16, (2, 1), 1) > 0
    # Backward's need a forward before.
    before = launched.index(kernel)
    assert set(launched[before:]) == {kernel} and before == kernel.startswith("backward")


COLLECT = """
import importlib.util
import sys
import pytest

# What a rented machine may lack.
LACKING = ("deepspeed", "hypothesis", "datasets", "diffusers", "liger_kernel", "peft")
find_spec = importlib.util.find_spec

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
importlib.util.find_spec = lambda name, *more: None if name in LACKING else find_spec(name, *more)
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_gpu_tests_are_found_where_torch_and_pytest_alone_are_installed(tmp_path: Path):
    options = [word for word in gpu_test_options(tmp_path) if word not in ("-v", "-n", "2")]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *options],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    files = [results.ROOT / name for name in gpu_parts.TESTS]
    files += sorted((results.ROOT / "tests/kernels").glob("test_*.py"))
    with_gpu_tests = [file.name for file in files if "mark.gpu" in read_if_file(file)]
    assert len(with_gpu_tests) > 5
    lacking = [name for name in with_gpu_tests if f"{name}::" not in done.stdout]
    assert not lacking, done.stdout[-3000:] + done.stderr[-2000:]


def gpu_test_options(out: Path) -> list[str]:
    """Options of pytest in the part of the GPU tests."""
    parts = {each.title: each for each in gpu_parts.parts(1, True, out)}
    return parts["gpu-tests"].command[3:]


def read_if_file(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_the_smoke_test_has_bagels_shapes_and_fits_its_pack():
    scenario = SCENARIOS["A"]
    shapes = smoke.shapes(scenario, small=False)
    assert (shapes.heads, shapes.key_heads, shapes.head_dim, shapes.hidden) == (28, 4, 128, 3584)
    assert shapes.metaqueries == 6 * 256 and shapes.captions == 6 * 200


def test_small_kernels_are_timed_while_the_device_is_busy(monkeypatch: pytest.MonkeyPatch):
    """The host queues both events and the call before the device gets to them."""
    order: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing):
            Event.count += 1
            self.name = f"event {Event.count}"

        def record(self):
            order.append(self.name)

        def elapsed_time(self, other):
            return 1.0

    monkeypatch.setattr(calls.torch.cuda, "Event", Event)
    monkeypatch.setattr(calls.torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(calls.torch.cuda, "synchronize", lambda: order.append("wait"))
    assert calls._cuda_milliseconds(lambda: order.append("call")) == 1.0
    assert order == ["sleep", "event 1", "call", "event 2", "wait"]


def test_result_files_of_the_committed_folder_are_not_touched_by_a_rehearsal():
    assert "results" not in suite_command.default_folder(rehearse=True).parts
    assert json.loads(results.SCHEMA.read_text()) and os.path.isdir(results.ROOT)
