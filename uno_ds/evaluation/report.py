"""One report of several results: a table per benchmark, differences, and published rows."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from uno_ds.evaluation.benchmarks import BENCHMARKS
from uno_ds.evaluation.published import Published, published_rows
from uno_ds.evaluation.report_page import page_of
from uno_ds.evaluation.results import Result, names_of, shown
from uno_ds.evaluation.table import LEVEL, RESAMPLES, Estimate, differences
from uno_ds.files_on_disk import replace_text
from uno_ds.settings import SettingsError

INTERVALS = (
    f"Intervals: {LEVEL:.0%}, from {RESAMPLES:,} bootstrap resamples of the prompts. They do not "
    "cover the seed of the images or the judge. Rows of different judges are not comparable."
)


class Line(NamedTuple):
    """A row of a table: who, by whom, and its cells."""

    name: str
    judge: str
    cells: list[str]


class Section(NamedTuple):
    """All results of one benchmark and set of prompts."""

    title: str
    benchmark: str
    variant: str
    results: list[Result]
    columns: list[str]

    @property
    def published(self) -> list[Published]:
        return published_rows(self.benchmark, self.variant)


def write_report(results: Sequence[Result], out: Path) -> list[Path]:
    """Writes report.md, report.json and report.html; returns their paths."""
    sections = list(sections_of(results))
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "report.md", markdown(sections))
        plain = [_plain(section) for section in sections]
        replace_text(out / "report.json", json.dumps(plain, indent=1) + "\n")
        tables = [(section, lines(section), gap_lines(section)) for section in sections]
        replace_text(out / "report.html", page_of(tables, INTERVALS))
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError("--out", f"{out} cannot be written: {reason}.") from None
    return [out / f"report.{kind}" for kind in ("md", "json", "html")]


def sections_of(results: Sequence[Result]) -> Iterator[Section]:
    """Results by benchmark, in the order in which they were given."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.benchmark, result.variant), []).append(result)
    for (name, variant), members in groups.items():
        benchmark = BENCHMARKS.get(name)
        title = f"{benchmark.title if benchmark else name} {variant}".strip()
        columns = dict.fromkeys(chain.from_iterable(result.estimates() for result in members))
        yield Section(title, name, variant, members, list(columns))


def lines(section: Section) -> list[Line]:
    """Our results, then the published ones, which have an overall score alone."""
    found = []
    for name, result in zip(names_of(section.results), section.results, strict=True):
        estimates = result.estimates()
        cells = [_cell(estimates.get(column)) for column in section.columns]
        found.append(Line(name + _note(result), result.scorer["name"], cells))
    for row in section.published:
        empty = [""] * (len(section.columns) - 1)
        found.append(Line(f"{row.model} ({row.source})", row.judge, [f"{row.value:.2f}", *empty]))
    return found


def gap_lines(section: Section) -> list[Line]:
    """Each later result minus the first one of the same scorer, over the prompts of both."""
    found = []
    names = dict(zip(map(id, section.results), names_of(section.results), strict=True))
    for base, result in _pairs(section):
        gaps = differences(base.table, result.table)
        cells = [_cell(gaps.get(column), sign=True) for column in section.columns]
        found.append(Line(f"{names[id(result)]} - {names[id(base)]}", result.scorer["name"], cells))
    return found


def markdown(sections: Sequence[Section]) -> str:
    parts = ["# Evaluation", INTERVALS]
    for section in sections:
        parts += [f"## {section.title}", _markdown_table(section.columns, lines(section))]
        gaps = gap_lines(section)
        if gaps:
            parts += ["Paired differences:", _markdown_table(section.columns, gaps)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Line]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head = [line(["checkpoint", "judge", *columns]), "|---" * (len(columns) + 2) + "|"]
    return "\n".join([*head, *(line([row.name, row.judge, *row.cells]) for row in rows)])


def _pairs(section: Section) -> Iterator[tuple[Result, Result]]:
    """(first, later) results of one scorer over the prompts of one file."""
    first: dict[tuple[str, Any], Result] = {}
    for result in section.results:
        data = (result.record or {}).get("data", {})
        base = first.setdefault((result.scorer_identity, data.get("sha256")), result)
        if base is not result:
            yield base, result


def _cell(estimate: Estimate | None, sign: bool = False) -> str:
    if estimate is None:
        return ""
    text = shown(estimate)
    return f"+{text}" if sign and estimate.value > 0 else text


def _note(result: Result) -> str:
    """What keeps a result from being that of the whole benchmark."""
    left_out = sum(result.failures.values())
    return f" ({left_out} images left out)" if left_out else ""


def _plain(section: Section) -> dict[str, Any]:
    return {
        "benchmark": section.benchmark,
        "variant": section.variant,
        "results": [_plain_result(result) for result in section.results],
        "differences": _plain_gaps(section),
        "published": [row._asdict() for row in section.published],
    }


def _plain_result(result: Result) -> dict[str, Any]:
    plain = result.plain()
    del plain["rows"], plain["headlines"]
    return {"checkpoint": result.label, "folder": str(result.folder), **plain}


def _plain_gaps(section: Section) -> list[dict[str, Any]]:
    found = []
    for base, result in _pairs(section):
        gaps = differences(base.table, result.table)
        found.append(
            {
                "of": result.label,
                "to": base.label,
                "judge": result.scorer["name"],
                "values": {name: gap.plain() for name, gap in gaps.items()},
            }
        )
    return found
