"""Whether the steps of a run are sound, and which checkpoints sound steps have followed.

A step is sound if it was applied and its loss was in the range of the losses before it. One ruinous
step leaves weights that look like any others until the next steps are seen, so a checkpoint is
proven only by the steps that follow it."""

import math
import statistics
from collections import deque

# The range ends at so many medians of the last sound losses, of which at least ENOUGH and at most
# WINDOW count.
MEDIANS, ENOUGH, WINDOW = 3.0, 5, 50
# Sound steps in a row that prove a checkpoint; fewer where checkpoints lie closer together.
PROOF = 10


class Soundness:
    """needed: sound steps in a row that prove a checkpoint and end a doubt. medians: where the
    range of the loss ends."""

    def __init__(self, needed: int, medians: float = MEDIANS):
        self.needed, self.medians = needed, medians
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._step = self._unsound_step = 0
        self._reason = ""

    def observe(self, step: int, loss: float, skipped: bool) -> None:
        self._step = step
        reason = self._fault(step, loss, skipped)
        if reason is None:
            self._losses.append(loss)
        else:
            self._unsound_step, self._reason = step, reason

    @property
    def doubt(self) -> str | None:
        """Why the weights are in doubt now; None once `needed` sound steps in a row have followed
        the last fault."""
        if self._unsound_step and self._step - self._unsound_step < self.needed:
            return self._reason
        return None

    def proves(self, saved_step: int) -> bool:
        """Whether the last `needed` steps were sound and all of them followed step `saved_step`."""
        return self._step - max(saved_step, self._unsound_step) >= self.needed

    def _fault(self, step: int, loss: float, skipped: bool) -> str | None:
        if skipped:
            return f"step {step} was skipped"
        if not math.isfinite(loss):
            return f"the loss of step {step} was not finite"
        limit = self._limit()
        if loss <= limit:
            return None
        return (
            f"the loss of step {step}, {loss:.4g}, was above {self.medians:g} medians of the last "
            f"{len(self._losses)} sound losses = {limit:.4g}"
        )

    def _limit(self) -> float:
        if len(self._losses) < ENOUGH:
            return math.inf
        # Losses of 0 say nothing about a range.
        return self.medians * statistics.median(self._losses) or math.inf
