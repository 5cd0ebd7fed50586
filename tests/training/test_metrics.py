"""What a run tells: metrics.jsonl and its readers, progress, summary, curves, sample grid."""

import io
import json
import math
import shutil
import subprocess
import sys
import types

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import uno_ds
from uno_ds.settings import SettingsError, build
from uno_ds.training import metrics as metrics_module
from uno_ds.training.finish import after_training
from uno_ds.training.metrics import (
    FIELDS,
    LOSSES,
    LoggingSettings,
    Metrics,
    clock,
    duration,
    read_metrics,
)
from uno_ds.training.pictures import plot_curves, sample_grid
from uno_ds.training.report import environment, summarise, write_summary

QUIET = {"tensorboard": False, "progress": "lines"}


def values_at(step: int) -> dict:
    return {
        "loss": torch.tensor(1 / step),
        "loss_flow": torch.tensor(2.0 / step),
        "loss_caption": None,
        "grad_norm": torch.tensor(0.5, dtype=torch.float64),
        "lr": 1e-3,
        "tokens": torch.tensor(100),
        "step_seconds": 0.25,
        "memory_bytes": 7,
        "skipped": 0,
    }


def run(folder, steps, *, every=3, start=0, total=20, values=values_at, **settings):
    with Metrics(
        folder, LoggingSettings(every=every, **{**QUIET, **settings}), 0, total, start_step=start
    ) as metrics:
        for step in steps:
            metrics.record(step, values(step))
    return folder / "metrics.jsonl"


def strict(line: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_line_has_exactly_the_documented_fields_in_their_order(tmp_path):
    lines = run(tmp_path, range(1, 8)).read_text().splitlines()
    assert [list(strict(line)) for line in lines] == [list(FIELDS)] * 7
    assert FIELDS == (
        "step",
        "loss",
        "loss_flow",
        "loss_caption",
        "loss_regression",
        "loss_answer",
        "grad_norm",
        "lr",
        "tokens",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "skipped",
    )
    row = strict(lines[3])
    assert row["step"] == 4 and row["loss"] == 0.25 and row["grad_norm"] == 0.5
    assert (
        row["tokens"] == 100 and isinstance(row["tokens"], int) and row["tokens_per_second"] == 400
    )


def test_what_is_absent_or_not_finite_is_null_and_the_line_stays_valid_json(tmp_path):
    odd = {
        "loss": torch.tensor(float("nan")),
        "loss_flow": torch.tensor(float("inf")),
        "loss_caption": None,
        "grad_norm": float("-inf"),
        "tokens": 0,
        "step_seconds": 0.0,
    }
    row = strict(run(tmp_path, [1], values=lambda step: odd).read_text())
    assert {name for name, value in row.items() if value is None} == set(FIELDS) - {
        "step",
        "tokens",
        "step_seconds",
    }


def test_recorded_tensors_may_be_overwritten_by_the_caller(tmp_path):
    buffer = torch.zeros(())
    with Metrics(tmp_path, LoggingSettings(every=5, **QUIET), 0, 20) as metrics:
        for step in range(1, 6):
            metrics.record(step, {"loss": buffer.fill_(step)})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_recording_reads_no_tensor_until_the_flush(tmp_path, monkeypatch):
    reads = []

    def spy_on(name):
        original = getattr(torch.Tensor, name)

        def spy(self, *rest):
            reads.append(name)
            return original(self, *rest)

        return spy

    with Metrics(tmp_path, LoggingSettings(every=4, **QUIET), 0, 20) as metrics:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, spy_on(name))
        for step in range(1, 4):
            metrics.record(step, values_at(step))
        assert reads == [] and not (tmp_path / "metrics.jsonl").read_text()
        metrics.record(4, values_at(4))
        assert reads == ["tolist"], "four steps must come over in one transfer"
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_last_steps_are_written_by_close_and_at_the_end_of_the_run(tmp_path):
    assert len(read_metrics(run(tmp_path / "interrupted", range(1, 6)))) == 5
    metrics = Metrics(tmp_path / "complete", LoggingSettings(every=100, **QUIET), 0, 4)
    for step in range(1, 5):
        metrics.record(step, values_at(step))
    assert len(read_metrics(tmp_path / "complete/metrics.jsonl")) == 4
    metrics.close()
    metrics.close()


def test_resuming_removes_later_steps_and_a_torn_line(tmp_path):
    path = run(tmp_path, range(1, 11))
    before = path.read_text().splitlines()
    path.write_text("\n".join(before) + '\n{"step": 11, "lo')
    run(tmp_path, range(8, 13), start=7)
    after = path.read_text().splitlines()
    assert [strict(line)["step"] for line in after] == list(range(1, 13))
    assert after[:7] == before[:7]


