"""From result files to one page: report.html, complete in itself, and report.md.

python -m benchmarks report RESULT.json [...] --out FOLDER [--against OTHER.json ...] [--price 2.5 --electricity 0.2 --gpus 8 --gpu H200-141GB]
"""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.report_text import Line, Table, sections
from benchmarks.suite.results import read_result
from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import one_line_errors
from uno_ds.cost.hardware import GPUS

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0}
th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #eee}th:first-child,td:first-child{text-align:left}
.table{overflow-x:auto}
img{max-width:100%}figure{margin:1rem 0}figcaption{font-size:.85rem;color:#555}.headline{font-size:1.25rem;background:#f6f3ee;padding:.7rem 1rem}
.warning{background:#fdeaea;padding:.1rem .6rem}"""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    results, others = (
        [read_result(path) for path in paths] for paths in (options.results, options.against)
    )
    write_report(options.out, results, others, options)
    print(f"written: {options.out / 'report.html'}, {options.out / 'report.md'}")
    return 0


def write_report(
    folder: Path,
    results: list[dict[str, Any]],
    others: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """report.html holds its figures, report.md has them beside it in figures/."""
    measured = [
        entry
        for result in results
        if result["kind"] == "overhead"
        for entry in result["measurements"]
        if not entry["skipped"] and entry["modes"]
    ]
    sweeps = [
        entry
        for result in results
        if result["kind"] == "sweep"
        for entry in result["measurements"]
        if not entry["skipped"]
    ]
    modelled = [
        entry
        for result in results
        if result["kind"] == "scale"
        for entry in result["measurements"]
        if not entry["measured"]
    ]
    told = sections(results, others, options)
    try:
        from benchmarks.suite.report_plots import figures

        drawn = figures(measured, sweeps, modelled)
    except ImportError as error:
        drawn = []
        told[0][1].append(Line(f"There are no figures: {error}.", "warning"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures").mkdir(exist_ok=True)
    pages, plain, number = [], [], 0
    for title, content in told:
        level = 1 if not pages else 2
        pages += [f"<h{level}>{html.escape(title)}</h{level}>", *map(_html, content)]
        plain += [f"{'#' * level} {title}\n", *map(_markdown, content)]
        for caption, png in ((caption, png) for section, caption, png in drawn if section == title):
            number += 1
            (folder / "figures" / f"{number}.png").write_bytes(png)
            image = base64.b64encode(png).decode()
            words = html.escape(caption)
            pages.append(
                f'<figure><img alt="{words}" src="data:image/png;base64,{image}"><figcaption>{words}</figcaption></figure>'
            )
            plain.append(f"![{caption}](figures/{number}.png)\n")
    assert number == len(drawn), "a figure belongs to no section"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(told[0][0])}</title><style>{STYLE}</style></head><body>'
    (folder / "report.html").write_text(
        head + "\n".join(pages) + "</body></html>\n", encoding="utf-8"
    )
    (folder / "report.md").write_text("\n".join(plain), encoding="utf-8")


def _html(item: Line | Table) -> str:
    if isinstance(item, Line):
        return (
            f'<p class="{item.kind}">{html.escape(item.text)}</p>'
            if item.kind
            else f"<p>{html.escape(item.text)}</p>"
        )
    rows = [item.head, *item.rows]
    tags = ["th", *["td"] * len(item.rows)]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(tags, rows)
    ]
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _markdown(item: Line | Table) -> str:
    if isinstance(item, Line):
        return (f"**{item.text}**" if item.kind else item.text) + "\n"
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (item.head, *item.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(item.head) - 1) + "|", *lines[1:]]) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="report.py", description="Makes one page of result files.")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT.json",
        help="result files of overhead.py, sweep.py, scale.py and the suite",
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
        help="steps of the run whose hours, energy and money are told (default 5000)",
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of that run (default 8)")
    parser.add_argument(
        "--gpu", choices=tuple(GPUS), help="kind of GPU, for its power (default: none is told)"
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
