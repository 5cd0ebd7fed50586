"""The training loop: load, step, average, observe, save."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from uno_ds.cost.utilisation import Utilisation
from uno_ds.model.adapters import count_adapters
from uno_ds.ranges import Range, named_range
from uno_ds.settings import to_plain
from uno_ds.training.adapter_start import seed_dropout
from uno_ds.training.balance import LossBalance
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.collectives import Collectives, gather_objects, raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine, Signals, StepResult
from uno_ds.training.evaluation import Evaluation
from uno_ds.training.failure_report import FailureReport
from uno_ds.training.failures import failure_of
from uno_ds.training.finish import after_training, finish
from uno_ds.training.gradient_monitor import GradientMonitor
from uno_ds.training.health import Health, TrainingStopped
from uno_ds.training.interruption import Interruption
from uno_ds.training.kernel_choice import choose_kernels
from uno_ds.training.memory_snapshot import record_allocations
from uno_ds.training.metrics import Metrics
from uno_ds.training.monitors import Monitors
from uno_ds.training.parameter_checksums import parameter_checksums
from uno_ds.training.process_group import start_process_group
from uno_ds.training.run_files import print_line
from uno_ds.training.run_start import locked_folder, open_folder, resume
from uno_ds.training.saving import Saver
from uno_ds.training.skipped_rows import skipped_examples, skipped_rows
from uno_ds.training.step_metrics import step_metrics
from uno_ds.training.tracing import Tracer
from uno_ds.training.watchdog import Watchdog


def train(run: CheckedRun, max_hours: float | None = None) -> int:
    """Trains to the recipe's last step, or until the run is asked to stop, and writes the run
    folder; returns the exit code."""
    with FailureReport(run) as report, Interruption(max_hours) as interruption:
        with _process_group(run.recipe.engine.cpu_threads) as device:
            report.device = device
            record_allocations(device, run.recipe.logging.trace.allocations)
            with locked_folder(run) as run_id:
                trainer = Trainer(run, device, interruption, run_id)
                report.progress = lambda: f"in step {trainer.step}"
                return trainer.train()


@contextmanager
def _process_group(cpu_threads: int | None) -> Iterator[torch.device]:
    device = start_process_group(cpu_threads)
    try:
        yield device
    except BaseException as error:
        # After a failed device or connection it may hang; the process ends without it.
        if failure_of(error) is None:
            dist.destroy_process_group()
        raise
    # Otherwise a process may abort at its exit although the run succeeded.
    dist.destroy_process_group()


class Trainer:
    """One run on this rank: everything that is built once, and the loop over its steps. In `train`,
    `self.step` is the step that runs, or the last one that did."""

    def __init__(
        self, run: CheckedRun, device: torch.device, interruption: Interruption, run_id: str
    ):
        recipe = run.recipe
        self.run, self.recipe, self.device, self.run_id = run, recipe, device, run_id
        self.interruption = interruption
        layouts = [source.layout for source in run.sources]
        self.kernels = choose_kernels(recipe, layouts, device)
        self.engine = Engine(recipe, device, run.read_answers, self.kernels.settings)
        self.ema = Ema(self.engine, recipe.optimizer.ema) if recipe.optimizer.ema else None
        self.stream = run.stream(self.engine.rank, self.engine.world_size)
        self.stream.finish = self.engine.batch_preparation
        self.health = Health(recipe.health, recipe.engine.max_skipped_steps)
        self.balance = LossBalance(recipe, self.engine)
        self.checksums = parameter_checksums(self.engine)
        self.start, self.lineage = resume(
            run,
            self.engine,
            self.ema,
            self.stream,
            self.health,
            self.balance,
            self.checksums,
            run_id,
        )
        self.step = self.start
        open_folder(run, self.engine, self.checksums, self.kernels.lines)
        with raise_on_all_ranks():
            self.metrics = Metrics(
                recipe.folder,
                recipe.logging,
                self.engine.rank,
                recipe.steps,
                start_step=self.start,
                config=to_plain(recipe),
                after_training=after_training(recipe),
            )
        self.collectives = Collectives(device)
        self.watchdog = Watchdog(
            recipe.health.stall_seconds,
            recipe.folder,
            self.engine.rank,
            self.collectives,
            run.exit_file,
        )
        self.tracer = Tracer(
            recipe.logging.trace,
            recipe.folder,
            self.engine.rank,
            self.engine.world_size,
            recipe.steps,
            device,
            # Metrics prints on rank 0 only, above its progress bar.
            print_line if self.engine.rank else self.metrics.note,
            self.watchdog.heartbeat,
        )
        self.gradients = GradientMonitor(recipe.logging.gradients_every, self.engine)
        self.utilisation = Utilisation(recipe, device, run.read_answers)
        self.saver = Saver(
            recipe.folder / "checkpoints",
            recipe.checkpoint,
            self.engine,
            self.ema,
            self.metrics.note,
            self.watchdog.heartbeat,
        )
        self.saver.retention.resumed_after(self.start)
        self.monitors = Monitors(
            run,
            self.engine,
            self.stream,
            self.collectives,
            self.health,
            self.saver,
            self.metrics,
        )

        self.evaluation = self._make_evaluation()

    def _make_evaluation(self) -> Evaluation | None:
        """None if the recipe asks for no evaluation."""
        recipe = self.recipe
        if not recipe.evaluate.every:
            return None
        uses_average = recipe.evaluate.uses_average(recipe.optimizer.ema)
        return Evaluation(
            recipe.evaluate,
            recipe.samples,
            self.engine,
            self.run.required_tokenizer,
            self.run.held_out(),
            recipe.folder,
            self.watchdog.heartbeat,
            self.ema if uses_average else None,
        )

    def train(self) -> int:
        """Runs the loop, saves the last step, exports the model and writes the summary; returns the
        exit code."""
        exit_reason = "completed"
        with self.collectives, self.watchdog, self.tracer:
            try:
                self._steps()
            except TrainingStopped as stopped:
                exit_reason = f"stopped: {stopped}"
                self.metrics.note(str(stopped))
            self.stream.close()
            is_saved = self._save(wait=True) if self.step > self.start else True
        if self.monitors.stop:
            reason = self.interruption.reason or "a signal to another rank"
            exit_reason = f"interrupted after step {self.step} by {reason}"
        if not is_saved:
            exit_reason += ", but its last checkpoint could not be saved"
        return self._finish(exit_reason, is_saved)

    def _steps(self) -> None:
        """Trains until the last step, or until the run is asked to stop."""
        # A run that was interrupted after a step has left its evaluation to the next start.
        if not self._is_evaluated(self.start):
            self._evaluate_if_due()
        batches_of_steps = iter(self.stream)
        self.tracer.before_step(self.start + 1)
        started = time.perf_counter()
        for step in range(self.start + 1, self.recipe.steps + 1):
            self.step = step
            self.watchdog.heartbeat(f"in step {step}")
            with named_range(Range.DATA, "wait"):
                batches = next(batches_of_steps)
            if self.balance.due(step):
                self.metrics.note(self.balance.measure(step, batches))
            gradients = None
            if self.gradients.due(step):
                gradients = self.gradients.measure(batches)
                # Not part of the step: speed and stragglers are judged without it.
                started += gradients["seconds"]
            self.monitors.before_step(step)
            seed_dropout(self.recipe, step, self.engine.rank)
            lr = self.recipe.optimizer.lr_at(step, self.recipe.steps)
            signals = Signals(
                self.interruption.wanted,
                self.saver.ready,
                *self.stream.rows,
                traced_steps=self.tracer.requested_steps(),
            )
            result = self.engine.train_step(batches, lr, signals, self.health.highest_loss)
            if self.ema is not None and not result.skipped:
                with named_range(Range.AVERAGE):
                    self.ema.update()
            seconds = time.perf_counter() - started
            mfu = self.utilisation(batches, seconds)
            self._record(result, lr, seconds, mfu, gradients)
            self.monitors.after_step(step, result, batches, seconds)
            if self.monitors.all_saved:
                with named_range(Range.CHECKPOINT, "settle"):
                    self.saver.settle()
            if self.monitors.stop:
                return
            self._evaluate_if_due()
            if self._is_save_due():
                self._save(wait=False)
            self.tracer.after_step(step, int(self.health.signals.traced_steps))
            started = time.perf_counter()

    def _evaluate_if_due(self) -> None:
        evaluation = self.evaluation
        if evaluation is not None and evaluation.is_due(self.step, self.recipe.steps):
            with named_range(Range.EVALUATION):
                evaluation(self.step, self.metrics)

    def _is_evaluated(self, step: int) -> bool:
        """Whether the step's evaluation is recorded; alike on all ranks. Collective."""
        return gather_objects(step in self.metrics.evaluated)[0]

    def _record(
        self,
        result: StepResult,
        lr: float,
        seconds: float,
        mfu: float | None,
        gradients: dict[str, Any] | None,
    ) -> None:
        weights = self.recipe.objective.weights
        has_loss = {name: bool(weight) for name, weight in weights.items()}
        has_loss["answer"] = self.run.read_answers
        values = step_metrics(
            result,
            has_loss,
            lr=lr,
            seconds=seconds,
            skipped=self.health.skips.skipped + result.skipped,
            device=self.device,
            mfu=mfu,
        )
        self.metrics.record(self.step, {**values, **self.balance.values()}, gradients)

    def _is_save_due(self) -> bool:
        """After the last step, `train` saves."""
        every = self.recipe.checkpoint.every
        return every > 0 and self.step % every == 0 and self.step < self.recipe.steps

    def _save(self, wait: bool) -> bool:
        self.metrics.flush()
        progress = {
            **self.health.state(),
            **self.balance.state(),
            "run": self.lineage.plain(),
            "frozen_checksum": self.checksums.frozen_checksum,
            "rows": {source.name: len(source) for source in self.run.sources},
        }
        with named_range(Range.CHECKPOINT, "save"):
            return self.saver.save(self.step, self.stream.state, progress, wait=wait)

    def _adapters(self) -> dict[str, Any] | None:
        if self.recipe.model.train != "lora":
            return None
        return count_adapters(self.engine.objective.model, self.recipe.lora)

    def _finish(self, exit_reason: str, is_saved: bool) -> int:
        skipped = skipped_rows(self.stream, self.run.sources)
        checkpoints = {
            "saved": self.saver.saved,
            "failed": self.saver.failed,
            "last_saved": is_saved,
            "blocked_seconds": self.saver.blocked_seconds,
        }
        more = {
            "run_id": self.run_id,
            "checkpoints": checkpoints,
            "adapters": self._adapters(),
            "sources": {source.name: to_plain(source.reading) for source in self.run.sources},
            "skipped_examples": skipped_examples(self.stream),
            "kernels": self.kernels.plain(),
            **self.monitors.summary(),
        }
        return finish(
            self.run,
            self.engine,
            self.ema,
            self.metrics,
            self.checksums,
            skipped,
            exit_reason,
            more,
            is_interrupted=self.monitors.stop,
        )
