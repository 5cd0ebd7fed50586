"""Decides which steps of a run are sound, and which checkpoints sound steps have followed.

A step is sound if it was applied and its loss was in the range of the losses before it. A step that
ruins the weights may show only in the losses of the steps after it, so a checkpoint is proven by
the steps that follow it."""

import math
import statistics
from collections import deque

# The largest sound loss, in medians of the last sound losses.
LIMIT_IN_MEDIANS = 3.0
# Number of last sound losses from which a limit is computed: at least, at most.
FEWEST_LOSSES, MOST_LOSSES = 5, 50
# Sound steps in a row that prove a checkpoint.
STEPS_THAT_PROVE = 10


class Soundness:
    """needed: sound steps in a row that prove a checkpoint and end a doubt. limit_in_medians: the
    largest sound loss, in medians of the last sound losses."""

    def __init__(self, needed: int, limit_in_medians: float = LIMIT_IN_MEDIANS):
        self.needed, self.limit_in_medians = needed, limit_in_medians
        self._losses: deque[float] = deque(maxlen=MOST_LOSSES)
        self._step = self._unsound_step = 0
        self._reason = ""

    def observe(self, step: int, loss: float, skipped: bool) -> None:
        """Called after each step."""
        self._step = step
        reason = self._why_unsound(step, loss, skipped)
        if reason is None:
            self._losses.append(loss)
        else:
            self._unsound_step, self._reason = step, reason

    @property
    def doubt(self) -> str | None:
        """Why the weights are in doubt now; None once `needed` sound steps in a row have followed
        the last unsound one."""
        if self._unsound_step and self._step - self._unsound_step < self.needed:
            return self._reason
        return None

    def proves(self, saved_step: int) -> bool:
        """Whether the last `needed` steps were sound and all of them followed step `saved_step`."""
        return self._step - max(saved_step, self._unsound_step) >= self.needed

    def _why_unsound(self, step: int, loss: float, skipped: bool) -> str | None:
        if skipped:
            return f"step {step} was skipped"
        if not math.isfinite(loss):
            return f"the loss of step {step} was not finite"
        limit = self._limit()
        if loss <= limit:
            return None
        return (
            f"the loss of step {step}, {loss:.4g}, was above {self.limit_in_medians:g} medians of "
            f"the last {len(self._losses)} sound losses = {limit:.4g}"
        )

    def _limit(self) -> float:
        if len(self._losses) < FEWEST_LOSSES:
            return math.inf
        # A median of 0 gives no limit.
        return self.limit_in_medians * statistics.median(self._losses) or math.inf
