"""The figures of an inspection, from its numbers."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from uno_ds.inspection.diagnosis import CELLS
from uno_ds.inspection.style import (
    DIVERGING,
    FAINT,
    INK,
    LABEL,
    TICK,
    TITLE,
    figure_of,
    grid_of,
    legend_below,
    line,
    numbers,
    plain_axes,
)

NOISE_LEVEL = "noise level t"
# Of the maps, in widths of a picture.
BETWEEN_MODELS, MARGIN = 0.25, 0.03


@dataclass(frozen=True)
class Curve:
    """One row of panels, a panel for each layer. values: {model: [layer][level]}; low, high: ends
    of intervals, and shuffled: values of shuffled images or labels, likewise; chance, and
    reference, a name and a value: horizontal lines."""

    label: str
    values: dict[str, Any]
    low: dict[str, Any] | None = None
    high: dict[str, Any] | None = None
    chance: float | None = None
    shuffled: dict[str, Any] | None = None
    reference: tuple[str, float] | None = None


def curves(rows: Sequence[Curve], levels: Sequence[float], layers: Sequence[int]) -> Figure:
    """Over the noise level, a column for each layer; panels of a row share their axis."""
    columns = len(layers)
    width, height = 1.2 + 2.3 * columns, 1.25 + 1.9 * len(rows)
    figure = figure_of(width, height, None)
    grid = grid_of(figure, len(rows), columns, sharex=True, sharey="row")
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.1 / width,
        top=1 - 0.35 / height,
        bottom=0.9 / height,
        wspace=0.08,
        hspace=0.14,
    )
    for across, row in zip(grid, rows, strict=True):
        for place, axes in enumerate(across):
            _curve(axes, row, levels, place)
            plain_axes(axes)
        across[0].set_ylabel(row.label, fontsize=LABEL)
    figure.align_ylabels(grid[:, 0])
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer}", fontsize=TITLE, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel(NOISE_LEVEL, fontsize=LABEL)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=5, fontsize=LABEL, frameon=False,
        bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    return figure


def _curve(axes: Any, row: Curve, levels: Sequence[float], place: int) -> None:
    for number, (model, values) in enumerate(row.values.items()):
        style = line(number)
        beside = _beside(levels, number, len(row.values))
        axes.plot(beside, numbers(values[place]), label=model, **style)
        if row.low is not None and row.high is not None:
            low, high = numbers(row.low[model][place]), numbers(row.high[model][place])
            axes.vlines(beside, low, high, color=style["color"], alpha=0.35, linewidth=2.5)
    if row.shuffled is not None:
        means = np.nanmean([numbers(values[place]) for values in row.shuffled.values()], axis=0)
        axes.plot(levels, means, color=FAINT, linewidth=1.2, label="shuffled images or labels")
    if row.chance is not None:
        axes.axhline(row.chance, color=FAINT, linestyle=(0, (1, 2)), label="chance")
    if row.reference is not None:
        name, value = row.reference
        axes.axhline(value, color=FAINT, linestyle=(0, (6, 2)), label=name)


def _beside(levels: Sequence[float], number: int, models: int) -> list[float]:
    """The levels, moved a little for each model so that intervals do not hide one another."""
    step = 0.015 * (max(levels) - min(levels) or 1.0)
    return [level + step * (number - (models - 1) / 2) for level in levels]


def maps(
    noised: Sequence[np.ndarray],
    models: Mapping[str, Sequence[Sequence[np.ndarray]]],
    levels: Sequence[float],
    layers: Sequence[int],
) -> Figure:
    """models: {model: [level][layer] picture in 0..1}. A row for each noise level, a block of
    columns for each model, the noised image first. All pictures are in one panel, since panels of
    their own would take most of the report's time."""
    blocks = [[[picture / 255.0] for picture in noised], *models.values()]
    widths = [len(block[0]) for block in blocks]
    starts = np.cumsum([0, *(width + BETWEEN_MODELS for width in widths)])
    inches = 1.25
    figure = figure_of(0.75 + inches * float(starts[-1]), 0.65 + inches * len(levels), None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-0.75 / inches, float(starts[-1]))
    axes.set_ylim(len(levels), -0.65 / inches)
    axes.set_axis_off()
    for row, level in enumerate(levels):
        axes.text(-0.08, row + 0.5, f"t = {level:g}", ha="right", va="center", fontsize=LABEL)
        for start, block in zip(starts, blocks, strict=False):
            for column, picture in enumerate(block[row]):
                left = float(start) + column
                place = (left + MARGIN, left + 1 - MARGIN, row + 1 - MARGIN, row + MARGIN)
                axes.imshow(picture, extent=place, interpolation="nearest", aspect="auto")
    axes.text(0.5, -0.04, "noised image", ha="center", va="bottom", fontsize=LABEL)
    for start, model in zip(starts[1:], models, strict=False):
        axes.text(
            float(start) + MARGIN, -0.25, model, va="bottom", fontsize=LABEL, fontweight="bold"
        )
        for column, layer in enumerate(layers):
            middle = float(start) + column + 0.5
            axes.text(middle, -0.04, f"layer {layer}", ha="center", va="bottom", fontsize=LABEL)
    axes.set_xlim(-0.75 / inches, float(starts[-1]))
    axes.set_ylim(len(levels), -0.65 / inches)
    return figure


