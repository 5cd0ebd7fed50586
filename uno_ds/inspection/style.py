"""How the figures of an inspection look: one style, with colours that readers with any colour
vision tell apart (Okabe and Ito 2008), and a marker and a line style of its own for each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uno_ds.files_on_disk import replacing

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#8a8a8a"
# Blue for negative, white for 0, vermilion for positive values.
DIVERGING = ("#0072B2", "#ffffff", "#D55E00")
DPI = 110
TITLE, LABEL, TICK = 11, 10, 9


def figure_of(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """A figure of so many inches. Without a layout, which takes long for many panels, it has to be
    laid out by the caller."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def grid_of(figure: Figure, rows: int, columns: int, **options: Any) -> np.ndarray:
    return np.asarray(figure.subplots(rows, columns, squeeze=False, **options))


def line(number: int) -> dict[str, Any]:
    """The look of the line of model `number`."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
        "linewidth": 1.6,
        "markersize": 5,
    }


def plain_axes(axes: Any) -> None:
    axes.tick_params(labelsize=TICK, length=3)
    axes.grid(color="#000000", alpha=0.08)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, axes: Any, columns: int = 4) -> None:
    """One legend for the figure, from the labelled lines of one panel."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=LABEL, frameon=False
    )


def numbers(values: Sequence[float | None]) -> list[float]:
    """None as NaN, which leaves a gap in a line."""
    return [np.nan if value is None else value for value in values]


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
