"""The report as a page in one file: tables, and the best and worst images of each category."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from uno_ds.evaluation.results import Result
from uno_ds.evaluation.table import Row

if TYPE_CHECKING:
    from uno_ds.evaluation.report import Line, Section

SHOWN = 4  # images of each end, category and checkpoint
THUMBNAIL, QUALITY = 192, 80
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #d2d2d2; padding: .3rem .6rem; text-align: left; white-space: nowrap }
td { font-variant-numeric: tabular-nums }
th { background: #f4f4f4 }
.grid { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0 1.25rem }
figure { margin: 0; width: 192px }
img { width: 192px; height: 192px; object-fit: contain; background: #f4f4f4; display: block }
figcaption { font-size: 12px; overflow-wrap: anywhere }
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
        for result in section.results:
            parts += _images(result)
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


def _images(result: Result) -> Iterator[str]:
    groups: dict[str, list[Row]] = {}
    for row in result.rows:
        groups.setdefault(row.group, []).append(row)
    judge = result.scorer["name"]
    yield f"<h3>Images of {html.escape(result.label)} by {html.escape(judge)}</h3>"
    columns = result.table.overall_columns
    for group, rows in groups.items():
        best, worst = best_and_worst(rows, columns)
        for name, chosen in (("best", best), ("worst", worst)):
            figures = [_figure(row, columns, result.folder) for row in chosen]
            title = f"{group}, {name}" if group else name
            if figures:
                yield f"<h4>{html.escape(title)}</h4>"
                yield f'<div class="grid">{"".join(figures)}</div>'


def _figure(row: Row, columns: Sequence[str], folder: Path) -> str:
    score = row.score(columns)
    caption = f"{score:.2f}  {row.prompt}" if score is not None else row.prompt
    source = _thumbnail(folder / row.images[0])
    return (
        f'<figure><img alt="" src="{source}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


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
    rows = [
        "".join(f"<td>{html.escape(cell)}</td>" for cell in (line.name, line.judge, *line.cells))
        for line in lines
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
