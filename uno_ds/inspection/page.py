"""One self-contained HTML page: text, tables and figures."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uno_ds.files_on_disk import replace_text

# Rows of a table that is shown without a click.
LONGEST_OPEN = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.6rem }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd }
p { max-width: 52rem }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0 }
th, td { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #eee;
  vertical-align: top }
.table { overflow-x: auto }
img { max-width: 100% }
figure { margin: 1rem 0 }
figcaption { font-size: .9rem; color: #555; max-width: 52rem }
nav a { margin-right: 1rem }
summary { font-weight: bold; cursor: pointer; margin: .6rem 0 }
"""


@dataclass(frozen=True)
class Section:
    """paragraphs: what the figures show, and what they do not prove; figures: (file in the report's
    folder, caption); tables: (title, head, rows)."""

    title: str
    paragraphs: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = field(default=())


def write_page(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """report.html, with the figures of the folder inside."""
    links = "".join(
        f'<a href="#{_anchor(section)}">{html.escape(section.title)}</a>' for section in sections
    )
    body = "\n".join(_section(folder, section) for section in sections)
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta '
        f'charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )
    path = folder / "report.html"
    replace_text(path, page)
    return path


def _section(folder: Path, section: Section) -> str:
    blocks = [f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>']
    blocks += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
    for file, caption in section.figures:
        data = base64.b64encode((folder / file).read_bytes()).decode()
        blocks.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)} ({html.escape(file)})</figcaption></figure>"
        )
    blocks += [_table(*table) for table in section.tables]
    return "\n".join(blocks)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = f"<tr>{names}</tr>"
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines += f"<tr>{cells}</tr>"
    table = f'<div class="table"><table>{lines}</table></div>'
    if len(rows) > LONGEST_OPEN:
        return f"<details><summary>{html.escape(title)}</summary>{table}</details>"
    return f"<p><b>{html.escape(title)}</b></p>{table}"


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")
