"""What the report says, section by section, from result files."""

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.statistic import ratio
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.step_flops import PASSES

SWEEP, MODELLED = "Overhead against what a recipe chooses", "Many GPUs, modelled"
HEADLINES = ("uno / flow", "uno / naive flow", "uno / naive uno")


@dataclass(frozen=True)
class Line:
    """A paragraph. kind: "", "headline" or "warning"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


Section = tuple[str, list[Line | Table]]


def section_of(entry: dict[str, Any]) -> str:
    """Title of the section of a measurement of overhead."""
    return f"{entry['name']}, stage {entry['stage']}, {entry['device']}"


def sections(
    results: list[dict[str, Any]], others: list[dict[str, Any]], options: argparse.Namespace
) -> list[Section]:
    overhead = [
        (result, entry)
        for result in results
        if result["kind"] == "overhead"
        for entry in result["measurements"]
    ]
    told: list[Section] = [_headline(overhead)]
    if others:
        told.append(("Against the other results", _comparison(results, others)))
    for _, entry in overhead:
        if not entry["skipped"] and entry["modes"]:
            told.append((section_of(entry), _measurement(entry)))
    told += _sweep(results) + _scale(results, options) + _kernels(results)
    told.append(
        (
            "What this cannot say",
            [
                Line(sentence)
                for sentence in dict.fromkeys(
                    sentence for result in results for sentence in result["unknown"]
                )
            ]
            + [
                Line(f"{entry['name']}, stage {entry['stage']}: not measured, {entry['skipped']}")
                for _, entry in overhead
                if entry["skipped"]
            ]
            + [
                Line(f"{result['kind']}: the run was cut before its end; what it had is here.")
                for result in results
                if not result["complete"]
            ],
        )
    )
    told.append(("Where and how", [_machines(results)]))
    return told


def _headline(overhead: list[tuple[dict[str, Any], dict[str, Any]]]) -> Section:
    lines: list[Line | Table] = []
    for _, entry in overhead:
        for name in HEADLINES if not entry["skipped"] else ():
            found = entry["ratios"].get(name)
            if found:
                lines.append(
                    Line(
                        f"{name}: {_interval(found)}; {entry['name']}, stage {entry['stage']}, "
                        f"{entry['device']}. "
                        f"Operations say {found['predicted']:.3f}; {found['unexplained']:+.1%} is "
                        "left unexplained.",
                        "headline",
                    )
                )
    return "What UNO costs over plain flow matching", lines or [
        Line("No overhead was measured in these files.", "warning")
    ]


def _interval(found: dict[str, Any]) -> str:
    edges = (
        ""
        if found["low"] is None
        else f" ({found['low']:.3f} to {found['high']:.3f} at {found['level']:.0%}, {found['pairs']} pairs)"
    )
    return f"{found['median']:.3f}{edges}"


def _measurement(entry: dict[str, Any]) -> list[Line | Table]:
    ranks, phases = (
        entry["ranks"],
        (
            "data",
            "autoencoder",
            "visual encoder",
            "forward",
            "backward",
            "optimizer",
            "other",
            "communication",
        ),
    )
    clock = "processor time" if entry.get("clock") == "cpu_seconds" else "time on the wall"
    lines: list[Line | Table] = [
        Line(
            f"{ranks} rank(s), {entry['precision']} on {entry['device']}, {entry['layers']} "
            f"layers, weights: {entry['weights']}. "
            f"Ratios and phases are of {clock}. Data is prepared in a thread beside the step and "
            "is not part of it; phases wait "
            "for the device in between."
        )
    ]
    speed, split, work = [], [], []
    for mode, numbers in entry["modes"].items():
        times, flops = numbers["step_seconds"], numbers["flops"]
        memory = (
            "-"
            if numbers["peak_memory_bytes"] is None
            else f"{numbers['peak_memory_bytes'] / 2**20:,.0f}"
        )
        speed.append(
            [
                mode,
                f"{statistics.median(times):.4f}",
                str(len(times)),
                f"{numbers['tokens_per_second']:,.0f}",
                f"{numbers['images_per_second']:.2f}",
                memory,
                _share(numbers["mfu"]),
                _share(numbers["hfu"]),
            ]
        )
        split.append(
            [
                mode,
                *(
                    "-"
                    if not numbers["phases"].get(phase)
                    else f"{statistics.median(numbers['phases'][phase]):.4f}"
                    for phase in phases
                ),
            ]
        )
        counted = "-" if flops["counted"] is None else f"{flops['counted'] / 1e9:,.4g}"
        passes = (sum(part[kind] for part in flops["predicted"].values()) for kind in PASSES)
        work.append(
            [
                mode,
                *(f"{flop / 1e9:,.4g}" for flop in passes),
                counted,
                _share(flops["unexplained"]),
            ]
        )
    parts = list(next(iter(entry["modes"].values()))["flops"]["predicted"])
    by_part = [
        [
            mode,
            *(f"{sum(numbers['flops']['predicted'][part].values()) / 1e9:,.4g}" for part in parts),
        ]
        for mode, numbers in entry["modes"].items()
    ]
    ratios = [
        [
            name,
            _interval(found),
            f"{found['of_totals']:.3f}",
            f"{found['predicted']:.3f}",
            f"{found['unexplained']:+.1%}",
        ]
        for name, found in entry["ratios"].items()
    ]
    lines += [
        Table(["ratio", "median", "of totals", "by operations", "unexplained"], ratios),
        Table(
            ["mode", "step, s", "steps", "tokens/s", "images/s", "peak MiB", "MFU", "HFU"], speed
        ),
        Table(["mode, seconds", *phases], split),
        Table(
            [
                "GFLOP a step",
                *(kind.replace("_", " ") for kind in PASSES),
                "counted by torch, without attention",
                "counted against predicted",
            ],
            work,
        ),
        Table(["GFLOP a step", *parts], by_part),
    ]
    if any(numbers["mfu"] is None for numbers in entry["modes"].values()):
        lines.append(
            Line(
                "MFU and HFU are left out: this device has no rate that a data sheet tells, and "
                "the recipe names none (hardware.peak_flops)."
            )
        )
    return lines + [
        Line(f"{mode} failed: {reason}", "warning")
        for mode, reason in entry.get("failed_modes", {}).items()
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _sweep(results: list[dict[str, Any]]) -> list[Section]:
    points = [
        entry
        for result in results
        if result["kind"] == "sweep"
        for entry in result["measurements"]
        if not entry["skipped"]
    ]
    rows = [
        [
            entry["name"],
            entry["model"],
            str(entry["value"]),
            f"{entry['share']:.2f}",
            _interval(entry["ratio"]) if entry["measured"] else "-",
            f"{entry['predicted']:.3f}",
        ]
        for entry in points
    ]
    head = ["choice", "model", "value", "supervised", "UNO / flow measured", "by operations"]
    return [(SWEEP, [Table(head, rows)])] if rows else []


def _scale(results: list[dict[str, Any]], options: argparse.Namespace) -> list[Section]:
    entries = [
        entry for result in results if result["kind"] == "scale" for entry in result["measurements"]
    ]
    told: list[Section] = []
    counted = [entry for entry in entries if entry["measured"] and not entry["skipped"]]
    if counted:
        rows = [
            [
                str(entry["ranks"]),
                f"{entry['counted'][0]['gather']:,}",
                f"{entry['predicted']['gather']:,}",
                f"{entry['counted'][0]['reduce']:,}",
                f"{entry['predicted']['reduce']:,}",
                f"{entry['bytes_sent'] / 1e6:.2f}",
                "yes" if entry["equal"] else "NO",
            ]
            for entry in counted
        ]
        told.append(
            (
                "What ZeRO sends",
                [
                    Line(
                        "Elements of the collectives that DeepSpeed asks for in a step, counted on "
                        "real ranks, against the model."
                    ),
                    Table(
                        [
                            "ranks",
                            "gathered",
                            "model",
                            "reduced",
                            "model",
                            "MB sent by a rank",
                            "equal on all ranks",
                        ],
                        rows,
                    ),
                ],
            )
        )
    modelled = [entry for entry in entries if not entry["measured"]]
    if modelled:
        rows = []
        for entry in modelled:
            low, high = (hours * options.steps / entry["steps"] for hours in entry["gpu_hours"])
            rows.append(
                [
                    str(entry["gpus"]),
                    entry["gpu"],
                    f"{entry['step_seconds'][0]:.3g} to {entry['step_seconds'][1]:.3g}",
                    f"{low:,.0f} to {high:,.0f}",
                    *_bill(low, high, entry["gpu"], options),
                ]
            )
        told.append(
            (
                MODELLED,
                [
                    Line(
                        f"{options.steps:,} steps. Not measured. Assumptions: "
                        + "; ".join(modelled[0]["assumptions"])
                        + ".",
                        "warning",
                    ),
                    Table(["GPUs", "kind", "seconds a step", "GPU hours", "kWh", "money"], rows),
                ],
            )
        )
    return told + _hours_of_measured(results, options)


def _hours_of_measured(results: list[dict[str, Any]], options: argparse.Namespace) -> list[Section]:
    """What a run costs if each of its GPUs did a step as the measured one did. Only for GPUs: a
    CPU's time is no GPU hour."""
    rows = []
    for result in results:
        for entry in result["measurements"] if result["kind"] == "overhead" else ():
            if entry["skipped"] or entry["device"] == "cpu" or entry["ranks"] > 1:
                continue
            for mode, numbers in entry["modes"].items():
                hours = (
                    statistics.median(numbers["step_seconds"]) * options.steps * options.gpus / 3600
                )
                rows.append(
                    [
                        f"{entry['name']}, {entry['stage']}",
                        mode,
                        f"{hours:,.0f}",
                        *_bill(hours, hours, options.gpu, options),
                    ]
                )
    if not rows:
        return []
    return [
        (
            f"{options.steps:,} steps on {options.gpus} GPUs, from the measured step",
            [
                Line(
                    "Assumes that each GPU does a step in the time measured on one, and that "
                    "sending hides behind computing. Stage graph has no optimizer.",
                    "warning",
                ),
                Table(["measurement", "mode", "GPU hours", "kWh", "money"], rows),
            ],
        )
    ]


