"""Every kernel of the launch table compiles for Hopper, which needs no GPU, and the machine code is
what was meant."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite.compile_reports import PRECISIONS, parameters_of
from benchmarks.suite.results import read_result, validate
from uno_ds.kernels import launch, metaquery_regression, qk_norm_rope
from uno_ds.kernels.backends import HEAD_DIMS
from uno_ds.kernels.compiled import SHARED_MEMORY, instruction_counts
from uno_ds.kernels.conditioning_attention.launch import KERNELS, OPTIONAL, TABLE

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    """Triton compiles nothing in a process that interprets, as this one may."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks/kernels.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp32", "fp16"))]
)
def test_every_kernel_of_the_table_fits_the_chip_and_uses_its_matrix_units_and_wide_copies(
    dtype, tmp_path
):
    file = tmp_path / "report.json"
    ran = benchmark("--compile-report", "--dtype", dtype, "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(file.read_text())["measurements"]
    kernels = [kernel for kernel in KERNELS if kernel not in OPTIONAL or dtype != "fp32"]
    assert {(row["name"], row["dim"]) for row in rows} == {
        (kernel, dim) for kernel in kernels for dim in HEAD_DIMS
    }
    # The keys' kernel with dq and without.
    assert len(rows) == (len(kernels) + 1) * len(HEAD_DIMS)
    for row in rows:
        kernel = f"{row['name']} {row['variant']} {dtype} D {row['dim']}"
        counts = row["instructions"]
        assert row["stack"] == 0 and counts["LDL"] == counts["STL"] == 0, f"{kernel} spills"
        assert row["shared"] <= 232_448 and row["feasible"], (
            f"{kernel} wants {row['shared']} bytes of shared memory"
        )
        assert dtype == "fp32" or (counts["HGMMA"] and not counts["HMMA"]), (
            f"{kernel} leaves the matrix units of the chip aside"
        )
        assert counts["UTMALDG"] or counts["LDGSTS.128"] or counts["LDGSTS.64"], (
            f"{kernel} copies one value at a time"
        )
        assert counts["STG.128"] and counts["LDG.128"], (
            f"{kernel} loads or stores one value at a time"
        )


LAUNCHES = """
import contextlib
import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from benchmarks.suite import compile_reports
from uno_ds.kernels import compiled
from uno_ds.kernels.conditioning_attention import launch, triton_operator
from uno_ds.kernels.plan import FULL, build_plan

class Device:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Device())
launch.architecture = lambda device: "sm_90"

class Compiles(Exception):
    pass

def asked(source, target=None, options=None):
    options = make_backend(target).parse_options(dict(options))
    # Newer releases list what is assumed of constants too, which is nothing.
    assumed = {place: what for place, what in source.attrs.items() if what}
    constants = sorted(source.constants.items())
    raise Compiles(str((assumed, source.signature, constants, options.hash())))

def caught(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Compiles as found:
        return str(found)

q, grad, out = (torch.zeros(64, 28, 128, dtype=torch.bfloat16) for _ in range(3))
k, v, dk, dv = (torch.zeros(64, 4, 128, dtype=torch.bfloat16) for _ in range(4))
lse, dq = torch.zeros(28, 64), torch.zeros(64, 28, 128)
statistics = [torch.zeros(28, 64 + triton_operator.PADDING) for _ in range(2)]
rows = np.arange(64)
plan = build_plan(0 * rows, rows, np.array([[FULL]], dtype=np.int8), np.zeros(1, int), (0, 64))
start = triton_operator.Launch(q, k, plan.tables, plan.places, 0.1)
start.device = contextlib.nullcontext()
given = (q, k, v, grad, *statistics, dq)
calls = {
    "forward": (("query_tiles", "keys", 28, (q, k, v, out, lse), (k, v)), {}),
    "forward_ahead": (("query_tiles", "keys", 28, (q, k, v, out, lse), (k, v)), {}),
    "backward_keys": (
        ("live_key_tiles", "queries", 4, (*given, dk, dv), (q, grad), dq),
        {"WITH_QUERIES": True},
    ),
    "backward_queries": (
        ("live_query_tiles", "keys", 28, given, (k, v)),
        {"own": (q, grad)},
    ),
}
compiled.triton.compile = asked
for name, (arguments, options) in calls.items():
    kernel = launch.KERNELS[name]
    kernel.device_caches[0]
    kernel.compile = asked
    chosen = launch.table()["sm_90"]["half"]["128"][name]
    launched = caught(start, name, *arguments, **options)
    reported = caught(lambda: next(compile_reports.compiled(name, "bf16", 128, chosen, 90)))
    assert launched is not None and launched == reported, (launched, reported)
    print(name)
"""


@pytest.mark.slow
def test_what_is_compiled_for_a_report_is_what_a_launch_compiles():
    """With one cache of compiled kernels, `launch_table --time` compiles nothing twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(KERNELS)


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REPORTS = ROOT / "benchmarks/results/compile"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tables_name_every_kernel_and_head_dim(architecture):
    table = json.loads(TABLE.read_text())
    for precision in ("half", "single"):
        kernels = [k for k in KERNELS if k not in OPTIONAL or precision == "half"]
        assert {dim: list(rows) for dim, rows in table[architecture][precision].items()} == {
            str(dim): kernels for dim in HEAD_DIMS
        }
    for package in (metaquery_regression, qk_norm_rope):
        other = launch.table(package.__name__)
        assert set(other) == {"interpreter", *ARCHITECTURES}
        assert set(other[architecture]) == {"half", "single"}


# Bytes of a thread that the key kernel spills in fp32, which is for tests, where no candidate fits
# without by both versions: (architecture, version, head dim).
SPILLED = {("sm_80", "3.6", 64): 24, ("sm_89", "3.9", 16): 16}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_the_committed_reports_are_of_this_table_and_nothing_spills(version, architecture):
    capability = int(architecture.removeprefix("sm_"))
    result = read_result(REPORTS / f"{architecture}-triton-{version}.json")
    assert result["versions"]["triton"].startswith(version)
    assert result["details"]["architecture"] == architecture
    rows = result["measurements"]
    table = json.loads(TABLE.read_text())[architecture]
    # All of bf16, the keys' kernel with dq and without; of fp32 what was compiled.
    assert len([row for row in rows if row["dtype"] == "bf16"]) == 5 * len(HEAD_DIMS)
    for row in rows:
        chosen = table[PRECISIONS[row["dtype"]]][str(row["dim"])][row["name"]]
        assert row["parameters"] == chosen, "the table has changed since the report"
        told = f"{row['name']}, {row['dtype']} D {row['dim']}, by Triton {version}"
        assert row["shared"] <= SHARED_MEMORY[capability], told
        allowed = 0
        if row["dtype"] == "fp32" and row["name"] == "backward_keys":
            allowed = SPILLED.get((architecture, version, row["dim"]), 0)
        assert row["stack"] <= allowed and row["feasible"] == (not row["stack"]), told


@pytest.mark.parametrize("kernel", ["metaquery_regression", "qk_norm_rope"])
@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_the_committed_reports_of_the_other_kernels_are_of_their_tables(version, kernel):
    module = importlib.import_module(f"uno_ds.kernels.{kernel}.compile_cases")
    for architecture in ARCHITECTURES:
        result = read_result(REPORTS / f"{kernel}-{architecture}-triton-{version}.json")
        assert result["versions"]["triton"].startswith(version) and result["complete"]
        rows = {row["name"]: row for row in result["measurements"]}
        cases = dict(module.compile_cases(architecture))
        assert rows.keys() == cases.keys()
        for name, case in cases.items():
            assert rows[name]["parameters"] == parameters_of(case), "the table has changed"
            assert rows[name]["feasible"], f"{name} of {architecture} by Triton {version}"


def test_instructions_are_counted_by_opcode_and_width():
    code = """
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E R5, desc[UR4][R2.64] ;
        /*0020*/             @!UP0 UTMALDG.2D [UR8], [UR6] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/               @P1 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R1, R1 ;
        /*0060*/                   STL [R1], R2 ;
    """
    counts = instruction_counts(code)
    assert {name: count for name, count in counts.items() if count} == {
        "LDG.128": 1,
        "LDG.32": 1,
        "UTMALDG": 1,
        "HGMMA": 1,
        "LDGSTS.128": 1,
        "MUFU.EX2": 1,
        "STL": 1,
    }


def test_the_benchmark_runs_small_shapes_on_a_cpu_and_says_what_it_counts(tmp_path):
    file = tmp_path / "numbers.json"
    ran = benchmark(
        "--scenarios",
        "F",
        "--backends",
        "sdpa,triton",
        "--repeats",
        "1",
        "--json",
        str(file),
        interpret=True,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(file.read_text())
    assert not validate(result) and result["complete"]
    assert result["details"]["matmul_tflops"] > 0 and len(result["measurements"]) == 2
    # F in small: 34 + 5 constants; 34 noised rows see them and themselves, 6 caption and 8
    # metaquery rows the noised ones.
    noised, live = 34, 34 * 34 + 6 * 34 + 6 * 7 // 2 + 8 * 34 + 8 * 8
    for row in result["measurements"]:
        assert row["pairs"] == {"5": live, "3": noised * 39, "0": 0} and row["both"]["ms"]["50"] > 0
        assert row["flops"] == {
            "forward": 4 * 2 * 16 * (live + noised * 39),
            "backward": 2 * 2 * 16 * (5 * live + 3 * noised * 39),
        }
    assert f"{live + noised * 39} visible pairs" in ran.stdout


def test_the_benchmark_builds_plans_of_all_scenarios_and_names_an_unknown_backend():
    ran = benchmark("--kernel", "plan", "--repeats", "1")
    assert (
        ran.returncode == 0 and "100 segments" in ran.stdout and ran.stdout.count("live plan") == 8
    )
    ran = benchmark("--backends", "flash3")
    assert ran.returncode == 2 and "flash3 is unknown" in ran.stderr
