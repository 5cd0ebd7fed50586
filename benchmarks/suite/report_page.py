"""A page of sections, tables and figures: report.html, complete in itself, and report.md."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite.report_blocks import Block, Line, Section

# Title of the section that it belongs to, caption, PNG.
Figure = tuple[str, str, bytes]

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


def write_page(folder: Path, content: Sequence[Section], figures: Sequence[Figure]) -> None:
    """report.html contains its figures; those of report.md are files in figures/."""
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


def _levels(content: Sequence[Section]) -> list[int]:
    """Of headings: the first section is the title of the page."""
    return [1] + [2] * (len(content) - 1)


def _figures_of_section(figures: Sequence[Figure], section: str) -> list[tuple[str, bytes]]:
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
