"""From result files to one page: report.html, complete in itself, and report.md.

python -m benchmarks report RESULT.json [...] --out FOLDER [--against OTHER.json ...]
    [--price 2.5 --electricity 0.2 --gpus 8 --gpu H200-141GB]
"""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite.command_line import Parser
from benchmarks.suite.report_blocks import Block, Line, Result, Section
from benchmarks.suite.report_text import sections
from benchmarks.suite.results import read_result
from uno_ds.cost.hardware import GPUS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0 }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left }
.table { overflow-x: auto }
img { max-width: 100% }
figure { margin: 1rem 0 }
figcaption { font-size: .85rem; color: #555 }
.headline { font-size: 1.25rem; background: #f6f3ee; padding: .7rem 1rem }
.warning { background: #fdeaea; padding: .1rem .6rem }
"""
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""


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
    """report.html contains its figures; those of report.md are files in figures/."""
    content = sections(results, others, options)
    figures: list[tuple[str, str, bytes]] = []
    try:
        from benchmarks.suite.report_plots import figures_of

        figures = figures_of(results)
    except ImportError as error:
        content[0][1].append(Line(f"There are no figures: {error}.", "warning"))
    titles = {title for title, _ in content}
    assert all(title in titles for title, _, _ in figures), "a figure belongs to no section"

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    html_blocks: list[str] = []
    markdown_blocks: list[str] = []
    number = 0
    for level, (title, blocks) in zip(_levels(content), content, strict=True):
        html_blocks.append(f"<h{level}>{html.escape(title)}</h{level}>")
        html_blocks += map(_html, blocks)
        markdown_blocks.append(f"{'#' * level} {title}\n")
        markdown_blocks += map(_markdown, blocks)
        for caption, png in _figures_of_section(figures, title):
            number += 1
            (folder / "figures" / f"{number}.png").write_bytes(png)
            html_blocks.append(_html_figure(caption, png))
            markdown_blocks.append(f"![{caption}](figures/{number}.png)\n")
    page = PAGE.format(title=html.escape(content[0][0]), style=STYLE, body="\n".join(html_blocks))
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "report.md").write_text("\n".join(markdown_blocks), encoding="utf-8")


def _levels(content: list[Section]) -> list[int]:
    """Of headings: the first section is the title of the page."""
    return [1] + [2] * (len(content) - 1)


def _figures_of_section(
    figures: list[tuple[str, str, bytes]], section: str
) -> list[tuple[str, bytes]]:
    return [(caption, png) for title, caption, png in figures if title == section]


def _html(block: Block) -> str:
    if isinstance(block, Line):
        kind = f' class="{block.kind}"' if block.kind else ""
        return f"<p{kind}>{html.escape(block.text)}</p>"
    lines = [_html_row("th", block.head), *(_html_row("td", row) for row in block.rows)]
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _html_row(tag: str, cells: list[str]) -> str:
    content = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{content}</tr>"


def _html_figure(caption: str, png: bytes) -> str:
    text = html.escape(caption)
    image = base64.b64encode(png).decode()
    source = f"data:image/png;base64,{image}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _markdown(block: Block) -> str:
    if isinstance(block, Line):
        return (f"**{block.text}**" if block.kind else block.text) + "\n"
    rule = "|---" + "|---:" * (len(block.head) - 1) + "|"
    lines = [_markdown_row(block.head), rule, *map(_markdown_row, block.rows)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
