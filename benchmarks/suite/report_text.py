"""The text of the report, section by section, from result files."""

import argparse
from itertools import chain
from typing import Any

from benchmarks.suite import report_overhead, report_scale
from benchmarks.suite.report_blocks import (
    Block,
    Entry,
    Line,
    Result,
    Section,
    Table,
    entries_of,
)

# Kinds whose numbers have a section.
SHOWN = ("overhead", "sweep", "scale", "kernels")


def sections(
    results: list[Result], others: list[Result], options: argparse.Namespace
) -> list[Section]:
    found = [report_overhead.headline(results)]
    if others:
        comparison = report_overhead.comparison(results, others)
        found.append(("Against the other results", comparison))
    found += report_overhead.measurements(results)
    found += report_scale.sweep(results)
    found += report_scale.traffic(results)
    found += report_scale.modelled(results, options)
    found += report_scale.hours_of_measured(results, options)
    found += _kernels(results)
    found.append(("What this cannot show", _limits(results)))
    found.append(("Where and how", [_machines(results)]))
    return found


def _kernels(results: list[Result]) -> list[Section]:
    rows: list[list[str]] = []
    for entry in entries_of(results, "kernels"):
        rows += _rows_of_kernel(entry)
    head = ["kernel", "scenario", "backend", "part", "ms, median", "useful TFLOP/s"]
    return [("Kernels", [Table(head, rows)])] if rows else []


def _rows_of_kernel(entry: Entry) -> list[list[str]]:
    """A row for each part that was timed."""
    scenario = str(entry.get("scenario", ""))
    backend = str(entry.get("backend", ""))
    rows = []
    for part in ("forward", "backward", "both"):
        time = _time_of_part(entry, part)
        if time is None:
            continue
        milliseconds, tflops = time
        rate = "-" if tflops is None else f"{tflops:.1f}"
        rows.append([entry["name"], scenario, backend, part, f"{milliseconds:.3f}", rate])
    return rows


def _time_of_part(entry: Entry, part: str) -> tuple[float, float | None] | None:
    """(milliseconds, TFLOP/s); None if the part was not timed."""
    times = entry.get(part)
    if not isinstance(times, dict):
        return None
    if "ms" in times:
        return times["ms"]["50"], times.get("tflops")
    # Losses: the rate is that of both parts together.
    return times["50"], entry.get("tflops") if part == "both" else None


def _limits(results: list[Result]) -> list[Block]:
    sentences = list(chain.from_iterable(result["unknown"] for result in results))
    sentences += [
        f"{entry['name']}, stage {entry['stage']}: not measured, {entry['skipped']}"
        for entry in entries_of(results, "overhead")
        if entry["skipped"]
    ]
    for result in results:
        kind = result["kind"]
        if kind not in SHOWN:
            sentences.append(
                f"{kind}: the numbers are in the file; this page has no section of them."
            )
        if not result["complete"]:
            sentences.append(f"{kind}: the run was stopped before its end; what it had is here.")
    return [Line(sentence) for sentence in dict.fromkeys(sentences)]


def _machines(results: list[Result]) -> Table:
    head = ["file", "when", "processor", "GPUs", "driver", "load", "versions", "commit", "command"]
    return Table(head, [_machine(result) for result in results])


def _machine(result: Result) -> list[str]:
    hardware = result["hardware"]
    clocks = result["clocks"]["gpus"] if result["clocks"] else []
    speeds = [f"{gpu.get('sm_mhz')} of {gpu.get('sm_max_mhz')} MHz" for gpu in clocks]
    gpus = ", ".join(hardware["gpus"]) or "none"
    return [
        result["kind"],
        result["created"] or "-",
        f"{hardware['cpu']}, {hardware['cores']} cores",
        f"{gpus} {'; '.join(speeds)}".strip(),
        result["driver"] or "-",
        _load(result["load"]),
        ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        _commit(result["commit"]),
        result["command"] or "-",
    ]


def _load(load: dict[str, Any] | None) -> str:
    if load is None:
        return "-"
    averages = [f"{load[name]:.1f}" for name in ("start", "end") if load[name] is not None]
    parts = [f"load {' to '.join(averages)}"] if averages else []
    if load["threads"] is not None:
        parts.append(f"{load['threads']} thread(s)")
    return ", ".join(parts) or "-"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes
