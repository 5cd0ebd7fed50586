"""The figures of the report, as PNG bytes by title."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first
import numpy as np  # noqa: E402  the backend is chosen first

from benchmarks.suite.report_text import MODELLED, SWEEP, section_of  # noqa: E402  the backend is chosen first

COLOURS = {
    "flow": "#4477aa",
    "flow+caption": "#66ccee",
    "flow+regression": "#228833",
    "uno": "#ee6677",
    "naive flow": "#999999",
    "naive uno": "#666666",
}
PARTS = ("autoencoder", "visual encoder", "forward", "backward", "optimizer", "other")
PART_COLOURS = ("#bbbbbb", "#ccbb44", "#4477aa", "#228833", "#aa3377", "#dddddd")


def figures(
    measurements: Sequence[dict[str, Any]],
    sweeps: Sequence[dict[str, Any]],
    modelled: Sequence[dict[str, Any]],
) -> list[tuple[str, str, bytes]]:
    """(title of the report's section, title, PNG) of what there is to show."""
    shown = []
    for entry in measurements:
        section = section_of(entry)
        if entry["ratios"]:
            shown.append(
                (section, f"Ratios of {section}, measured and by operations", _ratios(entry))
            )
        shown += [
            (section, f"Time of a step of {section}", _split(entry)),
            (section, f"Every timed step of {section}", _raw(entry)),
        ]
    if sweeps:
        shown.append((SWEEP, SWEEP, _sweep(sweeps)))
    if modelled:
        shown.append((MODELLED, "GPU hours, modelled", _hours(modelled)))
    return shown


def _split(entry: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(entry["modes"]) + 1.6))
    for row, (_, numbers) in enumerate(entry["modes"].items()):
        left = 0.0
        for part, colour in zip(PARTS, PART_COLOURS):
            width = (
                float(np.median(numbers["phases"][part])) if numbers["phases"].get(part) else 0.0
            )
            axes.barh(
                row,
                width,
                left=left,
                color=colour,
                edgecolor="white",
                linewidth=0.5,
                label=part if row == 0 else None,
            )
            left += width
        axes.plot(
            float(np.median(numbers[entry.get("clock", "step_seconds")])),
            row,
            "k|",
            markersize=16,
            label="whole step, not split" if row == 0 else None,
        )
    axes.set_yticks(range(len(entry["modes"])), list(entry["modes"]))
    axes.invert_yaxis()
    axes.set_xlabel(
        "seconds of processor, median" if entry.get("clock") == "cpu_seconds" else "seconds, median"
    )
    axes.legend(fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _png(figure)


def _ratios(entry: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(entry["ratios"]) + 1.3))
    for row, (_, found) in enumerate(entry["ratios"].items()):
        if found["low"] is not None:
            axes.plot(
                [found["low"], found["high"]],
                [row, row],
                color="#ee6677",
                linewidth=3,
                solid_capstyle="butt",
                alpha=0.5,
            )
        axes.plot(
            found["median"],
            row,
            "o",
            color="#ee6677",
            label="measured, with its interval" if row == 0 else None,
        )
        axes.plot(
            found["predicted"],
            row,
            "D",
            markersize=5,
            markerfacecolor="none",
            color="#222222",
            label="by operations" if row == 0 else None,
        )
    axes.axvline(1, color="#bbbbbb", linewidth=0.8)
    axes.set_yticks(range(len(entry["ratios"])), list(entry["ratios"]))
    axes.invert_yaxis()
    axes.set_xlabel("ratio of step times")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    return _png(figure)


def _raw(entry: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 2.6))
    for mode, numbers in entry["modes"].items():
        axes.plot(
            numbers[entry.get("clock", "step_seconds")],
            marker=".",
            linewidth=0.8,
            color=COLOURS[mode],
            label=mode,
        )
    axes.set_xlabel("round")
    axes.set_ylabel("seconds of processor" if entry.get("clock") == "cpu_seconds" else "seconds")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncol=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _png(figure)


def _sweep(points: Sequence[dict[str, Any]]) -> bytes:
    knobs = list(dict.fromkeys(point["name"] for point in points))
    figure, grid = plt.subplots(2, (len(knobs) + 1) // 2, figsize=(10, 5.6), squeeze=False)
    for axes, knob in zip(grid.flat, knobs):
        for measured, style, label in (
            (True, "o-", "measured"),
            (True, "D--", "operations, same model"),
            (False, "s:", "operations, BAGEL-7B"),
        ):
            own = [
                point for point in points if point["name"] == knob and point["measured"] == measured
            ]
            height = [
                point["ratio"]["median"] if label == "measured" else point["predicted"]
                for point in own
            ]
            place = list(range(len(own)))
            axes.plot(
                place,
                height,
                style,
                markersize=4,
                linewidth=1,
                label=label,
                color={"measured": "#ee6677", "operations, same model": "#222222"}.get(
                    label, "#4477aa"
                ),
            )
            if label == "measured":
                for number, point in zip(place, own):
                    if point["ratio"]["low"] is not None:
                        axes.plot(
                            [number] * 2,
                            [point["ratio"]["low"], point["ratio"]["high"]],
                            color="#ee6677",
                            alpha=0.5,
                        )
        names = [
            [
                str(point["value"])
                for point in points
                if point["name"] == knob and point["measured"] == measured
            ]
            for measured in (True, False)
        ]
        both = (
            names[0]
            if names[0] == names[1] or not names[1]
            else [f"{small}\n{large}" for small, large in zip(*names)]
        )
        axes.set_xticks(range(len(both)), both, fontsize=7)
        axes.set_title(knob if names[0] == names[1] else f"{knob} (below: BAGEL-7B)", fontsize=9)
        axes.axhline(1, color="#bbbbbb", linewidth=0.8)
        axes.tick_params(axis="y", labelsize=7)
    for axes in list(grid.flat)[len(knobs) :]:
        axes.axis("off")
    grid.flat[0].set_ylabel("UNO / flow", fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.subplots_adjust(hspace=0.45, bottom=0.16)
    return _png(figure, tight=False)


def _hours(entries: Sequence[dict[str, Any]]) -> bytes:
    figure, axes = plt.subplots(figsize=(6, 2.8))
    gpus = [str(entry["gpus"]) for entry in entries]
    low, high = zip(*(entry["gpu_hours"] for entry in entries))
    axes.fill_between(
        gpus, low, high, color="#4477aa", alpha=0.25, label="all sending hidden, to none"
    )
    axes.plot(gpus, low, "o-", color="#4477aa")
    axes.plot(gpus, high, "o-", color="#4477aa")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{entries[0]['gpu']} GPUs")
    axes.set_ylabel(f"GPU hours, {entries[0]['steps']:,} steps")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _png(figure: Any, tight: bool = True) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight" if tight else None)
    plt.close(figure)
    return buffer.getvalue()
