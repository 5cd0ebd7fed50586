"""Blocks of a report, and what several of its sections share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A paragraph. kind: "", "headline" or "warning"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


Block = Line | Table
Section = tuple[str, list[Block]]  # title, content
Entry = dict[str, Any]
Result = dict[str, Any]


def entries_of(results: list[Result], kind: str) -> Iterator[Entry]:
    """The measurements of all results of a kind."""
    for result in results:
        if result["kind"] == kind:
            yield from result["measurements"]


def is_measured(entry: Entry) -> bool:
    """Of overhead: whether there are numbers."""
    return not entry["skipped"] and bool(entry["modes"])


def section_of(entry: Entry) -> str:
    """Title of the section of a measurement of overhead."""
    return f"{entry['name']}, stage {entry['stage']}, {entry['device']}"


def clock_of(entry: Entry) -> str:
    """Which times of a measurement of overhead its ratios are of."""
    return entry.get("clock", "step_seconds")


def interval(found: dict[str, Any]) -> str:
    """A ratio as text."""
    if found["low"] is None:
        return f"{found['median']:.3f}"
    return (
        f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f} at "
        f"{found['level']:.0%}, {found['pairs']} pairs)"
    )


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