def _show(axes: Any, picture: np.ndarray) -> None:
    axes.set_axis_on()
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def reading(models: dict[str, Any], levels: Sequence[float]) -> Figure:
    """Cross entropy of the caption, and for scenes what share of the read captions is right."""
    entries = chain.from_iterable(found["levels"] for found in models.values())
    judged = any(entry["right"] for entry in entries)
    columns = 3 if judged else 1
    figure = figure_of(1.0 + 3.6 * columns, 3.6)
    grid = grid_of(figure, 1, columns)[0]
    for number, (model, found) in enumerate(models.items()):
        style = line(number)
        entropy = [entry["cross_entropy"] or {} for entry in found["levels"]]
        means = numbers([value.get("mean") for value in entropy])
        beside = _beside(levels, number, len(models))
        grid[0].plot(beside, means, label=model, **style)
        ends = [numbers([value.get(end) for value in entropy]) for end in ("low", "high")]
        grid[0].vlines(beside, *ends, color=style["color"], alpha=0.35, linewidth=2.5)
        if judged:
            for axes, facet in ((grid[1], "all"), (grid[2], "colours")):
                shares = [(entry["right"] or {}).get(facet) for entry in found["levels"]]
                axes.plot(levels, numbers(shares), label=model, **style)
    grid[0].set_ylabel("caption: cross entropy, nats a token", fontsize=LABEL)
    if judged:
        grid[1].set_ylabel("captions wholly right", fontsize=LABEL)
        grid[2].set_ylabel("captions with right colours", fontsize=LABEL)
        for axes in grid[1:]:
            axes.set_ylim(-0.03, 1.03)
    for axes in grid:
        axes.set_xlabel(NOISE_LEVEL, fontsize=LABEL)
        plain_axes(axes)
    legend_below(figure, grid[0])
    return figure


def metaqueries(
    pictures: Sequence[np.ndarray], cosines: Sequence[np.ndarray], levels: Sequence[float]
) -> Figure:
    """Cosine of prediction and target at each metaquery. cosines: [level] of [images + 1, g, g],
    the mean over all images last; a row for each shown image, a column for each noise level."""
    rows = len(pictures) + 1
    figure = figure_of(1.5 * (len(levels) + 1) + 1.2, 1.6 * rows + 0.4)
    grid = grid_of(figure, rows, len(levels) + 1)
    low = min(-0.0, min(float(values.min()) for values in cosines))
    image: Any = None
    for row in range(rows):
        first = grid[row][0]
        if row < len(pictures):
            _show(first, pictures[row])
        else:
            first.set_axis_off()
            first.text(0.5, 0.5, "mean of\nall images", ha="center", va="center", fontsize=LABEL)
        for column, values in enumerate(cosines, start=1):
            axes = grid[row][column]
            axes.set_xticks([])
            axes.set_yticks([])
            image = axes.imshow(values[row], vmin=low, vmax=1, cmap="cividis")
            if values.shape[-1] <= 4:
                _write_cells(axes, values[row], low)
    for column, level in enumerate(levels, start=1):
        grid[0][column].set_title(f"t = {level:g}", fontsize=LABEL, color=INK)
    bar = figure.colorbar(image, ax=grid[:, -1], shrink=0.8)
    bar.set_label("cosine of prediction and target", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    return figure


def _write_cells(axes: Any, values: np.ndarray, low: float) -> None:
    for row, across in enumerate(values):
        for column, value in enumerate(across):
            dark = (value - low) / (1 - low) < 0.5
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip


def gradients(models: dict[str, Any], levels: Sequence[float]) -> Figure:
    """Of all trained weights: norms, shares of the update, and cosines between losses, over the
    noise level; a row for each model."""
    figure = figure_of(12.5, 0.8 + 2.5 * len(models))
    grid = grid_of(figure, len(models), 3, sharex=True, sharey="col")
    losses: list[str] = []
    for found in models.values():
        for report in found.values():
            losses += [name for name in report["losses"] if name not in losses]
    pairs = ["_".join(pair) for pair in combinations(losses, 2)]
    for (norm, share, cosine), (model, found) in zip(grid, models.items(), strict=True):
        reports = [found[f"{level:g}"]["weights"].get("all", {}) for level in levels]
        for number, name in enumerate(losses):
            for axes, key in ((norm, "norm"), (share, "share")):
                values = numbers([report.get(key, {}).get(name) for report in reports])
                axes.plot(levels, values, label=name, **line(number))
        for number, pair in enumerate(pairs):
            values = numbers([report.get("cosine", {}).get(pair) for report in reports])
            cosine.plot(levels, values, label=pair.replace("_", " and "), **line(number + 3))
        norm.set_yscale("log")
        norm.set_ylabel(f"{model}\ngradient norm", fontsize=LABEL)
        share.set_ylabel("share of the update", fontsize=LABEL)
        cosine.set_ylabel("cosine", fontsize=LABEL)
        for axes in (share, cosine):
            axes.axhline(0, color=FAINT, linewidth=0.8)
        cosine.set_ylim(-1.05, 1.05)
        for axes in (norm, share, cosine):
            plain_axes(axes)
    for axes in grid[-1]:
        axes.set_xlabel(NOISE_LEVEL, fontsize=LABEL)
    for axes in (grid[0][0], grid[0][2]):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=TICK, frameon=False)
    return figure