def test_fresh_run_into_an_old_folder_starts_an_empty_file(tmp_path):
    run(tmp_path, range(1, 11))
    assert [row["step"] for row in read_metrics(run(tmp_path, range(1, 3)))] == [1, 2]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with Metrics(tmp_path / "rank1", LoggingSettings(every=1, progress="lines"), 1, 5) as metrics:
        metrics.record(1, values_at(1))
        metrics.note("hidden")
    assert not (tmp_path / "rank1").exists() and capsys.readouterr().out == ""


def test_a_name_that_is_no_metric_is_refused(tmp_path):
    with (
        Metrics(tmp_path, LoggingSettings(**QUIET), 0, 5) as metrics,
        pytest.raises(AssertionError, match="los_flow"),
    ):
        metrics.record(1, {"los_flow": 1.0})


def test_plain_lines_come_once_per_flush_with_losses_speed_and_time_left(tmp_path, capsys):
    run(tmp_path, range(1, 21), every=10, total=300, progress="auto")
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("300 steps at ")]
    assert len(lines) == 2 and len(printed) == 3
    assert lines[1].startswith("step 20/300  loss ") and lines[1].endswith(
        "  tokens/s 400  left 1:10"
    )
    assert "flow" in lines[1] and "caption" not in lines[1], (
        "a loss that the run does not have is not shown"
    )


def test_bar_counts_on_from_the_resumed_step_and_shows_losses(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    run(tmp_path, range(8, 13), start=7, every=5, progress="auto")
    text = stream.getvalue()
    assert "7/20" in text and "12/20" in text and "tokens/s=400" in text and "flow=" in text


def test_time_is_shown_as_minutes_or_hours():
    assert [clock(seconds) for seconds in (0, 59.6, 130, 3600, 36061, -3)] == [
        "0:00",
        "1:00",
        "2:10",
        "1:00:00",
        "10:01:01",
        "0:00",
    ]


def test_tensorboard_scalars_equal_the_lines_and_a_resumed_run_replaces_its_own(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 6), tensorboard=True)
    run(
        tmp_path,
        range(4, 7),
        start=3,
        tensorboard=True,
        values=lambda step: {**values_at(step), "loss_flow": 50.0 + step},
    )
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert "loss/caption" not in board.Tags()["scalars"] and "train/lr" in board.Tags()["scalars"]
    assert {event.step: event.value for event in board.Scalars("loss/flow")} == {
        1: 2,
        2: 1,
        3: pytest.approx(2 / 3),
        4: 54,
        5: 55,
        6: 56,
    }
    assert len(board.Scalars("loss/flow")) == 6


def test_wandb_without_the_package_is_an_error_that_names_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"^logging\.wandb: .*not installed"):
        build(LoggingSettings, {"wandb": True}, "logging")


def test_a_folder_called_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    if "site-packages" in str(
        getattr(metrics_module.importlib.util.find_spec("wandb"), "origin", "")
    ):
        pytest.skip("the real package is installed")
    assert not metrics_module._installed("wandb")


def test_wandb_gets_every_step_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    calls = []
    logged = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    fake = types.SimpleNamespace(
        init=lambda **options: (calls.append(options["id"]), logged)[1],
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(calls)}"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics_module, "_installed", lambda name: True)
    run(tmp_path, range(1, 4), wandb=True)
    run(tmp_path, range(3, 5), start=2, wandb=True)
    assert [call if isinstance(call, str) else call[0] for call in calls] == [
        "id0",
        1,
        2,
        3,
        "finish",
        "id0",
        3,
        4,
        "finish",
    ]
    assert calls[1][1]["loss/flow"] == 2.0 and "loss/caption" not in calls[1][1]


def test_first_and_last_losses_are_means_over_a_tenth_of_the_steps(tmp_path):
    def values(step):
        return {"loss": float(step), "loss_flow": math.nan if step == 2 else float(step)}

    losses = summarise(run(tmp_path, range(1, 41), total=40, values=values))["losses"]
    assert losses["averaged_steps"] == 4
    assert losses["first"] == {
        "loss": 2.5,
        "loss_flow": pytest.approx(8 / 3),
        **dict.fromkeys(LOSSES[2:]),
    }
    assert losses["last"]["loss"] == 38.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_shortest_runs_have_a_summary_and_curves(tmp_path, steps):
    path = run(tmp_path, range(1, steps + 1), total=3)
    summary = summarise(path)
    assert summary["steps"] == steps and summary["losses"]["averaged_steps"] == min(steps, 1)
    assert summary["losses"]["first"]["loss"] == (1.0 if steps else None)
    plot_curves(path, tmp_path / "curves.png")
    write_summary(tmp_path, complete(summary))


def complete(summary: dict, **changes) -> dict:
    return {
        **environment(),
        **summary,
        "parameters": {"trainable": 1234567, "frozen": 89},
        "checksums": {"frozen_start": "ab12", "frozen_end": "ab12"},
        "skipped_samples": {"undecodable image": 3, "no caption": 12},
        "exit": "completed",
        **changes,
    }


