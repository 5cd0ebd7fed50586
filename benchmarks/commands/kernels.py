"""Measures the kernels.

    python benchmarks/kernels.py --kernel conditioning_attention [--scenarios A,D]
        [--backends triton,flex] [--json FILE]
    python benchmarks/kernels.py --kernel plan [--json FILE]
    python benchmarks/kernels.py --kernel metaquery_regression [--json FILE]
        (or qk_norm_rope, cross_entropy, flow_matching, experts)
    python benchmarks/kernels.py --compile-report [--dtype bf16] [--json FILE]

conditioning_attention: forward, backward and both on packs of 32,768 tokens (benchmarks/README.md),
for every backend that runs here, in bf16 on a GPU; useful TFLOP/s count the visible pairs and the
products that are needed. On a CPU it runs small shapes, as a test of the code: those times mean
nothing. plan: time to build the plan of a pack on the host. The others: benchmarks/suite/losses.py.

--compile-report: registers, shared memory and instructions of every kernel of the launch table, or
with --kernel metaquery_regression or qk_norm_rope of those kernels; needs no GPU.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.suite import attention, compile_reports
from benchmarks.suite.command_line import Parser, names_of
from benchmarks.suite.losses import MEASURES
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import SCENARIOS, SMALL_SCENARIOS
from uno_ds.kernels.backends import HEAD_DIMS, backend_names

Measure = Callable[[ResultFile, argparse.Namespace], None]
KERNELS: dict[str, Measure] = {
    "conditioning_attention": attention.measure_backends,
    "plan": attention.measure_plan_building,
    **MEASURES,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.compile_report:
        result = ResultFile(options.json, "compile")
        compile_reports.report(
            options.kernel, options.capability, options.dtype, options.head_dim, result
        )
    else:
        result = ResultFile(options.json, "kernels", details={"kernel": options.kernel})
        KERNELS[options.kernel](result, options)
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="kernels.py", description="Measures the kernels.")
    parser.add_argument(
        "--kernel",
        choices=tuple(KERNELS),
        default="conditioning_attention",
        help="what to measure",
    )
    parser.add_argument(
        "--compile-report",
        action="store_true",
        help="compile the kernels and print the registers and shared memory that they need",
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="of --compile-report (default 90)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of --compile-report (default: bf16 and fp32)",
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        choices=HEAD_DIMS,
        help="of --compile-report: only heads of so many values (default: all of the table)",
    )
    parser.add_argument(
        "--scenarios",
        default="",
        help="letters of the scenarios, separated by commas (default: all)",
    )
    parser.add_argument(
        "--backends",
        default="",
        help="attention backends, separated by commas (default: all that run here)",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls (default 20)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result to this file, row by row"
    )
    options = parser.parse_args(arguments)
    scenarios = SCENARIOS if torch.cuda.is_available() else SMALL_SCENARIOS
    backends = backend_names("attention")
    options.scenarios = names_of("--scenarios", options.scenarios, scenarios) or list(scenarios)
    options.backends = names_of("--backends", options.backends, backends) or list(backends)
    return options
