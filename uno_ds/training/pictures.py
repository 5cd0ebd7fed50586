"""Draws the loss curves of a run and grids of samples."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from uno_ds.training.metrics import LOSSES, MORE_LOSSES, read_metrics
from uno_ds.training.report import TITLES

COLORS = {
    "loss": "#222222",
    "loss_flow": "#2166ac",
    "loss_caption": "#b35806",
    "loss_regression": "#1b7837",
    "loss_answer": "#762a83",
    "loss_contrast": "#4d9fb5",
    "loss_negative": "#9c2f4b",
}
INK, FAINT, PAPER = (34, 34, 34), (210, 210, 210), (255, 255, 255)


def plot_curves(metrics_jsonl: Path | str, png: Path | str) -> None:
    """Draws every loss of a run over its steps, each in its own panel: the values in a light
    colour, their running mean in a dark one."""
    rows = read_metrics(metrics_jsonl)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in (*LOSSES, *MORE_LOSSES):
        for row in rows:
            step, value = row["step"], row.get(name)
            if step is not None and value is not None:
                curves.setdefault(name, []).append((step, value))
    if len(curves) == 2:
        # The only loss with a weight equals the total up to a factor.
        curves.pop("loss", None)
    columns = 1 if len(curves) == 1 else 2
    lines = max(1, math.ceil(len(curves) / columns))
    figure = Figure(
        figsize=(5.6 * columns, 3.1 * lines),
        dpi=120,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    FigureCanvasAgg(figure)
    for index, (name, points) in enumerate(curves.items()):
        _draw_curve(figure.add_subplot(lines, columns, index + 1), name, points)
    if not curves:
        figure.text(
            0.5, 0.5, "no step was recorded", ha="center", va="center", fontsize=12, color="#666666"
        )
    figure.savefig(png)


def _draw_curve(axes: Axes, name: str, points: list[tuple[float, float]]) -> None:
    """points: (step, value of the loss). The title holds the means of the first and the last tenth
    of the values."""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    smooth = _smooth(values, span=max(2, len(values) // 15))
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=COLORS[name], alpha=0.22, linewidth=1)
    axes.plot(steps, smooth, color=COLORS[name], linewidth=2, marker=marker)
    axes.set_ylim(_limits(values, smooth))
    tenth = max(1, len(values) // 10)
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    title = f"{TITLES[name]}   {first:.4g} → {last:.4g}"
    axes.set_title(title, fontsize=11, loc="left", color="#222222")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=9, length=3)
    axes.grid(color="#000000", alpha=0.08)
    axes.spines[["top", "right"]].set_visible(False)


def sample_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    prompts: Sequence[str],
    path: Path | str,
    *,
    cell: int = 192,
    columns: int = 8,
) -> None:
    """Draws labelled rows of images above their prompts, one column per prompt, in blocks of at
    most `columns` columns.

    Images keep their aspect ratio inside a square of `cell` pixels; a missing one (None) is an
    empty frame."""
    for label, images in rows:
        assert len(images) == len(prompts), (
            f"row '{label}' has {len(images)} images for {len(prompts)} prompts"
        )
    gap, margin = 12, 24
    text_font, label_font = _font(15), _font(16, bold=True)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [_wrap(ruler, label, label_font, 130) for label, _ in rows]
    widths = [ruler.textlength(line, label_font) for line in itertools.chain(*labels)]
    label_width = max(widths, default=0)
    left = margin + (math.ceil(label_width) + 16 if label_width else 0)
    columns = min(columns, len(prompts)) or 1
    blocks = [
        range(start, min(start + columns, len(prompts)))
        for start in range(0, len(prompts), columns)
    ]
    wrapped = [_wrap(ruler, prompt, text_font, cell) for prompt in prompts]
    text_heights = []
    for block in blocks:
        most_lines = max(len(wrapped[index]) for index in block)
        text_heights.append(8 + 20 * most_lines)
    image_height = len(rows) * (cell + gap) - gap
    block_gap = 28
    width = left + columns * (cell + gap) - gap + margin
    height = 2 * margin + sum(image_height + text_height for text_height in text_heights)
    height += block_gap * max(0, len(blocks) - 1)
    page = Image.new("RGB", (width, max(height, 2 * margin)), PAPER)
    draw = ImageDraw.Draw(page)
    top = margin
    for block, text_height in zip(blocks, text_heights, strict=True):
        for line, (_, images) in enumerate(rows):
            y = top + line * (cell + gap)
            first = y + cell / 2 - 11 * len(labels[line])
            for number, text in enumerate(labels[line]):
                draw.text((margin, first + 22 * number), text, INK, label_font)
            for column, index in enumerate(block):
                _place(page, draw, images[index], left + column * (cell + gap), y, cell)
        for column, index in enumerate(block):
            x = left + column * (cell + gap)
            for number, text in enumerate(wrapped[index]):
                draw.text((x, top + image_height + 8 + 20 * number), text, INK, text_font)
        top += image_height + text_height + block_gap
    page.save(path)


def _place(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Image.Image | None,
    x: int,
    y: int,
    cell: int,
) -> None:
    """Draws the image, centred in its frame. x, y: the frame's top left corner."""
    if image is not None:
        scale = cell / max(image.size)
        width = max(1, round(image.width * scale))
        height = max(1, round(image.height * scale))
        resampling = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
        scaled = image.convert("RGB").resize((width, height), resampling)
        page.paste(scaled, (x + (cell - width) // 2, y + (cell - height) // 2))
    draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=FAINT)


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 6
) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, or inside a word that is longer than a
    line."""
    lines, current = [], ""
    for word in text.split():
        joined = f"{current} {word}".strip()
        if draw.textlength(joined, font) <= width:
            current = joined
            continue
        if current:
            lines.append(current)
        while draw.textlength(word, font) > width:
            cut = next(
                size
                for size in range(len(word) - 1, 0, -1)
                if size == 1 or draw.textlength(word[:size], font) <= width
            )
            lines.append(word[:cut])
            word = word[cut:]
        current = word
    lines += [current] if current else []
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1].rstrip() + "…"]
    return lines


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib ships the font, so that pictures look the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """Centred running mean over `span` values, applied twice; over fewer values at the ends."""
    half, count = span // 2, len(values)
    for _ in range(2):
        sums = [0.0, *itertools.accumulate(values)]
        windows = [(max(0, index - half), min(count, index + half + 1)) for index in range(count)]
        values = [(sums[end] - sums[start]) / (end - start) for start, end in windows]
    return list(values)


def _limits(values: Sequence[float], smooth: Sequence[float]) -> tuple[float, float]:
    """Limits of the y axis: the smooth curve, and the values without the lowest and the highest
    hundredth."""
    ordered = sorted(values)
    low = min(min(smooth), ordered[len(ordered) // 100])
    high = max(max(smooth), ordered[-1 - len(ordered) // 100])
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
