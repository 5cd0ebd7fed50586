"""From result files to one page: report.html, complete in itself, and report.md.

python -m benchmarks report RESULT.json [...] --out FOLDER [--against OTHER.json ...]
    [--price 2.5 --electricity 0.2 --gpus 8 --gpu H200-141GB]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite.command_line import Parser
from benchmarks.suite.report_blocks import Line, Result
from benchmarks.suite.report_page import Figure, write_page
from benchmarks.suite.report_text import sections
from benchmarks.suite.results import read_result
from uno_ds.cost.hardware import GPUS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    results = [read_result(path) for path in options.results]
    others = [read_result(path) for path in options.against]
    write_report(options.out, results, others, options)
    print(f"written: {options.out / 'report.html'}, {options.out / 'report.md'}")
    return 0


def write_report(
    folder: Path, results: list[Result], others: list[Result], options: argparse.Namespace
) -> None:
    content = sections(results, others, options)
    figures: list[Figure] = []
    try:
        from benchmarks.suite.report_plots import figures_of

        figures = figures_of(results)
    except ImportError as error:
        content[0][1].append(Line(f"There are no figures: {error}.", "warning"))
    write_page(folder, content, figures)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="report", description="Makes one page from result files.")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT.json",
        help="result files of overhead, sweep, scale, kernels and the suite",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for report.html, report.md and figures/",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="OTHER.json",
        help="result files to compare with, from main for instance",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=5000,
        help="steps of the run whose hours, energy and money are computed (default 5000)",
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of that run (default 8)")
    parser.add_argument(
        "--gpu",
        choices=tuple(GPUS),
        help="kind of GPU, for its power (default: no energy is given)",
    )
    parser.add_argument("--price", type=float, metavar="MONEY", help="your price of a GPU hour")
    parser.add_argument("--electricity", type=float, metavar="MONEY", help="your price of a kWh")
    parser.add_argument(
        "--watts",
        type=float,
        help="power of a GPU in training (default: the most that its data sheet allows)",
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "gpus", "price", "electricity", "watts"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} is above 0")
    return options
