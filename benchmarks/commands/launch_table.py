"""Writes the launch table of the Triton attention, kernels/conditioning_attention/launch.json.

    python -m benchmarks launch_table [--capability 90] [--time]
    python -m benchmarks launch_table --every --json FILE       with one version of Triton, and
    python -m benchmarks launch_table --among FILE              with another: what fits under both

Candidates are compiled for the architecture, which needs no GPU; those that spill, that need more
shared memory than it has, or that copy value by value, are rejected. Without --time the first of
the others is taken, in the order of the lists below: an estimate by occupancy and reuse, not a
measurement. With --time, on a GPU of that architecture, the fastest is taken: forward and backward
over packs of 1024 px and 512 px images (scenarios A and D) at 28 query and 4 key heads."""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.attention import HEADS, KEY_HEADS
from benchmarks.suite.command_line import Parser
from benchmarks.suite.compile_reports import compiled
from benchmarks.suite.launch_times import fastest_parameters
from benchmarks.suite.results import ResultFile, read_result
from benchmarks.suite.scenarios import SCENARIOS, SMALL_SCENARIOS
from uno_ds.cost.scenario_plan import live_plan
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import HEAD_DIMS
from uno_ds.kernels.conditioning_attention.launch import KERNELS, OPTIONAL, OPTIONS, TABLE
from uno_ds.kernels.launch import INTERPRETED, architecture
from uno_ds.kernels.plan import AttentionPlan
from uno_ds.settings import SettingsError

DTYPES = {"half": "bf16", "single": "fp32"}
# (BLOCK_M, BLOCK_N, STAGES, warps, DESCRIPTORS, and the kernel's option, which may be left out
# where it is false). BLOCK_M counts queries, BLOCK_N keys.
CANDIDATES: dict[str, dict[str, list[tuple]]] = {
    "half": {
        "forward": [
            (128, 128, 2, 8, True),
            (128, 128, 2, 8, True, True),
            (128, 64, 3, 8, True, True),
            (128, 64, 3, 8, True),
            (128, 64, 3, 4, True),
            (64, 64, 3, 4, True),
            (128, 128, 2, 8, False),
            (128, 64, 3, 8, False),
            (128, 64, 2, 8, False),
            (128, 64, 2, 4, False),
            (64, 64, 2, 4, False),
            (64, 32, 2, 4, False),
        ],
        "forward_ahead": [
            (128, 128, 2, 8, True, True),
            (128, 64, 3, 8, True, True),
            (128, 64, 2, 8, False, True),
            (128, 32, 2, 8, False, True),
            (64, 64, 2, 8, False, True),
        ],
        "backward_keys": [
            (64, 128, 3, 8, True, True),
            (64, 128, 2, 8, True, True),
            (64, 64, 3, 4, True, True),
            (32, 128, 2, 8, True, True),
            (64, 64, 2, 8, True, True),
            (64, 128, 2, 8, False, False),
            (32, 128, 2, 8, False, False),
            (64, 64, 2, 8, False, False),
            (16, 128, 2, 8, False, False),
            (32, 64, 2, 8, False, False),
            (32, 64, 2, 4, False, False),
            (16, 64, 2, 4, False, False),
            (32, 32, 2, 4, False, False),
        ],
        "backward_queries": [
            (128, 64, 3, 8, True),
            (128, 64, 3, 8, True, True),
            (128, 128, 2, 8, True),
            (64, 64, 3, 4, True),
            (128, 64, 2, 8, False),
            (64, 64, 2, 4, False),
            (64, 32, 2, 4, False),
        ],
    },
    "single": {
        "forward": [(64, 32, 2, 4, False), (32, 32, 2, 4, False)],
        "backward_keys": [
            (32, 64, 2, 8, False, False),
            (16, 64, 2, 8, False, False),
            (16, 64, 3, 8, False, False),
            (32, 32, 2, 4, False, False),
            (16, 32, 2, 4, False, False),
        ],
        "backward_queries": [(32, 32, 2, 4, False)],
    },
}

# For --rehearse: heads of so many values, and what the interpreter runs.
SMALL_DIM = 16
SMALL_CANDIDATES = [
    {"BLOCK_M": 32, "BLOCK_N": block, "STAGES": 1, "warps": 4, "DESCRIPTORS": False}
    for block in (32, 64)
]


def parameters(kernel: str, candidate: tuple) -> dict[str, Any]:
    names = ("BLOCK_M", "BLOCK_N", "STAGES", "warps", "DESCRIPTORS", OPTIONS[kernel])
    return dict(zip(names, candidate))


Case = tuple[str, str, int, int]
Cases = dict[tuple[str, int, str], list[dict[str, Any]]]


def candidates_of(case: Case) -> list[dict[str, Any]]:
    """Rows of the table that may fit (kernel, precision, head dim, capability), in order."""
    kernel, precision, _, capability = case
    rows = [parameters(kernel, candidate) for candidate in CANDIDATES[precision][kernel]]
    return [row for row in rows if capability >= 90 or not row["DESCRIPTORS"]]


def fits(case: Case, chosen: dict[str, Any]) -> bool:
    """Whether it compiles without a spill, within the chip's shared memory and with wide copies."""
    kernel, precision, dim, capability = case
    try:
        results = compiled(kernel, DTYPES[precision], dim, chosen, capability)
        return all(result.feasible(capability) and result.copies_wide for result in results)
    except Exception as error:
        # The compiler's own limits count as not feasible, but are printed.
        print(f"  {kernel} {precision} D {dim} {chosen}: {one_line(error)}", file=sys.stderr)
        return False


def fitting(
    capability: int, precisions: Sequence[str], dims: Sequence[int], all_of_them: bool
) -> Cases:
    """{(precision, head dim, kernel): candidates that fit}, compiled in as many processes as there
    are cores; only the first one unless `all_of_them`. Raises SettingsError where none fits, but
    leaves out the kernels of OPTIONAL."""
    cases: list[Case] = []
    for precision, dim in itertools.product(precisions, dims):
        cases += [(kernel, precision, dim, capability) for kernel in CANDIDATES[precision]]
    pairs: list[tuple[Case, dict[str, Any]]] = []
    for case in cases:
        pairs += [(case, row) for row in candidates_of(case)]
    cores = len(os.sched_getaffinity(0))
    workers = min(len(pairs) if all_of_them else len(cases), cores)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        if all_of_them:
            right = pool.map(fits, *zip(*pairs, strict=True))
            fitting_pairs = [pair for pair, is_right in zip(pairs, right, strict=True) if is_right]
            found = [[row for of, row in fitting_pairs if of == case] for case in cases]
        else:
            found = list(pool.map(_first_that_fits, cases))
    for (kernel, precision, dim, _), candidates in zip(cases, found, strict=True):
        if not candidates and kernel not in OPTIONAL:
            raise SettingsError(
                "--capability",
                f"no candidate of {kernel} fits sm_{capability} in {precision} precision with "
                f"heads of {dim} values.",
            )
    return {
        (precision, dim, kernel): candidates
        for (kernel, precision, dim, _), candidates in zip(cases, found, strict=True)
        if candidates
    }


def _first_that_fits(case: Case) -> list[dict[str, Any]]:
    return list(itertools.islice((row for row in candidates_of(case) if fits(case, row)), 1))


