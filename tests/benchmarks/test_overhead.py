"""benchmarks/overhead.py as it is called: a file after every round, twice the same answer, and
several ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment_of_tests, free_port

ROOT = Path(__file__).parents[2]
SMALL = [
    "--recipe",
    "tiny",
    "--threads",
    "1",
    "--set",
    "data.scenes.rows=200",
    "--set",
    "sequence.token_budget=512",
]
pytestmark = pytest.mark.slow


def overhead(folder: Path, *flags: str, launcher: tuple[str, ...] = (sys.executable,)) -> dict:
    path = folder / "result.json"
    command = [
        *launcher,
        str(ROOT / "benchmarks" / "overhead.py"),
        *SMALL,
        "--set",
        f"data.folder={folder / 'drawn'}",
        *flags,
        "--json",
        str(path),
    ]
    subprocess.run(
        command,
        cwd=folder,
        env=environment_of_tests(),
        check=True,
        timeout=1200,
        capture_output=True,
    )
    return json.loads(path.read_text())


def test_the_tiny_recipe_measured_twice_agrees_within_the_interval(tmp_path: Path):
    found = []
    for _ in range(2):
        result = overhead(
            tmp_path, "--stages", "graph", "--modes", "flow,uno", "--rounds", "20", "--splits", "1"
        )
        entry = result["measurements"][0]
        assert (
            result["complete"]
            and entry["clock"] == "cpu_seconds"
            and entry["modes"]["uno"]["flops"]["unexplained"] == 0
        )
        found.append(entry["ratios"]["uno / flow"])
    assert max(one["low"] for one in found) <= min(one["high"] for one in found), found


def test_two_ranks_measure_the_whole_step_and_how_long_they_wait_for_each_other(tmp_path: Path):
    launcher = (
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    )
    result = overhead(
        tmp_path,
        "--stages",
        "step,graph",
        "--modes",
        "flow,uno",
        "--rounds",
        "2",
        "--splits",
        "1",
        "--warmup",
        "0",
        launcher=launcher,
    )
    step, graph = result["measurements"]
    assert (
        step["ranks"] == 2
        and len(step["modes"]["uno"]["step_seconds"]) == 2
        and step["clock"] == "step_seconds"
    )
    assert (
        step["modes"]["uno"]["phases"]["communication"][0] > 0
        and graph["skipped"] == "forward and backward alone are measured on one rank"
    )
    assert any("share the cores" in sentence for sentence in result["unknown"])
