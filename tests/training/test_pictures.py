"""Curves of the losses, and the grid of samples."""

import matplotlib
import numpy as np
import pytest
from metric_runs import run
from PIL import Image, ImageChops

from uno_ds.training.metrics import LOSSES
from uno_ds.training.pictures import plot_curves, sample_grid


def inks(path) -> set[tuple[int, int, int]]:
    return {color for _, color in Image.open(path).convert("RGB").getcolors(1 << 24)}


def test_curves_draw_one_panel_per_loss_of_the_run_and_leave_matplotlib_alone(tmp_path):
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    noise = np.random.default_rng(0)

    def values(step):
        return {name: float(2 / step + 0.1 * noise.random()) for name in LOSSES[:4]}

    plot_curves(
        run(tmp_path / "three", range(1, 61), total=60, values=values), tmp_path / "three.png"
    )
    plot_curves(run(tmp_path / "flow", range(1, 61), total=60), tmp_path / "flow.png")
    colors = {
        "loss": (34, 34, 34),
        "flow": (33, 102, 172),
        "caption": (179, 88, 6),
        "regression": (27, 120, 55),
        "answer": (118, 42, 131),
    }
    assert inks(tmp_path / "three.png") >= {
        colors[name] for name in ("loss", "flow", "caption", "regression")
    }
    assert colors["answer"] not in inks(tmp_path / "three.png")
    assert colors["flow"] in inks(tmp_path / "flow.png") and colors["caption"] not in inks(
        tmp_path / "flow.png"
    )
    assert Image.open(tmp_path / "flow.png").width < Image.open(tmp_path / "three.png").width
    assert (
        dict(matplotlib.rcParams) == settings
        and matplotlib.get_backend(auto_select=False) == backend
    )


def solid(color, size=(24, 24)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_grid_puts_every_image_in_its_row_and_column(tmp_path):
    base, trained = [(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(90, 0, 0), (0, 90, 0), (0, 0, 90)]
    rows = [
        ("base", [solid(color) for color in base]),
        ("after UNO", [solid(color) for color in trained]),
    ]
    sample_grid(rows, ["one", "two", "three"], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))

    def center(color):
        rows, columns = np.nonzero((pixels == color).all(-1))
        assert len(rows) == 192 * 192, "a square image fills its cell"
        return rows.mean(), columns.mean()

    first, second = [center(color) for color in base], [center(color) for color in trained]
    assert (
        len({y for y, _ in first}) == len({y for y, _ in second}) == 1
        and first[0][0] < second[0][0]
    )
    assert [x for _, x in first] == [x for _, x in second] == sorted(x for _, x in first)


def test_grid_keeps_aspect_ratios_and_starts_a_new_block_after_the_last_column(tmp_path):
    sample_grid(
        [("row", [solid((200, 0, 0), (40, 20)), None, solid((0, 0, 200))])],
        ["a", "b", "c"],
        tmp_path / "grid.png",
        columns=2,
    )
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    wide, below = (
        np.argwhere((pixels == (200, 0, 0)).all(-1)),
        np.argwhere((pixels == (0, 0, 200)).all(-1)),
    )
    assert tuple(np.ptp(wide, axis=0) + 1) == (96, 192)
    assert below[:, 0].min() > wide[:, 0].max() and below[:, 1].min() == wide[:, 1].min()


def test_grid_wraps_long_prompts_inside_their_column(tmp_path):
    long = "an extraordinarily long prompt of many words about a red circle " + "w" * 60
    for name, prompt in (("short", "circle"), ("long", long)):
        sample_grid(
            [("base", [solid((250, 250, 250))] * 2)], [prompt, ""], tmp_path / f"{name}.png"
        )
    short, tall = Image.open(tmp_path / "short.png"), Image.open(tmp_path / "long.png")
    assert tall.width == short.width and tall.height >= short.height + 60
    box = (
        ImageChops.difference(tall, Image.new("RGB", tall.size, (255, 255, 255)))
        .crop((0, 24 + 192 + 8, *tall.size))
        .getbbox()
    )
    assert box[2] <= tall.width - 24 - 192 - 12, (
        "the text of the first column stays out of the second"
    )


def test_grid_refuses_a_row_that_lacks_an_image(tmp_path):
    with pytest.raises(AssertionError, match="1 images for 2 prompts"):
        sample_grid([("base", [solid((0, 0, 0))])], ["a", "b"], tmp_path / "grid.png")
