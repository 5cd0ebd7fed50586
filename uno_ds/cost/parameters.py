"""Every parameter of a recipe's model, from modules that hold no memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.adapters import is_adapter
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec
from uno_ds.model.inspection import part_of
from uno_ds.model.quantisation import quantise_frozen, quantised_weights
from uno_ds.model.vision_folder import vision_parameters
from uno_ds.model.weights import bagel_name
from uno_ds.objectives.regression_target import get_regression_target, vision_folder_of
from uno_ds.objectives.uno import UnoObjective

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


@dataclass(frozen=True)
class Parameter:
    """`name` as in the objective; `part` as in `weights.py inspect`; `stored`: bytes of codes and
    scales of a quantised weight."""

    name: str
    part: str
    shape: tuple[int, ...]
    trainable: bool
    stored: int | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def nbytes(self, value_bytes: int) -> int:
        """Of all of it, where a value that is not quantised has `value_bytes`."""
        return self.numel * value_bytes if self.stored is None else self.stored


def parameters_of(recipe: "Recipe") -> list[Parameter]:
    """Of the objective that the recipe trains: the model, metaqueries and their head."""
    with torch.device("meta"):
        objective = UnoObjective(
            Bagel(recipe.architecture),
            PixelCodec(1),
            recipe.objective,
            KernelSettings(),
            recipe.sequence.metaqueries,
        )
    objective.choose_trainable(recipe.model.train, recipe.lora)
    if recipe.model.frozen_precision != "bf16":
        quantise_frozen(
            objective.model, recipe.model.frozen_precision, torch.float32, recipe.model.keep_bf16
        )
    plain = [
        Parameter(name, _part_of(name), tuple(parameter.shape), parameter.requires_grad)
        for name, parameter in objective.named_parameters()
    ]
    quantised = [
        Parameter(name, _part_of(name), tuple(module.shape), False, module.nbytes)
        for name, module in quantised_weights(objective)
    ]
    return plain + quantised


def target_encoder_parameters(recipe: "Recipe") -> int:
    """Weights of the encoder of regression targets that is no part of the model; 0: there is
    none."""
    target = get_regression_target(recipe.objective.regression_target)
    if not target.own_encoder or not recipe.regresses:
        return 0
    return vision_parameters(vision_folder_of(recipe.objective).path)


def _part_of(name: str) -> str:
    if not name.startswith("model."):
        return "metaqueries and their head"
    if is_adapter(name):
        return "adapters"
    return part_of(bagel_name(name.removeprefix("model.")))


def count_by_part(parameters: list[Parameter]) -> dict[str, dict[str, int]]:
    """{part: {"trainable": n, "frozen": n}} in the order of the model."""
    parts: dict[str, dict[str, int]] = {}
    for parameter in parameters:
        part = parts.setdefault(parameter.part, {"trainable": 0, "frozen": 0})
        part["trainable" if parameter.trainable else "frozen"] += parameter.numel
    return parts
