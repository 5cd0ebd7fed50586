"""Which checkpoints stay: the last ones, those kept for ever, and the newest one that sound steps
have followed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import (
    complete_checkpoints,
    is_proven,
    mark_doubt,
    mark_proven,
    step_of,
)
from uno_ds.training.soundness import MEDIANS, PROOF, Soundness


class Retention:
    """Judges the checkpoints of `folder` by the steps that follow them, marks and removes them. For
    one rank of a run.

    While the weights are in doubt, nothing from before is removed. spike_factor: that of the
    recipe; 0: the usual range."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        spike_factor: float,
        report: Callable[[str], None],
    ):
        self.folder, self.settings, self._report = folder, settings, report
        self._soundness = Soundness(min(PROOF, settings.every or PROOF), spike_factor or MEDIANS)
        self._unproven: list[Path] = []
        self._saved_in_doubt: list[Path] = []
        self._doubt_since = 0

    @property
    def doubt(self) -> str | None:
        """Why what is saved now is in doubt; None if it is not."""
        return self._soundness.doubt

    def resumed_after(self, step: int) -> None:
        """The run was resumed from the checkpoint of `step`, which its next steps may prove."""
        self._unproven = [self.folder / f"step_{step}"]

    def observe(self, step: int, loss: float, skipped: bool) -> None:
        in_doubt = self.doubt is not None
        self._soundness.observe(step, loss, skipped)
        if self.doubt is not None and not in_doubt:
            self._doubt_since = step
            self._doubt_unproven(self.doubt)
        proven = [path for path in self._unproven if self._soundness.proves(step_of(path))]
        if proven:
            self._unproven = [path for path in self._unproven if path not in proven]
            there = [path for path in proven if path.is_dir()]
            if there:
                self._mark(mark_proven, max(there, key=step_of), step)
                self._remove_superseded()

    def placed(self, checkpoint: Path) -> None:
        """A new checkpoint is complete; it may have been begun steps ago, in the background."""
        self._unproven.append(checkpoint)
        if self.doubt is not None and step_of(checkpoint) >= self._doubt_since:
            self._saved_in_doubt.append(checkpoint)
        self._remove_superseded()

    def _doubt_unproven(self, reason: str) -> None:
        """No sound steps have shown yet that these were written before the damage."""
        doubted = [path for path in self._unproven if path.is_dir() and not is_proven(path)]
        for path in doubted:
            self._mark(mark_doubt, path, reason)
        if doubted:
            names = ", ".join(path.name for path in doubted)
            self._report(f"warning: {reason}, so soon after {names} that its weights are in doubt.")

    def _mark(self, mark: Callable[[Path, Any], None], path: Path, what: Any) -> None:
        try:
            mark(path, what)
        except OSError as error:
            self._report(f"warning: {path} could not be marked: {error.strerror or error}.")

    def _remove_superseded(self) -> None:
        if self.doubt is not None:
            # What led here may be what is needed; only the saves of the doubt itself replace each
            # other.
            leaving = superseded(self._saved_in_doubt, self.settings, None)
        else:
            complete = complete_checkpoints(self.folder)
            proven = [path for path in complete if is_proven(path)]
            leaving = superseded(complete, self.settings, proven[-1] if proven else None)
            self._saved_in_doubt = []
        for old in leaving:
            _remove(old)
        self._saved_in_doubt = [path for path in self._saved_in_doubt if path not in leaving]


def superseded(
    complete: list[Path], settings: CheckpointSettings, proven: Path | None
) -> list[Path]:
    """Those of the complete checkpoints, oldest first, that are neither among the last, nor the
    newest `proven` one, nor kept for ever."""
    return [
        path
        for path in complete[: -settings.keep_last]
        if path != proven and (not settings.keep_every or step_of(path) % settings.keep_every)
    ]


def _remove(checkpoint: Path) -> None:
    """By way of another name, so that a removal that is cut off leaves nothing that looks complete.
    What resists is left to the next save."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)
