"""What a run writes survives a disk that fills up and a folder that goes away."""

import errno
import io
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uno_ds.commands.train import main
from uno_ds.files_on_disk import replace_text
from uno_ds.training.logging_settings import LoggingSettings
from uno_ds.training.metrics import Metrics, read_metrics
from uno_ds.training.run_files import AppendFile, print_line


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """largest_file(bytes): no file may grow beyond that, which a writer meets as it meets a full
    disk: some bytes are taken, then none is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_is_kept_and_written_later_to_the_byte(
    tmp_path: Path, largest_file: Callable[[int], None]
):
    warnings: list[str] = []
    file = AppendFile(tmp_path / "lines", warnings.append)
    file.write(b"one\n")
    largest_file(6)
    file.write(b"two\n")
    file.write(b"three\n")
    assert file.path.read_bytes() == b"one\ntw" and not file.complete
    assert len(warnings) == 1 and "lines cannot be written: File too large" in warnings[0]
    largest_file(1000)
    file.write(b"four\n")
    assert file.path.read_bytes() == b"one\ntwo\nthree\nfour\n" and file.complete
    # The next time is a new one.
    largest_file(20)
    file.write(b"five\n")
    assert len(warnings) == 2
    file.close()
    assert not file.complete


def test_a_deleted_file_is_written_again_from_its_start(tmp_path: Path):
    warnings: list[str] = []
    file = AppendFile(tmp_path / "lines", warnings.append)
    file.write(b"one\n")
    shutil.rmtree(tmp_path)
    file.write(b"two\n")
    file.write(b"three\n")
    assert file.path.read_bytes() == b"one\ntwo\nthree\n"
    assert len(warnings) == 1 and "was deleted during the run" in warnings[0]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_metrics_go_on_over_a_full_disk_and_every_line_is_there_in_the_end(
    tmp_path: Path, largest_file: Callable[[int], None], capsys, tensorboard: bool
):
    settings = LoggingSettings(every=1, progress="lines", tensorboard=tensorboard)
    metrics = Metrics(tmp_path, settings, 0, 9)
    for step in range(1, 9):
        if step == 3:
            largest_file(400)
        if step == 7:
            largest_file(1 << 20)
        metrics.record(step, {"loss": 0.5, "step_seconds": 0.1})
    metrics.close()
    assert metrics.complete
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    printed = capsys.readouterr()
    assert printed.out.count("WARNING: ") == 1 + tensorboard and "Traceback" not in printed.err
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        assert [event.step for event in board.Scalars("loss/loss")] == list(range(1, 9))


def test_lines_that_never_found_room_are_reported(tmp_path: Path, largest_file, capsys):
    metrics = Metrics(tmp_path, LoggingSettings(every=1, tensorboard=False), 0, 9)
    largest_file(10)
    metrics.record(1, {"loss": 0.5})
    metrics.close()
    metrics.close()
    assert not metrics.complete and capsys.readouterr().out.count("WARNING: ") == 1


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, largest_file):
    path = tmp_path / "summary.json"
    replace_text(path, "old")
    largest_file(10)
    with pytest.raises(OSError, match="File too large"):
        replace_text(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    log = Full()
    monkeypatch.setattr("sys.stdout", log)
    print_line("a line")
    assert log.getvalue() == "a line\n"


@pytest.mark.parametrize(
    "mistake", [["--recipe", "tiny", "--set", "steps=0"], ["--recipe", "tiny", "--no-such-flag"]]
)
def test_a_refusal_is_reported_to_the_script_that_started_the_run(
    tmp_path: Path, capsys, mistake: list[str]
):
    reported = tmp_path / "exit"
    assert main([*mistake, "--exit-file", str(reported)]) == 2
    (line,) = reported.read_text().splitlines()
    error = capsys.readouterr().err.strip().removeprefix("error: ")
    assert line == f"2 refused: {error}"
