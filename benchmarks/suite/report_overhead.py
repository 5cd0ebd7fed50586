"""Sections of the report about the overhead: the headline, one section for every measurement, and
the comparison with other results."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.measure import PHASES
from benchmarks.suite.report_blocks import (
    Block,
    Entry,
    Line,
    Result,
    Section,
    Table,
    clock_of,
    entries_of,
    interval,
    is_measured,
    section_of,
    share,
)
from benchmarks.suite.statistic import ratio
from uno_ds.cost.step_flops import PASSES

HEADLINES = ("uno / flow", "uno / naive flow", "uno / naive uno")


def headline(results: list[Result]) -> Section:
    title = "What UNO costs over plain flow matching"
    lines: list[Block] = []
    for entry in filter(is_measured, entries_of(results, "overhead")):
        for name in HEADLINES:
            found = entry["ratios"].get(name)
            if found:
                text = (
                    f"{name}: {interval(found)}; {section_of(entry)}. By operations "
                    f"{found['predicted']:.3f}; {found['unexplained']:+.1%} is unexplained."
                )
                lines.append(Line(text, "headline"))
    if not lines:
        lines.append(Line("No overhead was measured in these files.", "warning"))
    return title, lines


def measurements(results: list[Result]) -> list[Section]:
    entries = filter(is_measured, entries_of(results, "overhead"))
    return [(section_of(entry), _measurement(entry)) for entry in entries]


def _measurement(entry: Entry) -> list[Block]:
    clock = "processor time" if clock_of(entry) == "cpu_seconds" else "wall-clock time"
    modes = entry["modes"]
    blocks: list[Block] = [
        Line(
            f"{entry['ranks']} rank(s), {entry['precision']} on {entry['device']}, "
            f"{entry['layers']} layers, weights: {entry['weights']}. Ratios and phases are of "
            f"{clock}. Data is prepared in a thread of its own and is not part of the step; phases "
            "are separated by waiting for the device."
        ),
        _ratios(entry["ratios"]),
        _speed(modes),
        _phases(modes),
        _passes(modes),
        _parts(modes),
    ]
    if any(numbers["mfu"] is None for numbers in modes.values()):
        blocks.append(
            Line(
                "MFU and HFU are left out: this device has no rate on a data sheet that is known "
                "here, and the recipe gives none (hardware.peak_flops)."
            )
        )
    for mode, reason in entry.get("failed_modes", {}).items():
        blocks.append(Line(f"{mode} failed: {reason}", "warning"))
    return blocks


def _ratios(ratios: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            interval(found),
            f"{found['of_totals']:.3f}",
            f"{found['predicted']:.3f}",
            f"{found['unexplained']:+.1%}",
        ]
        for name, found in ratios.items()
    ]
    return Table(["ratio", "median", "of totals", "by operations", "unexplained"], rows)


def _speed(modes: dict[str, Any]) -> Table:
    head = ["mode", "step, s", "steps", "tokens/s", "images/s", "peak MiB", "MFU", "HFU"]
    rows = []
    for mode, numbers in modes.items():
        times = numbers["step_seconds"]
        peak = numbers["peak_memory_bytes"]
        rows.append(
            [
                mode,
                f"{statistics.median(times):.4f}",
                str(len(times)),
                f"{numbers['tokens_per_second']:,.0f}",
                f"{numbers['images_per_second']:.2f}",
                "-" if peak is None else f"{peak / 2**20:,.0f}",
                share(numbers["mfu"]),
                share(numbers["hfu"]),
            ]
        )
    return Table(head, rows)


def _phases(modes: dict[str, Any]) -> Table:
    rows = []
    for mode, numbers in modes.items():
        phases = [numbers["phases"].get(phase) for phase in PHASES]
        medians = [f"{statistics.median(times):.4f}" if times else "-" for times in phases]
        rows.append([mode, *medians])
    return Table(["mode, seconds", *PHASES], rows)


def _passes(modes: dict[str, Any]) -> Table:
    """Operations by pass."""
    rows = []
    for mode, numbers in modes.items():
        flops = numbers["flops"]
        passes = {kind: 0.0 for kind in PASSES}
        for part in flops["predicted"].values():
            for kind in PASSES:
                passes[kind] += part[kind]
        counted = "-" if flops["counted"] is None else _giga(flops["counted"])
        rows.append([mode, *map(_giga, passes.values()), counted, share(flops["unexplained"])])
    names = [kind.replace("_", " ") for kind in PASSES]
    counts = ["counted by torch, without attention", "counted against predicted"]
    return Table(["GFLOP a step", *names, *counts], rows)


def _parts(modes: dict[str, Any]) -> Table:
    """Operations by part of the model."""
    first = next(iter(modes.values()))
    parts = list(first["flops"]["predicted"])
    rows = []
    for mode, numbers in modes.items():
        predicted = numbers["flops"]["predicted"]
        rows.append([mode, *(_giga(sum(predicted[part].values())) for part in parts)])
    return Table(["GFLOP a step", *parts], rows)


def _giga(flop: float) -> str:
    return f"{flop / 1e9:,.4g}"


@dataclass(frozen=True)
class _Times:
    """The timed steps of one mode of one measurement."""

    key: tuple[str, ...]
    clock: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, by the bootstrap that ratios have; of fewer than three steps their
        range."""
        found = ratio(self.seconds, [1.0] * len(self.seconds))
        if found["low"] is None:
            return min(self.seconds), max(self.seconds)
        return found["low"], found["high"]


def comparison(results: list[Result], others: list[Result]) -> list[Block]:
    """These results against others, mode by mode. A change is beyond the noise if the intervals of
    the two medians do not overlap."""
    before = {times.key: times for times in _times_of_modes(others)}
    rows: list[list[str]] = []
    regressions: list[Block] = []
    for now in _times_of_modes(results):
        old = before.get(now.key)
        if old is None or old.clock != now.clock:
            continue
        name = ", ".join(now.key)
        change = f"{now.median / old.median - 1:+.1%}"
        verdict = _verdict(now, old)
        rows.append([name, f"{old.median:.4f}", f"{now.median:.4f}", change, verdict])
        if verdict == "slower":
            text = f"Regression: {name} is {change}, beyond the noise of both files."
            regressions.append(Line(text, "warning"))
    if not rows:
        text = "The files share no measurement of the same name, stage, device and mode."
        return [Line(text, "warning")]
    blocks: list[Block] = []
    if len({_machine(result) for result in (*results, *others)}) > 1:
        text = "The files are of different machines: their times do not compare."
        blocks.append(Line(text, "warning"))
    blocks += regressions or [Line("No regression beyond the noise.")]
    blocks.append(Table(["measurement", "other, s", "this, s", "change", "verdict"], rows))
    return blocks


def _verdict(now: _Times, old: _Times) -> str:
    low, high = now.interval
    old_low, old_high = old.interval
    if low > old_high:
        return "slower"
    if high < old_low:
        return "faster"
    return "within the noise"


def _machine(result: Result) -> str:
    hardware = result["hardware"]
    return str(hardware["gpus"] or hardware["cpu"])


def _times_of_modes(results: list[Result]) -> Iterator[_Times]:
    for entry in filter(is_measured, entries_of(results, "overhead")):
        clock = clock_of(entry)
        for mode, numbers in entry["modes"].items():
            key = (entry["name"], entry["stage"], entry["device"], mode)
            yield _Times(key, clock, numbers[clock])
