"""Draws what a step costs against the number of GPUs, and what bounds each point."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from uno_ds.cost.scaling import COMPUTING, CONFIGURATIONS, LINK, MEMORY, NETWORK, Point
from uno_ds.settings import SettingsError

COLORS = dict(zip(CONFIGURATIONS, ("#8c8c8c", "#b35806", "#2166ac", "#1b7837"), strict=True))
MARKERS = {COMPUTING: "o", NETWORK: "^", LINK: "s", MEMORY: "x"}


def _label(bound: str) -> str:
    return "does not fit the memory" if bound == MEMORY else f"most is {bound}"


def draw_scaling(points: Sequence[Point], gpu: str, png: Path) -> None:
    """Raises SettingsError if the file cannot be written."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for configuration, color in COLORS.items():
        line = [point for point in points if point.configuration == configuration]
        costs = [point.gpu_hours for point in line]
        counts = [point.gpus for point in line]
        axes.plot(counts, costs, color=color, linewidth=1.5)
        for point in line:
            marker = MARKERS[point.bound]
            axes.plot(point.gpus, point.gpu_hours, marker, color=color, markersize=7)
    axes.set_xscale("log", base=2)
    counts = sorted({point.gpus for point in points})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_ylim(0, 1.1 * max(point.gpu_hours for point in points))
    axes.set_xlabel(f"{gpu}s")
    axes.set_ylabel("GPU hours of 1,000 packs, modelled")
    keys = [Line2D([], [], color=color, label=name) for name, color in COLORS.items()]
    keys += [
        Line2D([], [], color="black", linestyle="", marker=marker, label=_label(bound))
        for bound, marker in MARKERS.items()
    ]
    axes.legend(handles=keys, frameon=False, fontsize=8, loc="lower left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(png)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError("--scaling", f"{png} cannot be written: {reason}.") from None
