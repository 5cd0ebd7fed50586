"""Sections of the report about sweeps, traffic, and hours, energy and money of many GPUs."""

import argparse
import statistics

from benchmarks.suite.report_blocks import (
    Entry,
    Line,
    Result,
    Section,
    Table,
    entries_of,
    interval,
    is_measured,
)
from uno_ds.cost.hardware import GPUS

SWEEP = "Overhead against what a recipe chooses"
MODELLED = "Many GPUs, modelled"


def sweep(results: list[Result]) -> list[Section]:
    rows = [
        [
            entry["name"],
            entry["model"],
            str(entry["value"]),
            f"{entry['share']:.2f}",
            interval(entry["ratio"]) if entry["measured"] else "-",
            f"{entry['predicted']:.3f}",
        ]
        for entry in entries_of(results, "sweep")
        if not entry["skipped"]
    ]
    head = ["choice", "model", "value", "supervised", "UNO / flow measured", "by operations"]
    return [(SWEEP, [Table(head, rows)])] if rows else []


def traffic(results: list[Result]) -> list[Section]:
    rows = [
        _traffic_row(entry)
        for entry in entries_of(results, "scale")
        if entry["measured"] and not entry["skipped"]
    ]
    if not rows:
        return []
    text = (
        "Elements of the collectives that DeepSpeed calls in a step, counted on ranks, against the "
        "model."
    )
    head = ["ranks", "gathered", "model", "reduced", "model"]
    head += ["MB sent by a rank", "equal on all ranks"]
    return [("What ZeRO sends", [Line(text), Table(head, rows)])]


def _traffic_row(entry: Entry) -> list[str]:
    counted = entry["counted"][0]
    predicted = entry["predicted"]
    return [
        str(entry["ranks"]),
        f"{counted['gather']:,}",
        f"{predicted['gather']:,}",
        f"{counted['reduce']:,}",
        f"{predicted['reduce']:,}",
        f"{entry['bytes_sent'] / 1e6:.2f}",
        "yes" if entry["equal"] else "NO",
    ]


def modelled(results: list[Result], options: argparse.Namespace) -> list[Section]:
    entries = [entry for entry in entries_of(results, "scale") if not entry["measured"]]
    if not entries:
        return []
    rows = []
    for entry in entries:
        low, high = (hours * options.steps / entry["steps"] for hours in entry["gpu_hours"])
        hidden, exposed = entry["step_seconds"]
        rows.append(
            [
                str(entry["gpus"]),
                entry["gpu"],
                f"{hidden:.3g} to {exposed:.3g}",
                f"{low:,.0f} to {high:,.0f}",
                *_bill(low, high, entry["gpu"], options),
            ]
        )
    assumptions = "; ".join(entries[0]["assumptions"])
    text = f"{options.steps:,} steps. Not measured. Assumptions: {assumptions}."
    head = ["GPUs", "kind", "seconds a step", "GPU hours", "kWh", "money"]
    return [(MODELLED, [Line(text, "warning"), Table(head, rows)])]


def hours_of_measured(results: list[Result], options: argparse.Namespace) -> list[Section]:
    """The cost of a run if each of its GPUs needed the measured time for a step. Only of
    measurements on a GPU: a CPU's time is no GPU hour."""
    rows = []
    for entry in filter(is_measured, entries_of(results, "overhead")):
        if entry["device"] == "cpu" or entry["ranks"] > 1:
            continue
        for mode, numbers in entry["modes"].items():
            seconds = statistics.median(numbers["step_seconds"])
            hours = seconds * options.steps * options.gpus / 3600
            bill = _bill(hours, hours, options.gpu, options)
            rows.append([f"{entry['name']}, {entry['stage']}", mode, f"{hours:,.0f}", *bill])
    if not rows:
        return []
    title = f"{options.steps:,} steps on {options.gpus} GPUs, from the measured step"
    text = (
        "Assumes that each GPU does a step in the time measured on one, and that communication is "
        "hidden behind computation. Stage graph has no optimizer."
    )
    head = ["measurement", "mode", "GPU hours", "kWh", "money"]
    return [(title, [Line(text, "warning"), Table(head, rows)])]


def _bill(low: float, high: float, gpu: str | None, options: argparse.Namespace) -> list[str]:
    """[kWh, money] of GPU hours, by the user's prices."""
    watts = options.watts or (GPUS[gpu].watts if gpu else None)
    if not watts:
        money = [low * options.price, high * options.price] if options.price else None
        return ["-", _range(money)]
    energy = [hours * watts / 1000 for hours in (low, high)]
    if not (options.price or options.electricity):
        return [_range(energy), "-"]
    price = options.price or 0
    electricity = options.electricity or 0
    money = [
        hours * price + used * electricity for hours, used in zip((low, high), energy, strict=True)
    ]
    return [_range(energy), _range(money)]


def _range(values: list[float] | None) -> str:
    if values is None:
        return "-"
    low, high = values
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