def _among(cases: Cases, file: Path) -> Cases:
    """The candidates that are also in the result of another run with --every. Raises SettingsError
    where none is left, but leaves out the kernels of OPTIONAL."""
    others = [
        ((row["precision"], row["dim"], row["name"]), row["parameters"])
        for row in read_result(file)["measurements"]
    ]
    left: Cases = {}
    for case, found in cases.items():
        left[case] = [row for row in found if (case, row) in others]
    for precision, dim, kernel in [case for case, found in left.items() if not found]:
        if kernel in OPTIONAL:
            del left[precision, dim, kernel]
            continue
        raise SettingsError(
            "--among",
            f"{file} and this Triton have no candidate of {kernel} in {precision} precision with "
            f"heads of {dim} values in common.",
        )
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    rehearse = options.rehearse
    if INTERPRETED and not rehearse:
        raise SettingsError("TRITON_INTERPRET", "1 compiles nothing; unset it.")
    if rehearse and not INTERPRETED:
        raise SettingsError("--rehearse", "interprets kernels; set TRITON_INTERPRET=1.")
    if options.every and options.json is None:
        raise SettingsError("--every", "needs --json FILE, for the candidates that fit.")
    wanted = f"sm_{options.capability}"
    if options.time and not rehearse:
        if not torch.cuda.is_available() or architecture(torch.device("cuda")) != wanted:
            message = f"needs a GPU of compute capability {options.capability}."
            raise SettingsError("--time", message)
    result = ResultFile(options.json, "launch table", details={"architecture": wanted})
    table = json.loads(TABLE.read_text())
    precisions = options.precision or list(DTYPES)
    dims = [SMALL_DIM] if rehearse else options.dims or list(HEAD_DIMS)
    if rehearse:
        cases = {("single", SMALL_DIM, kernel): SMALL_CANDIDATES for kernel in CANDIDATES["single"]}
    else:
        every = options.time or options.every or options.among is not None
        cases = fitting(options.capability, precisions, dims, all_of_them=every)
    if options.every:
        for (precision, dim, kernel), candidates in cases.items():
            for row in candidates:
                case = {"name": kernel, "precision": precision, "dim": dim}
                result.add({**case, "parameters": row})
        result.finish()
        return 0
    if options.among is not None:
        cases = _among(cases, options.among)
    plans: list[AttentionPlan] = []
    heads = (HEADS, KEY_HEADS)
    if rehearse:
        plans, heads = [live_plan(SMALL_SCENARIOS["A"])], (2, 1)
    elif options.time:
        plans = [live_plan(SCENARIOS[name]).to("cuda") for name in ("A", "D")]
    rows = table.setdefault(wanted, {})
    for (precision, dim, kernel), candidates in cases.items():
        chosen = candidates[0]
        if plans:
            chosen = fastest_parameters(
                kernel, precision, dim, candidates, plans, heads, 1 if rehearse else 20, result.add
            )
        rows.setdefault(precision, {}).setdefault(str(dim), {})[kernel] = chosen
        print(f"{wanted} {precision} D {dim} {kernel}: {chosen}", flush=True)
        if options.out is not None:
            options.out.write_text(_lines(table))
    if options.out is None and not rehearse:
        TABLE.write_text(_lines(table))
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch_table", description="Writes the launch table of the Triton attention."
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="compute capability without the dot (default 90)"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="take the fastest candidate, measured on this machine's GPU",
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="compile every candidate, write those that fit to --json, and leave the table alone",
    )
    parser.add_argument(
        "--among",
        type=Path,
        metavar="FILE",
        help="take only candidates that FILE has, of a run with --every by another Triton",
    )
    parser.add_argument(
        "--precision", action="append", choices=tuple(DTYPES), help="only this one (default: both)"
    )
    parser.add_argument(
        "--dims",
        action="append",
        type=int,
        choices=HEAD_DIMS,
        help="only heads of so many values; may be repeated (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the table there, after every kernel, and not into the package",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the time of every candidate to this file"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="interpret two candidates on a small batch: a test of this command without a GPU",
    )
    return parser.parse_args(arguments)


def _lines(table: dict[str, Any]) -> str:
    """JSON with one line per kernel."""
    text = json.dumps(table, indent=1)
    for kernel in KERNELS:
        head, *rest = text.split(f'"{kernel}": {{')
        text = head + "".join(
            f'"{kernel}": {{' + " ".join(part[: part.index("}")].split()) + part[part.index("}") :]
            for part in rest
        )
    return text + "\n"