def test_summary_holds_what_was_asked_for_in_json_and_in_words(tmp_path):
    path = run(
        tmp_path,
        range(1, 21),
        values=lambda step: {**values_at(step), "skipped": 2 if step > 9 else 0},
    )
    (tmp_path / "curves.png").touch()
    write_summary(tmp_path, complete(summarise(path), scores={"right": math.nan}))
    summary, text = (
        strict((tmp_path / "summary.json").read_text()),
        (tmp_path / "summary.md").read_text(),
    )
    assert {"python", "torch", "deepspeed", "transformers"} <= set(summary["versions"])
    assert (
        summary["hardware"]["cores"] >= 1
        and summary["hardware"]["memory_bytes"] > 1 << 28
        and summary["hardware"]["cpu"]
    )
    assert summary["speed"] == {
        "step_seconds": 0.25,
        "tokens_per_second": 400,
        "mfu": None,
        "total_step_seconds": 5,
    }
    assert summary["skipped_steps"] == 2 and summary["scores"] == {"right": None}
    for piece in (
        "completed",
        "flow matching | 1.5000 | 0.1026 | -93.2 %",
        "1,234,567",
        "no caption: 12",
        "unchanged (checksum ab12)",
        "400",
        f"torch {torch.__version__}",
        "![curves](curves.png)",
    ):
        assert piece in text
    assert "captioning" not in text and "samples.png" not in text


def test_changed_frozen_weights_stand_out(tmp_path):
    summary = summarise(run(tmp_path, [1]))
    write_summary(
        tmp_path, complete(summary, checksums={"frozen_start": "ab12", "frozen_end": "cd34"})
    )
    assert (
        "**CHANGED** (checksum ab12 at the start, cd34 at the end)"
        in (tmp_path / "summary.md").read_text()
    )


def test_incomplete_summary_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="checksums"):
        write_summary(
            tmp_path,
            {
                key: value
                for key, value in complete(summarise(run(tmp_path, [1]))).items()
                if key != "checksums"
            },
        )


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    inner = tmp_path / "site-packages"
    inner.mkdir()
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    for folder, known in ((tmp_path, True), (inner, False)):
        monkeypatch.setattr(uno_ds, "__file__", str(folder / "uno_ds/__init__.py"))
        assert (environment()["commit"] is not None) == known


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


def tell(folder, capsys, seconds, *, start=0, total=350, progress="lines", rank=0):
    """What is printed while steps of these seconds are recorded: (standard output, standard
    error)."""
    capsys.readouterr()
    settings = LoggingSettings(every=100, tensorboard=False, progress=progress)
    with Metrics(
        folder, settings, rank, total, start_step=start, after_training="pictures"
    ) as metrics:
        for number, one in enumerate(seconds, start=start + 1):
            metrics.record(number, {"step_seconds": one})
    return capsys.readouterr()


@pytest.mark.parametrize("progress", ["lines", "bar"])
def test_the_first_steps_tell_once_how_long_a_run_will_take(tmp_path, capsys, progress):
    """The two first steps are slow, and one that waited for a disk is no measure either: 2 * 3 + 5
    * 0.4 + 0.6 + 343 * 0.4."""
    seconds = [3, 3, 0.4, 0.4, 1.0, 0.4, 0.4, 9, 9]
    out, err = tell(tmp_path / "new", capsys, seconds, progress=progress)
    line = "350 steps at 0.4 s: about 2 min 30 s of training, then pictures\n"
    assert out.count(line) == 1 and out.count("about") == 1
    assert ("about 2 min 30 s" in err) == (progress == "bar")
    # A run that goes on has only its own steps before it.
    out, _ = tell(tmp_path / "resumed", capsys, seconds, start=250, progress=progress)
    assert "100 steps at 0.4 s: about 46 s of training, then pictures\n" in out


def test_nothing_is_foretold_by_other_ranks_in_few_steps_or_when_all_are_done(tmp_path, capsys):
    assert tell(tmp_path / "rank1", capsys, [0.4] * 9, rank=1).out == ""
    assert "about" not in tell(tmp_path / "few", capsys, [0.4] * 6).out
    assert "about" not in tell(tmp_path / "done", capsys, [0.4] * 7, total=7).out


def test_durations_are_in_two_units():
    told = {0.2: "1 s", 59.4: "59 s", 144: "2 min 20 s", 3599: "60 min", 11400: "3 h 10 min"}
    told |= {7200: "2 h", 187200: "2 days 4 h"}
    assert {seconds: duration(seconds) for seconds in told} == told


@pytest.mark.parametrize(
    ("export", "prompts", "words"),
    [
        (True, ["a cup"], "the last checkpoint, the export of the model and pictures"),
        (True, [], "the last checkpoint and the export of the model"),
        (False, ["a cup"], "the last checkpoint"),
    ],
)
def test_what_follows_the_last_step_is_described(export, prompts, words):
    recipe = types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(export=export),
        samples=types.SimpleNamespace(prompts=prompts),
    )
    assert after_training(recipe) == words