def _bill(low: float, high: float, gpu: str | None, options: argparse.Namespace) -> list[str]:
    """[kWh, money] of GPU hours, by the user's prices."""
    watts = options.watts or (GPUS[gpu].watts if gpu else None)
    energy = [hours * watts / 1000 for hours in (low, high)] if watts else None
    money = None
    if options.price or options.electricity and energy:
        money = [
            hours * (options.price or 0) + (used * (options.electricity or 0))
            for hours, used in zip((low, high), energy or (0, 0))
        ]
    return [
        "-"
        if values is None
        else f"{values[0]:,.0f}"
        if values[0] == values[1]
        else f"{values[0]:,.0f} to {values[1]:,.0f}"
        for values in (energy, money)
    ]


def _kernels(results: list[dict[str, Any]]) -> list[Section]:
    rows = []
    for entry in (
        entry
        for result in results
        if result["kind"] == "kernels"
        for entry in result["measurements"]
    ):
        for part in ("forward", "backward", "both"):
            if isinstance(entry.get(part), dict) and "ms" in entry[part]:
                rows.append(
                    [
                        entry["name"],
                        str(entry.get("scenario", "")),
                        str(entry.get("backend", "")),
                        part,
                        f"{entry[part]['ms']['50']:.3f}",
                        "-"
                        if entry[part].get("tflops") is None
                        else f"{entry[part]['tflops']:.1f}",
                    ]
                )
    return (
        [
            (
                "Kernels",
                [
                    Table(
                        ["kernel", "scenario", "backend", "part", "ms, median", "useful TFLOP/s"],
                        rows,
                    )
                ],
            )
        ]
        if rows
        else []
    )