def _cosines(of_levels: Sequence[dict[str, Any]], part: str, pair: str) -> list[float | None]:
    """Cosine of a pair of losses at one part of the model, at each noise level."""
    return [parts.get(part, {}).get("cosine", {}).get(pair) for parts in of_levels]


def gradient_layers(models: dict[str, Any], levels: Sequence[float]) -> Figure | None:
    """Cosine of the gradients of two losses, a panel for each model and pair, parts of the model
    against noise level; None where no model has two losses."""
    panels: list[tuple[str, str]] = []
    for model, found in models.items():
        panels += [(model, pair) for pair in _pairs(found)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    parts = _parts(models)
    figure = figure_of(4.6 * columns, (0.32 * len(parts) + 1.5) * rows)
    grid = grid_of(figure, rows, columns)
    colours = LinearSegmentedColormap.from_list("diverging", DIVERGING, bad="#dddddd")
    image: Any = None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (model, pair) in zip(grid.flat, panels, strict=False):
        of_levels = [models[model][f"{level:g}"]["weights"] for level in levels]
        cosines = [_cosines(of_levels, part, pair) for part in parts]
        values = np.array([numbers(of_part) for of_part in cosines])
        axes.set_axis_on()
        image = axes.imshow(values, vmin=-1, vmax=1, cmap=colours, aspect="auto")
        axes.set_title(f"{model}: {pair.replace('_', ' and ')}", fontsize=LABEL, color=INK)
        axes.set_yticks(range(len(parts)), parts, fontsize=TICK)
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], fontsize=TICK)
        axes.set_xlabel(NOISE_LEVEL, fontsize=LABEL)
        for row, column in np.ndindex(*values.shape):
            if not np.isnan(values[row, column]):
                axes.text(
                    column, row, f"{values[row, column]:.2f}", ha="center", va="center",
                    fontsize=8,
                )  # fmt: skip
    bar = figure.colorbar(image, ax=grid, shrink=0.8)
    bar.set_label("cosine of the gradients (grey: one is 0)", fontsize=LABEL)
    return figure


def _pairs(found: dict[str, Any]) -> list[str]:
    pairs: list[str] = []
    for report in found.values():
        cosines = report["weights"].get("all", {}).get("cosine", {})
        pairs += [pair for pair in cosines if pair not in pairs]
    return pairs


def _parts(models: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for found in models.values():
        for report in found.values():
            parts += [part for part in report["weights"] if part not in parts]
    return parts


def diagnosis(
    models: dict[str, Any], pictures: dict[str, dict[str, list[tuple[np.ndarray, str, str]]]]
) -> Figure:
    """The table of four cells of each model with pictures of each. pictures: {model: {cell:
    [(picture, prompt, caption)]}}."""
    cells = chain.from_iterable(of_model.values() for of_model in pictures.values())
    shown = max(map(len, cells), default=0)
    columns = 2 * max(1, shown)
    figure = figure_of(2.05 * columns + 0.6, 5.4 * len(models) + 0.2)
    for part, (model, found) in zip(
        figure.subfigures(len(models), 1, squeeze=False)[:, 0], models.items(), strict=True
    ):
        judged = max(1, found["judged"])
        part.suptitle(
            f"{model}: {found['judged']} pictures judged", fontsize=TITLE, fontweight="bold"
        )
        grid = grid_of(part, 2, columns)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, cell in enumerate(CELLS):
            name = ", ".join(cell)
            row, left = number // 2, (number % 2) * (columns // 2)
            count = found["cells"][name]
            title = f"{name}: {count} ({100 * count / judged:.0f} %)"
            grid[row][left].set_title(title, fontsize=LABEL, loc="left", color=INK, pad=8)
            for place, (picture, prompt, text) in enumerate(pictures[model][name]):
                axes = grid[row][left + place]
                _show(axes, picture)
                axes.set_xlabel(
                    f"{_wrapped('asked: ' + prompt)}\n{_wrapped('read: ' + text)}",
                    fontsize=8, loc="left",
                )  # fmt: skip
    return figure


def _wrapped(text: str, width: int = 27, most: int = 3) -> str:
    lines = textwrap.wrap(text, width) or [""]
    return "\n".join(
        lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    )
