"""The figures of the report, as PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first
import numpy as np  # noqa: E402  the backend is chosen first

from benchmarks.suite.report_blocks import (  # noqa: E402  the backend is chosen first
    Entry,
    Result,
    clock_of,
    entries_of,
    is_measured,
    section_of,
)
from benchmarks.suite.report_scale import MODELLED, SWEEP  # noqa: E402  as above

RED, BLUE, BLACK, GREY = "#ee6677", "#4477aa", "#222222", "#bbbbbb"
MODE_COLOURS = {
    "flow": BLUE,
    "flow+caption": "#66ccee",
    "flow+regression": "#228833",
    "uno": RED,
    "naive flow": "#999999",
    "naive uno": "#666666",
}
PHASE_COLOURS = {
    "autoencoder": GREY,
    "visual encoder": "#ccbb44",
    "forward": BLUE,
    "backward": "#228833",
    "optimizer": "#aa3377",
    "other": "#dddddd",
}


def figures_of(results: Sequence[Result]) -> list[tuple[str, str, bytes]]:
    """(title of the report's section, caption, PNG) for what the results contain."""
    figures = []
    for entry in filter(is_measured, entries_of(list(results), "overhead")):
        section = section_of(entry)
        if entry["ratios"]:
            caption = f"Ratios of {section}, measured and by operations"
            figures.append((section, caption, _ratios(entry)))
        figures.append((section, f"Time of a step of {section}", _phases(entry)))
        figures.append((section, f"Every timed step of {section}", _steps(entry)))
    points = [entry for entry in entries_of(list(results), "sweep") if not entry["skipped"]]
    if points:
        figures.append((SWEEP, SWEEP, _sweep(points)))
    modelled = [entry for entry in entries_of(list(results), "scale") if not entry["measured"]]
    if modelled:
        figures.append((MODELLED, "GPU hours, modelled", _hours(modelled)))
    return figures


def _phases(entry: Entry) -> bytes:
    """Stacked bars, one per mode, and a mark at the time of the steps that were timed as a
    whole."""
    modes = entry["modes"]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(modes) + 1.6))
    left = np.zeros(len(modes))
    rows = range(len(modes))
    for phase, colour in PHASE_COLOURS.items():
        widths = [_median(numbers["phases"].get(phase)) for numbers in modes.values()]
        style: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.5}
        axes.barh(rows, widths, left=left, label=phase, **style)
        left += widths
    whole = [_median(numbers[clock_of(entry)]) for numbers in modes.values()]
    axes.plot(whole, rows, "k|", markersize=16, label="whole step")
    axes.set_xlabel(f"{_unit(entry)}, median")
    _name_rows(axes, modes)
    _legend_above(axes, columns=4, size=7)
    return _png(figure)


def _ratios(entry: Entry) -> bytes:
    ratios = entry["ratios"]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(ratios) + 1.3))
    rows = range(len(ratios))
    for row, found in enumerate(ratios.values()):
        if found["low"] is not None:
            ends = [found["low"], found["high"]]
            axes.plot(ends, [row, row], color=RED, linewidth=3, solid_capstyle="butt", alpha=0.5)
    medians = [found["median"] for found in ratios.values()]
    predicted = [found["predicted"] for found in ratios.values()]
    hollow: dict[str, Any] = {"markersize": 5, "markerfacecolor": "none", "color": BLACK}
    axes.plot(medians, rows, "o", color=RED, label="measured, with its interval")
    axes.plot(predicted, rows, "D", label="by operations", **hollow)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel("ratio of step times")
    _name_rows(axes, ratios)
    _legend_above(axes, columns=2, size=8)
    return _png(figure)


def _steps(entry: Entry) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 2.6))
    for mode, numbers in entry["modes"].items():
        style: dict[str, Any] = {"marker": ".", "linewidth": 0.8, "color": MODE_COLOURS[mode]}
        axes.plot(numbers[clock_of(entry)], label=mode, **style)
    axes.set_xlabel("round")
    axes.set_ylabel(_unit(entry))
    axes.set_ylim(bottom=0)
    _legend_above(axes, columns=6, size=7)
    return _png(figure)


def _sweep(points: Sequence[Entry]) -> bytes:
    choices = list(dict.fromkeys(point["name"] for point in points))
    columns = (len(choices) + 1) // 2
    figure, grid = plt.subplots(2, columns, figsize=(10, 5.6), squeeze=False)
    for axes, choice in zip(grid.flat, choices, strict=False):
        _plot_choice(axes, choice, [point for point in points if point["name"] == choice])
    for axes in list(grid.flat)[len(choices) :]:
        axes.axis("off")
    grid.flat[0].set_ylabel("UNO / flow", fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.subplots_adjust(hspace=0.45, bottom=0.16)
    return _png(figure, tight=False)


def _plot_choice(axes: Any, choice: str, points: Sequence[Entry]) -> None:
    """The measured model's points and BAGEL-7B's at the same positions, whatever their values."""
    small = [point for point in points if point["measured"]]
    large = [point for point in points if not point["measured"]]
    measured = [point["ratio"]["median"] for point in small]
    style = {"markersize": 4, "linewidth": 1}
    axes.plot(measured, "o-", label="measured", color=RED, **style)
    axes.plot(_predicted(small), "D--", label="operations, same model", color=BLACK, **style)
    axes.plot(_predicted(large), "s:", label="operations, BAGEL-7B", color=BLUE, **style)
    for position, point in enumerate(small):
        ratio = point["ratio"]
        if ratio["low"] is not None:
            axes.plot([position] * 2, [ratio["low"], ratio["high"]], color=RED, alpha=0.5)

    small_values = [str(point["value"]) for point in small]
    large_values = [str(point["value"]) for point in large]
    title, ticks = choice, small_values
    if large_values and small_values != large_values:
        title = f"{choice} (below: BAGEL-7B)"
        pairs = zip(small_values, large_values, strict=True)
        ticks = [f"{first}\n{second}" for first, second in pairs]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)


def _hours(entries: Sequence[Entry]) -> bytes:
    figure, axes = plt.subplots(figsize=(6, 2.8))
    gpus = [str(entry["gpus"]) for entry in entries]
    low = [entry["gpu_hours"][0] for entry in entries]
    high = [entry["gpu_hours"][1] for entry in entries]
    label = "from communication fully hidden to not hidden"
    axes.fill_between(gpus, low, high, color=BLUE, alpha=0.25, label=label)
    axes.plot(gpus, low, "o-", color=BLUE)
    axes.plot(gpus, high, "o-", color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{entries[0]['gpu']} GPUs")
    axes.set_ylabel(f"GPU hours, {entries[0]['steps']:,} steps")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _predicted(points: Sequence[Entry]) -> list[float]:
    return [point["predicted"] for point in points]


def _median(times: Sequence[float] | None) -> float:
    return float(np.median(times)) if times else 0.0


def _unit(entry: Entry) -> str:
    return "seconds of processor time" if clock_of(entry) == "cpu_seconds" else "seconds"


def _name_rows(axes: Any, names: Any) -> None:
    """The first name at the top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()


def _legend_above(axes: Any, columns: int, size: int) -> None:
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(fontsize=size, ncol=columns, frameon=False, **place)


def _png(figure: Any, tight: bool = True) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight" if tight else None)
    plt.close(figure)
    return buffer.getvalue()