def _comparison(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[Line | Table]:
    """This against other, mode by mode. A change counts when the intervals of the two medians are
    apart."""
    old = {key: numbers for key, numbers in _modes(others)}
    rows, worse = [], []
    for key, (clock, times) in _modes(results):
        if key not in old or old[key][0] != clock:
            continue
        (low, high), (old_low, old_high) = _spread(times), _spread(old[key][1])
        change = statistics.median(times) / statistics.median(old[key][1]) - 1
        verdict = "slower" if low > old_high else "faster" if high < old_low else "within the noise"
        rows.append(
            [
                ", ".join(key),
                f"{statistics.median(old[key][1]):.4f}",
                f"{statistics.median(times):.4f}",
                f"{change:+.1%}",
                verdict,
            ]
        )
        worse += (
            [
                Line(
                    f"Regression: {', '.join(key)} is {change:+.1%}, beyond the noise of both "
                    "files.",
                    "warning",
                )
            ]
            if verdict == "slower"
            else []
        )
    if not rows:
        return [
            Line(
                "The files share no measurement of the same name, stage, device and mode.",
                "warning",
            )
        ]
    machines = {
        str(result["hardware"]["gpus"] or result["hardware"]["cpu"])
        for result in (*results, *others)
    }
    different = (
        [Line("The files are of different machines: their times do not compare.", "warning")]
        if len(machines) > 1
        else []
    )
    return [
        *different,
        *(worse or [Line("No regression beyond the noise.")]),
        Table(["measurement", "other, s", "this, s", "change", "verdict"], rows),
    ]


def _modes(results: list[dict[str, Any]]) -> list[tuple[tuple[str, ...], tuple[str, list[float]]]]:
    return [
        (
            (entry["name"], entry["stage"], entry["device"], mode),
            (entry.get("clock", "step_seconds"), numbers[entry.get("clock", "step_seconds")]),
        )
        for result in results
        if result["kind"] == "overhead"
        for entry in result["measurements"]
        if not entry["skipped"]
        for mode, numbers in entry["modes"].items()
    ]


def _spread(times: list[float]) -> tuple[float, float]:
    """Interval of the median, by the bootstrap that ratios have; of fewer than three steps their
    range."""
    found = ratio(times, [1.0] * len(times))
    return (min(times), max(times)) if found["low"] is None else (found["low"], found["high"])


def _machines(results: list[dict[str, Any]]) -> Table:
    rows = []
    for result in results:
        hardware, load, versions = result["hardware"], result["load"], result["versions"]
        gpus = ", ".join(hardware["gpus"]) or "none"
        clocks = "; ".join(
            f"{gpu.get('sm_mhz')} of {gpu.get('sm_max_mhz')} MHz"
            for gpu in result["clocks"]["gpus"]
        )
        load_text = (
            f"{load['start']:.1f} to {load['end']:.1f}"
            if load["end"] is not None
            else f"{load['start']:.1f}"
        )
        rows.append(
            [
                result["kind"],
                result["created"],
                f"{hardware['cpu']}, {hardware['cores']} cores",
                f"{gpus} {clocks}".strip(),
                result["driver"] or "-",
                f"load {load_text}, {load['threads']} thread(s)",
                ", ".join(f"{name} {number}" for name, number in versions.items()),
                (result["commit"] or "unknown")[:12]
                + ("+changes" if (result["commit"] or "").endswith("+changes") else ""),
                result["command"],
            ]
        )
    return Table(
        ["file", "when", "processor", "GPUs", "driver", "load", "versions", "commit", "command"],
        rows,
    )
