"""Whether a source can be used: unreadable files, unusable rows, and lines about both."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uno_ds.data.examples import Example
from uno_ds.data.images import BadRow
from uno_ds.data.recognition import (
    LONGEST_COLUMNS,
)
from uno_ds.data.sources import Source
from uno_ds.settings import printable

MOST_WARNINGS = 10  # lines about unreadable files of one source
# Rows among which `check_usable` looks for a usable one: a source with fewer than one in so many is
# of no use.
LEADING_ROWS, SPREAD_ROWS = 1_000, 9_000
SECONDS_BETWEEN_LINES = 10.0
LONGEST_PATH = 300


@dataclass(frozen=True)
class BadExample:
    """One unusable row: where it is, and what is wrong with it."""

    source: str
    file: str
    row: int
    detail: str

    @classmethod
    def of(cls, source: Source, index: int, error: BadRow) -> "BadExample":
        path, row = source.locate(index)
        return cls(source.name, printable(path, LONGEST_PATH), row, error.detail)

    def __str__(self) -> str:
        return f"row {self.row} of '{self.file}'" + (f": {self.detail}" if self.detail else "")


def check_usable(
    source: Source,
    try_example: Callable[[Example], None],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Looks for one row that can be read and that `try_example` takes (it raises BadRow if it does
    not).

    Looks at LEADING_ROWS rows from the first on, then at up to SPREAD_ROWS spread over the others;
    `report` gets a line every SECONDS_BETWEEN_LINES. Raises SettingsError with the causes, their
    counts and the first row's fault if none is usable."""
    causes: Counter[str] = Counter()
    first: BadExample | None = None
    indices = _indices_to_try(len(source))
    reported = time.monotonic()
    for index in indices:
        try:
            try_example(source.read(index, np.random.default_rng(0)))
            return
        except BadRow as error:
            causes[error.cause] += 1
            first = first or BadExample.of(source, index, error)
        if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            report(
                f"source '{source.name}': looking for a usable row, {causes.total():,} of "
                f"{len(indices):,} tried ({_counts(causes)})"
            )
    first_only = "first " if source.is_streamed else ""
    found = f"none of its {first_only}{len(source)} rows can be used"
    if len(indices) < len(source):
        found = f"none of {len(indices)} rows looked at among its {len(source)} can be used"
    message = f"{found} ({_counts(causes)}); {first}"
    if columns := source.columns(0):
        message += f"; its columns are {printable(', '.join(columns), LONGEST_COLUMNS)}"
    if needed := source.lacking(0):
        message += f"; {source.layout} needs {needed}, which the key columns maps to other names"
    raise source.error(message)


def _indices_to_try(rows: int) -> Sequence[int]:
    if rows <= LEADING_ROWS + SPREAD_ROWS:
        return range(rows)
    others = rows - LEADING_ROWS
    spread = [LEADING_ROWS + place * others // SPREAD_ROWS for place in range(SPREAD_ROWS)]
    return [*range(LEADING_ROWS), *spread]


def _counts(causes: Counter[str]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in causes.most_common())


def check_readable(source: Source, limit: float) -> None:
    """Raises SettingsError if more than the share `limit` of the source's files cannot be read."""
    unreadable = source.unreadable_files
    number = len(unreadable) + len(source.paths)
    if len(unreadable) <= limit * number:
        return
    first = "; ".join(f"'{file}': {reason}" for file, reason in list(unreadable.items())[:3])
    raise source.error(
        f"{len(unreadable)} of its {number} files cannot be read, more than "
        f"data.max_unreadable_fraction = {limit:g} allows; {first}"
    )


def file_notes(source: Source) -> list[str]:
    """What was chosen and left out of the files that the source's path names, and as what it is
    read, a line each."""
    return [f"source '{source.name}' {note}." for note in (*source.notes, source.reading.line())]


def file_warnings(source: Source) -> list[str]:
    """A line for each of the first files that cannot be read, and one for the others."""
    files = list(source.unreadable_files.items())
    lines = [
        f"source '{source.name}': the file '{file}' cannot be read and is left out: {reason}."
        for file, reason in files[:MOST_WARNINGS]
    ]
    if len(files) > MOST_WARNINGS:
        others = len(files) - MOST_WARNINGS
        lines.append(f"source '{source.name}': {others} more files cannot be read.")
    return lines
