"""Model FLOP utilisation: operations that the model needs over those that the device could do in
the time."""

from typing import TYPE_CHECKING

import torch

from uno_ds.cost.adapters import adapters_of
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.step_flops import Plan, step_flops, total
from uno_ds.cost.work import Work
from uno_ds.objectives.regression_target import (
    get_regression_target,
    head_width,
    vision_folder_of,
)
from uno_ds.objectives.visual_regression import CONTRASTIVE
from uno_ds.sequence.batch import PackedBatch

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


def plan_of(recipe: "Recipe", read_answers: bool, naive: bool = False) -> Plan:
    """The recipe's settings that decide the passes of a step. `read_answers`: some source has
    answers. `naive`: see Plan."""
    objective, regresses = recipe.objective, recipe.regresses
    target = get_regression_target(objective.regression_target)
    own_encoder = regresses and target.own_encoder
    return Plan(
        recompute=recipe.model.recompute,
        everything=recipe.model.trains_everything,
        read_context=read_answers,
        naive=naive,
        target_width=head_width(objective, recipe.architecture) if regresses else None,
        connector_targets=regresses and target.uses_connector,
        contrastive=regresses and objective.regression_loss == CONTRASTIVE,
        target_encoder=vision_folder_of(objective).path if own_encoder else None,
        adapters=adapters_of(recipe),
    )


def peak_flops(recipe: "Recipe", device: torch.device) -> float | None:
    """FLOP per second of one device: `hardware.peak_flops` of the recipe, else the data sheet's
    dense bf16 rate of a GPU that is in the table. None for a CPU, whose rate no data sheet states,
    and for fp32, which GPUs compute at other rates."""
    if recipe.hardware.peak_flops is not None:
        return recipe.hardware.peak_flops
    if device.type != "cuda" or recipe.engine.resolved_precision() != "bf16":
        return None
    return sheet_rate(torch.cuda.get_device_name(device))


def sheet_rate(name: str) -> float | None:
    """FLOP per second of a GPU by its driver's name; None if it is not in the table. Of boards with
    the same name PCIe, NVL, D and laptop ones are slower, and not in it."""
    words = name.replace("-", " ").split()
    if {"PCIe", "NVL", "D", "Laptop"} & set(words):
        return None
    # The driver writes RTX 4090, the table RTX4090.
    models = {*words, *(first + second for first, second in zip(words, words[1:]))}
    for key, gpu in GPUS.items():
        if key.split("-")[0] in models:
            return gpu.matmul
    return None


class Utilisation:
    """Model FLOP utilisation of one rank; the other ranks have the same as far as their packs are
    alike."""

    def __init__(self, recipe: "Recipe", device: torch.device, read_answers: bool):
        self.shape = recipe.architecture
        self.plan = plan_of(recipe, read_answers)
        self.peak = peak_flops(recipe, device)

    def __call__(self, batches: list[PackedBatch], seconds: float) -> float | None:
        """`batches` on the host; None where there is no peak. Recomputation is not counted as
        work."""
        if self.peak is None:
            return None
        flop = 0
        for batch in batches:
            parts = step_flops(self.shape, Work.of(batch), self.plan)
            flop += total(parts).model
        return flop / seconds / self.peak
