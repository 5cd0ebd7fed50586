"""What the losses contribute to the update, every `logging.gradients_every` steps of a run."""

import time
from typing import Any

import deepspeed.comm
import torch

from uno_ds.inspection.gradients import measure_gradients
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.engine import Engine


class GradientMonitor:
    """Measures the gradients of a step's losses before the step, with passes of its own that change
    no weight, no gradient and no random state."""

    def __init__(self, every: int, engine: Engine):
        self.every = every
        self._engine = engine

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def measure(self, batches: list[PackedBatch]) -> dict[str, Any]:
        """The report of `measure_gradients` on the step's micro-batches of all ranks, and the
        `seconds` that it took. Collective."""
        begun = time.perf_counter()
        placed, counts = placed_and_counted(batches, self._engine)
        report = measure_gradients(self._engine.objective, placed, counts)
        return report | {"seconds": time.perf_counter() - begun}


def placed_and_counted(
    batches: list[PackedBatch], engine: Engine
) -> tuple[list[PackedBatch], torch.Tensor]:
    """(the batches on the engine's device, tokens with each loss over all ranks). Collective."""
    losses = engine.objective.losses
    own = [sum(batch.loss_counts[name] for batch in batches) for name in losses]
    counts = torch.tensor(own, dtype=torch.float64).to(engine.device)
    deepspeed.comm.all_reduce(counts)
    return [batch.to(engine.device) for batch in batches], counts
