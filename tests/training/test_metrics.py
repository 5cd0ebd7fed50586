"""metrics.jsonl and its readers, and what a run prints while it goes on."""

import io
import sys
import types

import pytest
import torch
from metric_runs import QUIET, run, strict, values_at

from uno_ds.settings import SettingsError, build
from uno_ds.training import logging_settings
from uno_ds.training.durations import clock, duration
from uno_ds.training.logging_settings import LoggingSettings
from uno_ds.training.metrics import FIELDS, Metrics, read_metrics


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
    monkeypatch.setattr(logging_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"^logging\.wandb: .*not installed"):
        build(LoggingSettings, {"wandb": True}, "logging")


def test_a_folder_called_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    if "site-packages" in str(
        getattr(logging_settings.importlib.util.find_spec("wandb"), "origin", "")
    ):
        pytest.skip("the real package is installed")
    assert not logging_settings._installed("wandb")


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
    monkeypatch.setattr(logging_settings, "_installed", lambda name: True)
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
def test_the_first_steps_predict_once_how_long_a_run_will_take(tmp_path, capsys, progress):
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


def test_no_time_is_predicted_by_other_ranks_in_few_steps_or_when_all_are_done(tmp_path, capsys):
    assert tell(tmp_path / "rank1", capsys, [0.4] * 9, rank=1).out == ""
    assert "about" not in tell(tmp_path / "few", capsys, [0.4] * 6).out
    assert "about" not in tell(tmp_path / "done", capsys, [0.4] * 7, total=7).out


def test_durations_are_in_two_units():
    reported = {0.2: "1 s", 59.4: "59 s", 144: "2 min 20 s", 3599: "60 min", 11400: "3 h 10 min"}
    reported |= {7200: "2 h", 187200: "2 days 4 h"}
    assert {seconds: duration(seconds) for seconds in reported} == reported
