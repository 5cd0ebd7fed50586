"""Decides which checkpoints are kept: the last ones, those kept for ever, and the newest one that
sound steps have followed."""

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
from uno_ds.training.soundness import LIMIT_IN_MEDIANS, STEPS_THAT_PROVE, Soundness


class Retention:
    """Marks the checkpoints of `folder` as proven or in doubt, depending on the steps that follow
    them, and removes those that are not kept. Used by rank 0 only.

    While the weights are in doubt, no earlier checkpoint is removed. spike_factor: that of the
    recipe; 0: LIMIT_IN_MEDIANS."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        spike_factor: float,
        report: Callable[[str], None],
    ):
        self.folder, self.settings, self._report = folder, settings, report
        # Where checkpoints are written more often, fewer steps have to be enough.
        needed = min(STEPS_THAT_PROVE, settings.every or STEPS_THAT_PROVE)
        self._soundness = Soundness(needed, spike_factor or LIMIT_IN_MEDIANS)
        self._unproven: list[Path] = []
        self._saved_in_doubt: list[Path] = []
        self._doubt_since = 0
        self._removed: list[str] = []

    @property
    def doubt(self) -> str | None:
        """Why a checkpoint saved now is in doubt; None if it is not."""
        return self._soundness.doubt

    def resumed_after(self, step: int) -> None:
        """The run was resumed from the checkpoint of `step`, which its next steps may prove."""
        self._unproven = [self.folder / f"step_{step}"]

    def observe(self, step: int, loss: float, skipped: bool) -> None:
        """Called after each step."""
        was_in_doubt = self.doubt is not None
        self._soundness.observe(step, loss, skipped)
        if self.doubt is not None and not was_in_doubt:
            self._doubt_since = step
            self._mark_unproven_in_doubt(self.doubt)
        proven = [path for path in self._unproven if self._soundness.proves(step_of(path))]
        self._unproven = [path for path in self._unproven if path not in proven]
        existing = [path for path in proven if path.is_dir()]
        if existing:
            self._mark(mark_proven, max(existing, key=step_of), step)
            self._remove_superseded()

    def saved(self, checkpoint: Path) -> None:
        """Called when a checkpoint is complete; in the background, its save may have started some
        steps ago."""
        self._unproven.append(checkpoint)
        if self.doubt is not None and step_of(checkpoint) >= self._doubt_since:
            self._saved_in_doubt.append(checkpoint)
        self._remove_superseded()

    def take_removed(self) -> list[str]:
        """Names of the checkpoints that were removed since the last call."""
        removed, self._removed = self._removed, []
        return removed

    def _mark_unproven_in_doubt(self, reason: str) -> None:
        """Too few sound steps have followed these checkpoints to show that the fault came later."""
        doubtful = [path for path in self._unproven if path.is_dir() and not is_proven(path)]
        for path in doubtful:
            self._mark(mark_doubt, path, reason)
        if doubtful:
            names = ", ".join(path.name for path in doubtful)
            self._report(f"warning: {reason}, so soon after {names} that its weights are in doubt.")

    def _mark(self, mark: Callable[[Path, Any], None], path: Path, value: Any) -> None:
        try:
            mark(path, value)
        except OSError as error:
            self._report(f"warning: {path} could not be marked: {error.strerror or error}.")

    def _remove_superseded(self) -> None:
        if self.doubt is not None:
            # Earlier checkpoints may be needed to resume; only those saved in doubt are replaced.
            removed = superseded(self._saved_in_doubt, self.settings, None)
        else:
            complete = complete_checkpoints(self.folder)
            proven = [path for path in complete if is_proven(path)]
            removed = superseded(complete, self.settings, proven[-1] if proven else None)
            self._saved_in_doubt = []
        for path in removed:
            remove_checkpoint(path)
        self._removed += [path.name for path in removed]
        self._saved_in_doubt = [path for path in self._saved_in_doubt if path not in removed]


def superseded(
    complete: list[Path], settings: CheckpointSettings, proven: Path | None
) -> list[Path]:
    """The complete checkpoints, given oldest first, that may be removed: neither among the last
    `keep_last`, nor the newest `proven` one, nor at a multiple of `keep_every`."""
    every = settings.keep_every
    return [
        path
        for path in complete[: -settings.keep_last]
        if path != proven and (not every or step_of(path) % every)
    ]


def remove_checkpoint(checkpoint: Path) -> None:
    """Renames it first, so that an interrupted removal leaves nothing that looks complete. The next
    save removes what is left."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)
