"""The report as a page in one file: tables, and the best and worst images of each category."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from uno_ds.evaluation.results import Result, names_of
from uno_ds.evaluation.table import Row

if TYPE_CHECKING:
    from uno_ds.evaluation.report import Line, Section

SHOWN = 4  # prompts of each end and category
THUMBNAIL, QUALITY = 192, 80
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #d2d2d2; padding: .3rem .6rem; text-align: left; white-space: nowrap }
td { font-variant-numeric: tabular-nums }
td small { color: #666 }
.numbers td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 10rem }
th { background: #f4f4f4 }
.grid td { vertical-align: top; width: 192px }
.grid .prompt { font-size: 12px; white-space: normal; overflow-wrap: anywhere }
img { width: 192px; height: 192px; object-fit: contain; background: #f4f4f4 }
"""


def page_of(tables: "Sequence[tuple[Section, list[Line], list[Line]]]", note: str) -> str:
    """The page; images are in it as small JPEGs."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>Evaluation</h1>",
        f"<p>{html.escape(note)}</p>",
    ]
    for section, lines, gaps in tables:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts.append(_table(section.columns, lines))
        if gaps:
            parts += ["<h3>Paired differences</h3>", _table(section.columns, gaps)]
        parts += _grids(section.results)
    return "\n".join([*parts, "</body></html>"]) + "\n"


def best_and_worst(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The rows of the highest and of the lowest scores, no row twice."""
    scored = [(row.score(columns), row) for row in rows if row.images]
    ranked = sorted(
        ((score, row) for score, row in scored if score is not None),
        key=lambda entry: (-entry[0], entry[1].key),
    )
    ordered = [row for _, row in ranked]
    best = ordered[:SHOWN]
    worst = [row for row in reversed(ordered) if row not in best][:SHOWN]
    return best, worst


def _grids(results: Sequence[Result]) -> Iterator[str]:
    """For each judge and category: the prompts that are best and worst in the first result, a
    column each, with a row for every checkpoint."""
    by_judge: dict[str, list[Result]] = {}
    for result in results:
        by_judge.setdefault(result.scorer["name"], []).append(result)
    for judge, members in by_judge.items():
        first = members[0]
        columns = first.table.overall_columns
        title = f"Images by {judge}: best and worst of {first.label}"
        yield f"<h3>{html.escape(title)}</h3>"
        groups: dict[str, list[Row]] = {}
        for row in first.rows:
            groups.setdefault(row.group, []).append(row)
        for group, rows in groups.items():
            for name, chosen in zip(("best", "worst"), best_and_worst(rows, columns), strict=True):
                if chosen:
                    title = f"{group}, {name}" if group else name
                    yield f"<h4>{html.escape(title)}</h4>{_grid(members, chosen, columns)}"


def _grid(results: Sequence[Result], chosen: Sequence[Row], columns: Sequence[str]) -> str:
    lines = []
    for name, result in zip(names_of(results), results, strict=True):
        by_key = {row.key: row for row in result.rows}
        cells = [_cell(by_key.get(row.key), columns, result.folder) for row in chosen]
        lines.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    prompts = "".join(f'<td class="prompt">{html.escape(row.prompt)}</td>' for row in chosen)
    return f'<table class="grid">{"".join(lines)}<tr><th></th>{prompts}</tr></table>'


def _cell(row: Row | None, columns: Sequence[str], folder: Path) -> str:
    """The first image of a prompt with its score; empty where it has none."""
    if row is None or not row.images:
        return "<td></td>"
    score = row.score(columns)
    caption = f"{score:.2f}" if score is not None else ""
    return f'<td><img alt="" src="{_thumbnail(folder / row.images[0])}"><br>{caption}</td>'


def _thumbnail(path: Path) -> str:
    """A data URL; empty where the image is gone."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=QUALITY)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(columns: Sequence[str], lines: "Sequence[Line]") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("checkpoint", "judge", *columns))
    body = ""
    for line in lines:
        shown = (html.escape(line.name), html.escape(line.judge), *map(_number, line.cells))
        cells = "".join(f"<td>{cell}</td>" for cell in shown)
        body += f"<tr>{cells}</tr>"
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'


def _number(cell: str) -> str:
    """A value above its interval, so that columns are narrow."""
    value, bracket, interval = html.escape(cell).partition(" [")
    return f"{value}<br><small>[{interval}</small>" if bracket else value
