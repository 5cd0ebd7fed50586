"""Model FLOP utilisation: operations that the model needs over those that the device could do in
the time."""

from typing import TYPE_CHECKING

import torch

from uno_ds.cost.hardware import GPUS
from uno_ds.cost.step_flops import Plan, step_flops, total
from uno_ds.cost.work import Work
from uno_ds.sequence.batch import PackedBatch

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


def plan_of(recipe: "Recipe", read_answers: bool, spelling: str = "structured") -> Plan:
    """What of the recipe decides over the passes of a step. `read_answers`: some source has
    answers."""
    objective = recipe.objective
    regression, target = (
        objective.regression_weight > 0 and recipe.sequence.metaquery_grid > 0,
        objective.regression_target,
    )
    return Plan(
        recompute=recipe.model.recompute,
        everything=recipe.model.train == "all",
        read_context=read_answers,
        spelling=spelling,
        target_width=recipe.architecture.vit_hidden if regression and target == "vit" else None,
        connector_targets=regression and target == "connector",
    )


def peak_flops(recipe: "Recipe", device: torch.device) -> float | None:
    """FLOP per second of one device: `hardware.peak_flops` of the recipe, else the data sheet's
    dense bf16 rate of a GPU that the table knows. None for a CPU, whose rate no sheet tells, and
    for fp32, which GPUs do at other rates."""
    if (
        recipe.hardware.peak_flops is not None
        or device.type != "cuda"
        or recipe.engine.resolved_precision() != "bf16"
    ):
        return recipe.hardware.peak_flops
    return sheet_rate(torch.cuda.get_device_name(device))


def sheet_rate(name: str) -> float | None:
    """Of a GPU by the name that its driver gives. The table holds SXM boards; PCIe and NVL boards
    of that name are slower."""
    words = name.replace("-", " ").split()
    if {"PCIe", "NVL"} & set(words):
        return None
    return next((gpu.matmul for key, gpu in GPUS.items() if key.split("-")[0] in words), None)


class Utilisation:
    """Of the packs of one rank, which is that of all ranks as far as their packs are alike."""

    def __init__(self, recipe: "Recipe", device: torch.device, read_answers: bool):
        self.shape, self.plan, self.peak = (
            recipe.architecture,
            plan_of(recipe, read_answers),
            peak_flops(recipe, device),
        )

    def __call__(self, batches: list[PackedBatch], seconds: float) -> float | None:
        """`batches` on the host; None where there is no peak. Recomputation is not counted as
        work."""
        if self.peak is None:
            return None
        return (
            sum(total(step_flops(self.shape, Work.of(batch), self.plan)).model for batch in batches)
            / seconds
            / self.peak
        )
