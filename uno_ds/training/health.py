"""Checks the health of a run after every step: skipped steps, spikes of the loss, unusable rows."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from uno_ds.settings import setting
from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import NO_SIGNALS, Signals, StepResult


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message names the reason and what to do."""


@dataclass(frozen=True)
class HealthSettings:
    # Below the 10 minutes after which torch aborts a collective without a report.
    stall_seconds: float = setting(
        480.0,
        doc="Seconds without a new collective after which a rank reports where it hangs and exits "
        "with code 75, so that the job is started again; 0: never.",
        minimum=1,
        maximum=1e7,
        or_zero=True,
    )
    max_bad_fraction: float = setting(
        0.5,
        doc="Share of unusable rows, over the last `bad_rows_window` drawn ones, that ends the "
        "run.",
        above=0,
        maximum=1,
    )
    bad_rows_window: int = setting(
        1000,
        doc="Number of last rows, over all ranks, of which `max_bad_fraction` is a share.",
        minimum=1,
        maximum=10**7,
    )
    spike_factor: float = setting(
        0.0,
        doc="A loss above this many medians of the last `spike_window` losses is a spike; 0: none "
        "is.",
        above=1,
        maximum=1e6,
        or_zero=True,
    )
    spike_window: int = setting(
        50,
        doc="Losses over which the median is taken; no loss is a spike before there are as many.",
        minimum=2,
        maximum=10_000,
    )
    spike_action: str = setting(
        "warn",
        choices=("warn", "skip", "stop"),
        doc="Response to a spike. skip: all ranks skip the step; stop: the run ends before the "
        "step.",
    )
    kernel_check_every: int = setting(
        0,
        doc="Steps between two comparisons of one layer's attention and of a fused regression loss "
        "with the reference, gradients included; 0: none.",
        minimum=0,
        maximum=10**9,
    )
    kernel_check_tolerance: float = setting(
        4.0,
        doc="Allowed error, in multiples of the reference's error in the run's precision.",
        above=0,
        maximum=1e6,
    )
    kernel_check_action: str = setting(
        "stop", choices=("warn", "stop"), doc="Response to a larger error."
    )


class Health:
    """Checks every step, with the same result on all ranks: skipped steps, spikes of the loss,
    unusable rows. `signals`: those of the last step, summed over the ranks."""

    def __init__(self, settings: HealthSettings, max_skipped_steps: int):
        self.settings = settings
        self.skips = NonFiniteGuard(max_skipped_steps)
        self.spikes = SpikeGuard(settings)
        self.rows = RowGuard(settings)
        self.signals = NO_SIGNALS

    @property
    def highest_loss(self) -> float:
        """The largest loss with which the next step is not skipped."""
        limits = {"warn": math.inf, "skip": self.spikes.limit, "stop": self.spikes.limit}
        return limits[self.settings.spike_action]

    def observe(self, step: int, result: StepResult, keys: list[str]) -> list[str]:
        """Lines to log; `keys`: this rank's samples. Raises TrainingStopped if the run has to
        end."""
        self.signals = Signals(*result.signals.tolist())
        self.rows.observe(int(self.signals.drawn_rows), int(self.signals.bad_rows))
        spike = self.spikes.observe(result)
        if spike and self.settings.spike_action == "stop":
            raise TrainingStopped(
                f"step {step} was not applied: {spike} (health.spike_action = stop)."
            )
        line = self.skips.observe(step, result, keys, spike)
        if line is None and spike is not None:
            line = f"warning: step {step}: {spike}"
        return [] if line is None else [line]

    def state(self) -> dict[str, Any]:
        return {"skipped_steps": self.skips.skipped, "recent_losses": list(self.spikes.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        self.skips.skipped = state["skipped_steps"]
        self.spikes.losses.extend(state["recent_losses"])


class NonFiniteGuard:
    """Counts skipped steps and stops the run after too many in a row."""

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def observe(
        self, step: int, result: StepResult, keys: list[str], cause: str | None = None
    ) -> str | None:
        """A line to log if the step was skipped, the same on every rank. Raises TrainingStopped at
        the limit. `keys`: this rank's samples; `cause`: None if it is not known. Collective if the
        step was skipped, which is the case on all ranks or none."""
        if not result.skipped:
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        by_rank = dict(enumerate(gather_objects((bool(result.finite_here), keys))))
        not_finite = [rank for rank, (is_finite, _) in by_rank.items() if not is_finite]
        if not_finite:
            cause = "the loss is not finite"
        elif cause is None:
            cause = "the gradient is not finite"
        samples = "; ".join(
            f"of rank {rank}: {', '.join(by_rank[rank][1])}" for rank in not_finite or by_rank
        )
        line = f"step {step} skipped: {cause}; samples {samples}"
        if self.in_a_row >= self.limit:
            raise TrainingStopped(
                f"{line}. This was the {self.in_a_row}th skipped step in a row "
                f"(engine.max_skipped_steps = {self.limit}): "
                "lower optimizer.lr or look at the samples named above."
            )
        return line


class SpikeGuard:
    """Detects a loss far above the median of the last losses, of which spikes are no part."""

    def __init__(self, settings: HealthSettings):
        self.factor = settings.spike_factor
        self.losses: deque[float] = deque(maxlen=settings.spike_window)

    @property
    def limit(self) -> float:
        """The largest loss that is no spike."""
        if not self.factor or len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        return self.factor * statistics.median(self.losses)

    def observe(self, result: StepResult) -> str | None:
        """A description of the spike, if the step's loss is one."""
        loss = float(result.loss_on_host) if self.factor else math.nan
        limit = self.limit
        if loss > limit:
            return (
                f"the loss {loss:.4g} is above {self.factor:g} medians of the last "
                f"{len(self.losses)} losses = {limit:.4g}"
            )
        if math.isfinite(loss):
            self.losses.append(loss)
        return None


class RowGuard:
    """Ends a run if too many of the last rows are unusable."""

    def __init__(self, settings: HealthSettings):
        self.limit, self.window = settings.max_bad_fraction, settings.bad_rows_window
        self._counts: deque[tuple[int, int]] = deque()

    def observe(self, drawn: int, bad: int) -> None:
        """`drawn`, `bad`: rows over all ranks since the run began. Raises TrainingStopped."""
        self._counts.append((drawn, bad))
        while len(self._counts) > 2 and drawn - self._counts[1][0] >= self.window:
            self._counts.popleft()
        drawn_before, bad_before = self._counts[0]
        rows, unusable = drawn - drawn_before, bad - bad_before
        if rows >= self.window and unusable >= self.limit * rows:
            raise TrainingStopped(
                f"{unusable:,} of the last {rows:,} rows could not be used "
                f"(health.max_bad_fraction = {self.limit:g}); the summary "
                "counts the causes. Repair the data, then continue with --resume auto."
            )
