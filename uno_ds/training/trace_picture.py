"""Draws what a trace says: seconds by kind of range, and a step's ranges, computing and
communication over time."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uno_ds.training.intervals import Interval, intersection
from uno_ds.training.trace_reading import KINDS, OUTSIDE, RangeTime, Trace, kind_of

COLORS = dict(
    zip(
        (*KINDS, OUTSIDE),
        (
            "#8c8c8c",
            "#1b7837",
            "#2166ac",
            "#762a83",
            "#4393c3",
            "#d6604d",
            "#b35806",
            "#c2a5cf",
            "#e08214",
            "#5aae61",
            "#dddddd",
        ),
        strict=True,
    )
)
EXPOSED, HIDDEN, COMPUTING = "#d6604d", "#f4a582", "#4393c3"


def draw_trace(trace: Trace, rows: list[RangeTime], png: Path) -> None:
    """Raises OSError."""
    figure = Figure(figsize=(11, 7.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    _draw_bars(above, trace, rows)
    _draw_step(below, trace)
    figure.savefig(png)


def _draw_bars(axes: Axes, trace: Trace, rows: list[RangeTime]) -> None:
    steps = len(trace.steps)
    on_host: dict[str, float] = {}
    on_device: dict[str, float] = {}
    for row in rows:
        kind = kind_of(row.name)
        on_host[kind] = on_host.get(kind, 0.0) + row.own / steps
        on_device[kind] = on_device.get(kind, 0.0) + row.device / steps
    kinds = list(on_host)
    places = range(len(kinds))
    height = 0.4 if trace.on_gpu else 0.8
    shift = height / 2 if trace.on_gpu else 0.0
    axes.barh(
        [place - shift for place in places],
        [on_host[kind] for kind in kinds],
        height,
        color=[COLORS[kind] for kind in kinds],
        label="host",
    )
    if trace.on_gpu:
        axes.barh(
            [place + shift for place in places],
            [on_device[kind] for kind in kinds],
            height,
            color=[COLORS[kind] for kind in kinds],
            hatch="//",
            label="device",
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(list(places), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, without inner ranges")
    axes.set_title(f"{trace.path.name}: {steps} step(s) of rank {trace.rank}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_step(axes: Axes, trace: Trace) -> None:
    """The last step: the first ones of a trace contain the profiler's own start."""
    step = trace.steps[-1]
    window = [(step.start, step.end)]
    for span in trace.ranges:
        for interval in intersection([(span.start, span.end)], window):
            _bar(axes, [interval], 2, COLORS[kind_of(span.name)])
    _bar(axes, intersection(trace.computing, window), 1, COMPUTING)
    communicating = intersection(trace.communicating, window)
    _bar(axes, communicating, 0, EXPOSED)
    _bar(axes, intersection(communicating, trace.computing), 0, HIDDEN)
    axes.set_yticks([0, 1, 2], ["communication (pale: hidden)", "computing", "ranges of the host"])
    axes.set_xlim(step.start, step.end)
    axes.set_xlabel(f"seconds since the first traced step; {step.name}")
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Axes, intervals: list[Interval], row: int, color: str) -> None:
    widths = [(start, end - start) for start, end in intervals]
    axes.broken_barh(widths, (row - 0.4, 0.8), facecolors=color, linewidth=0)
