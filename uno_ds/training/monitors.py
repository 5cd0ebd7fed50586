"""All monitors of a run behind one call before and one after each step."""

from typing import Any

from uno_ds.data.stream import Stream
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.collectives import Collectives
from uno_ds.training.engine import Engine, StepResult
from uno_ds.training.health import Health
from uno_ds.training.kernel_check import KernelCheck
from uno_ds.training.metrics import Metrics
from uno_ds.training.saving import Saver
from uno_ds.training.straggler_monitor import StragglerMonitor


class Monitors:
    """Monitors slow ranks and lost files, whether steps are sound (for the retention of
    checkpoints), losses and rows, and the fused kernels. Prints what they find.

    `stop`: some rank was asked to stop; `all_saved`: every rank has written its part of the
    checkpoint in the background. Both as signalled in the last step, the same on all ranks.
    """

    def __init__(
        self,
        run: CheckedRun,
        engine: Engine,
        stream: Stream,
        collectives: Collectives,
        health: Health,
        saver: Saver,
        metrics: Metrics,
    ):
        self.stop = self.all_saved = False
        self._engine, self._health, self._saver, self._metrics = engine, health, saver, metrics
        self._kernel_check = KernelCheck(run.recipe.health, engine)
        self._stragglers = StragglerMonitor(
            engine, collectives, stream, run.sources, run.recipe.logging.every
        )

    def before_step(self, step: int) -> None:
        self._kernel_check.before_step(step)

    def after_step(
        self, step: int, result: StepResult, batches: list[PackedBatch], seconds: float
    ) -> None:
        """seconds: duration of the step. Collective; raises TrainingStopped, on all ranks, if the
        run has to end."""
        samples: list[str] = []
        for batch in batches:
            samples += batch.keys
        self._metrics.note(*self._stragglers.after_step(step, seconds))
        self._saver.observe(step, result)
        self._metrics.note(*self._health.observe(step, result, samples))
        self._metrics.note(*self._kernel_check.after_step(step))
        signals = self._health.signals
        self.stop = signals.stop > 0
        self.all_saved = signals.saved == self._engine.world_size

    def summary(self) -> dict[str, Any]:
        """For the run's summary: busy seconds of each rank, lost and unreadable files.
        Collective."""
        return self._stragglers.summary()
