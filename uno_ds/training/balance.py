"""Scales the understanding losses by the gradients that they and the flow loss have at the noised
latents, where all of them meet."""

import math
from typing import TYPE_CHECKING, Any

from uno_ds.inspection.gradients import latent_norms
from uno_ds.objectives.uno import UNDERSTANDING
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.adapter_start import seed_dropout
from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import Engine
from uno_ds.training.gradient_monitor import placed_and_counted

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

KEY = "understanding_scale"  # of a checkpoint's manifest


class LossBalance:
    """Measures before a step, every `objective.balance_every` steps, with passes that change no
    weight and no gradient, and sets the scale of the understanding losses for the steps from there
    on.

    `scale`: the same on all ranks; None before the first measurement, where it is 1."""

    def __init__(self, recipe: "Recipe", engine: Engine):
        self._recipe, self._engine = recipe, engine
        self.is_on = {"none": False, "gradient_norm": True}[recipe.objective.balance]
        self.scale: float | None = None

    def due(self, step: int) -> bool:
        if not self.is_on or step > self._recipe.supervised_steps:
            return False
        return self.scale is None or (step - 1) % self._recipe.objective.balance_every == 0

    def measure(self, step: int, batches: list[PackedBatch]) -> str:
        """Sets the scale by this step's micro-batches of all ranks; returns a line about it. It
        stays as it is where a norm is 0 or not finite. Collective."""
        objective = self._engine.objective
        seed_dropout(self._recipe, step, self._engine.rank)
        placed, counts = placed_and_counted(batches, self._engine)
        understanding = [name for name in objective.losses if name in UNDERSTANDING]
        generation = [name for name in ("flow", "contrast") if name in objective.losses]
        norms = latent_norms(objective, placed, counts, [generation, understanding])
        schedule = self._recipe.supervision_schedule
        # The batches hold the decay; the ratio is that without it.
        decay = 1.0 if schedule is None else schedule.weight(step)
        # Of the first rank, so that not even the last bit can differ.
        flow, supervision = gather_objects((norms[0], norms[1] / decay))[0]
        found = f"gradient at the latents: flow {flow:.4g}, understanding {supervision:.4g}"
        wanted = self._recipe.objective.balance_ratio * flow
        if not (0 < wanted < math.inf and 0 < supervision < math.inf):
            return f"balance before step {step}: {found}; the scale stays as it is"
        self._set(wanted / supervision)
        return f"balance before step {step}: {found}; understanding losses times {self.scale:.4g}"

    def values(self) -> dict[str, float]:
        """For the metrics of a step."""
        if not self.is_on:
            return {}
        return {KEY: 1.0 if self.scale is None else self.scale}

    def state(self) -> dict[str, float | None]:
        """For the manifest of a checkpoint."""
        return {KEY: self.scale} if self.is_on else {}

    def restore(self, manifest: dict[str, Any]) -> None:
        """A checkpoint of a run without balance has no scale: the next step measures."""
        scale = manifest.get(KEY)
        if self.is_on and scale is not None:
            self._set(float(scale))

    def _set(self, scale: float) -> None:
        self.scale = scale
        losses = self._engine.objective.losses
        scales = {name: scale if name in UNDERSTANDING else 1.0 for name in losses}
        self._engine.objective.scales = scales
