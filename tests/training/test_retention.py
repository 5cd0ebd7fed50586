"""Which checkpoints a run keeps: never is one removed that may be the last before a damage."""

import math
from pathlib import Path

import pytest

from uno_ds.settings import build
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import doubt_about, is_proven
from uno_ds.training.retention import Retention
from uno_ds.training.soundness import Soundness


class FakeRun:
    """Steps with given losses (None: skipped); a folder is a checkpoint. Checkpoints are written
    every `every` steps."""

    def __init__(self, folder: Path, every: int, keep_last: int, spike_factor: float = 0.0):
        self.folder, self.every, self.step, self.lines = folder, every, 0, []
        settings = build(CheckpointSettings, {"every": every, "keep_last": keep_last})
        self.retention = Retention(folder, settings, spike_factor, self.lines.append)

    def go(self, *losses: float | None) -> "FakeRun":
        for loss in losses:
            self.step += 1
            self.retention.observe(self.step, math.nan if loss is None else loss, loss is None)
            if self.step % self.every == 0:
                self.save()
        return self

    def save(self, step: int | None = None) -> None:
        path = self.folder / f"step_{step or self.step}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "manifest.json").write_text("{}")
        if self.retention.doubt is not None:
            (path / "doubt").write_text(self.retention.doubt)
        self.retention.saved(path)

    @property
    def there(self) -> set[int]:
        return {int(path.name.split("_")[1]) for path in self.folder.glob("step_*")}

    @property
    def proven(self) -> set[int]:
        return {step for step in self.there if is_proven(self.folder / f"step_{step}")}

    @property
    def doubted(self) -> set[int]:
        return {step for step in self.there if doubt_about(self.folder / f"step_{step}")}


@pytest.mark.parametrize("every", [1, 3, 12])
@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("bad", [[None], [9.1], [9.1, None, None, 50.0]])
def test_whatever_follows_a_ruinous_step_a_checkpoint_from_before_it_stays(
    tmp_path: Path, every: int, keep_last: int, bad: list
):
    for ruined in range(2 * every + 6, 3 * every + 7):
        folder = tmp_path / str(ruined)
        run = FakeRun(folder, every, keep_last)
        run.go(*[3.0] * ruined)
        assert len(run.there) <= max(keep_last, 2)
        run.go(*bad * 12)
        run.save()
        good = {step for step in run.proven if step < ruined}
        # A checkpoint of the ruined step itself or of a later one holds ruined weights.
        assert good and not run.proven - good
        assert {step for step in run.there if step >= ruined} <= run.doubted
        # The ones of the doubt replace each other, so that a doubt without end fills no disk.
        assert len(run.there) <= 2 * keep_last + 2


def test_a_save_in_the_background_that_ends_in_a_doubt_was_begun_before_it(tmp_path: Path):
    run = FakeRun(tmp_path, 100, 1).go(*[3.0] * 12, None)
    run.save(12)
    for _ in range(3):
        run.go(None)
        run.save()
    assert run.there == {12, 16} and run.doubted == {12, 16}


def test_a_step_that_is_skipped_alone_costs_nothing_once_sound_steps_have_followed(tmp_path: Path):
    run = FakeRun(tmp_path, 5, 2).go(*[3.0] * 12, None, 3.0, 3.0)
    assert run.doubted == {10, 15} and run.proven == {5} and run.there == {5, 10, 15}
    run.go(*[3.0] * 5)
    assert not run.doubted and run.proven == {15} and run.there == {15, 20}


def test_a_run_that_goes_on_keeps_the_proven_one_until_the_one_it_came_from_is_proven(
    tmp_path: Path,
):
    FakeRun(tmp_path, 5, 1).go(*[3.0] * 10)
    run = FakeRun(tmp_path, 5, 1)
    run.step = 10
    run.retention.resumed_after(10)
    run.go(3.0, 3.0)
    assert run.proven == {5} and run.there == {5, 10}
    run.go(3.0, 3.0, 3.0)
    assert run.proven == {10} and run.there == {10, 15}


def test_the_range_of_the_loss_is_that_of_the_last_sound_losses():
    soundness = Soundness(needed=2)
    # Fewer than five losses are no range; a loss that falls slowly stays in it.
    for step, loss in enumerate([50.0, 10.0, 100.0, 8.0, 7.0, 6.0, 5.0, 4.0], start=1):
        soundness.observe(step, loss, skipped=False)
        assert soundness.doubt is None
    soundness.observe(9, 22.6, skipped=False)
    assert "the loss of step 9, 22.6, was above 3 medians of the last 8" in soundness.doubt
    for step in (10, 11):
        assert soundness.doubt is not None and not soundness.proves(0)
        soundness.observe(step, 22.4, skipped=False)
    assert soundness.doubt is None and soundness.proves(9) and not soundness.proves(10)
    soundness.observe(12, math.inf, skipped=False)
    assert soundness.doubt == "the loss of step 12 was not finite"


def test_a_mark_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch):
    run = FakeRun(tmp_path, 5, 1).go(*[3.0] * 9)

    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    run.retention.observe(10, math.nan, skipped=True)
    assert "step_5 could not be marked: No space left on device" in run.lines[0]
