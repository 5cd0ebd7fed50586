"""Writes the launch table of the Triton attention, kernels/conditioning_attention/launch.json.

    python -m benchmarks launch_table [--capability 90] [--time]

Candidates are compiled for the architecture, which needs no GPU; those that spill, that need more
shared memory than it has, or that copy value by value, are rejected. Without --time the first of
the others is taken, in the order of the lists below: an estimate by occupancy and reuse, not a
measurement. With --time, on a GPU of that architecture, the fastest is taken: forward and backward
over packs of 1024 px and 512 px images (scenarios A and D) at 28 query and 4 key heads."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.suite.command_line import Parser
from benchmarks.suite.compile_reports import compiled
from benchmarks.suite.launch_times import fastest_parameters
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import HEAD_DIMS
from uno_ds.kernels.conditioning_attention.launch import TABLE
from uno_ds.kernels.launch import INTERPRETED, architecture
from uno_ds.settings import SettingsError

DTYPES = {"half": "bf16", "single": "fp32"}
# (BLOCK_M, BLOCK_N, STAGES, warps, DESCRIPTORS, REDUCE). BLOCK_M counts queries, BLOCK_N keys.
CANDIDATES: dict[str, dict[str, list[tuple]]] = {
    "half": {
        "forward": [
            (128, 128, 2, 8, True),
            (128, 64, 3, 8, True),
            (128, 64, 3, 4, True),
            (64, 64, 3, 4, True),
            (128, 64, 2, 8, False),
            (64, 64, 2, 4, False),
        ],
        "backward_keys": [
            (64, 128, 3, 8, True, True),
            (64, 128, 2, 8, True, True),
            (64, 64, 3, 4, True, True),
            (32, 128, 2, 8, True, True),
            (32, 128, 2, 8, False, False),
            (64, 64, 2, 8, False, False),
            (32, 64, 2, 4, False, False),
            (16, 64, 2, 4, False, False),
        ],
        "backward_queries": [
            (128, 64, 3, 8, True),
            (128, 128, 2, 8, True),
            (64, 64, 3, 4, True),
            (128, 64, 2, 8, False),
            (64, 64, 2, 4, False),
        ],
    },
    "single": {
        "forward": [(64, 32, 2, 4, False), (32, 32, 2, 4, False)],
        "backward_keys": [
            (16, 64, 2, 8, False, False),
            (32, 32, 2, 4, False, False),
            (16, 32, 2, 4, False, False),
        ],
        "backward_queries": [(32, 32, 2, 4, False)],
    },
}


def parameters(candidate: tuple) -> dict[str, Any]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "STAGES", "warps", "DESCRIPTORS", "REDUCE"), candidate))


def feasible(kernel: str, precision: str, dim: int, capability: int) -> Iterator[dict[str, Any]]:
    """Candidates that fit, in order, as rows of the table."""
    for candidate in CANDIDATES[precision][kernel]:
        chosen = parameters(candidate)
        if chosen["DESCRIPTORS"] and capability < 90:
            continue
        results = compiled(kernel, DTYPES[precision], dim, chosen, capability)
        try:
            fits = all(result.feasible(capability) and result.copies_wide for result in results)
        except Exception as error:
            # The compiler's own limits count as not feasible, but are printed.
            reason = one_line(error)
            print(f"  {kernel} {precision} D {dim} {chosen}: {reason}", file=sys.stderr)
            continue
        if fits:
            yield chosen


def build(
    capability: int, fastest: Callable[[str, str, int, list[dict]], dict] | None
) -> dict[str, Any]:
    """{precision: {head dim: {kernel: parameters}}} of one architecture."""
    table: dict[str, Any] = {}
    for precision, kernels in CANDIDATES.items():
        for dim in HEAD_DIMS:
            for kernel in kernels:
                candidates = feasible(kernel, precision, dim, capability)
                first = next(candidates, None)
                if first is None:
                    raise SettingsError(
                        "--capability",
                        f"no candidate of {kernel} fits sm_{capability} in {precision} precision "
                        f"with heads of {dim} values.",
                    )
                chosen = first
                if fastest is not None:
                    chosen = fastest(kernel, precision, dim, [first, *candidates])
                table.setdefault(precision, {}).setdefault(str(dim), {})[kernel] = chosen
                print(f"sm_{capability} {precision} D {dim} {kernel}: {chosen}", flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
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
    options = parser.parse_args(arguments)
    if INTERPRETED:
        raise SettingsError("TRITON_INTERPRET", "1 compiles nothing; unset it.")
    wanted = f"sm_{options.capability}"
    fastest = None
    if options.time:
        if not torch.cuda.is_available() or architecture(torch.device("cuda")) != wanted:
            message = f"needs a GPU of compute capability {options.capability}."
            raise SettingsError("--time", message)
        fastest = fastest_parameters
    table = json.loads(TABLE.read_text())
    table[wanted] = build(options.capability, fastest)
    TABLE.write_text(_lines(table))
    return 0


def _lines(table: dict[str, Any]) -> str:
    """JSON with one line per kernel."""
    text = json.dumps(table, indent=1)
    for kernel in ("forward", "backward_keys", "backward_queries"):
        head, *rest = text.split(f'"{kernel}": {{')
        text = head + "".join(
            f'"{kernel}": {{' + " ".join(part[: part.index("}")].split()) + part[part.index("}") :]
            for part in rest
        )
    return text + "\n"
