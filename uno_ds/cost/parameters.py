"""Every parameter of a recipe's model, from modules that hold no memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from uno_ds.kernels.backends import KernelSettings
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec
from uno_ds.model.inspection import part_of
from uno_ds.model.weights import bagel_name
from uno_ds.objectives.uno import UnoObjective

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


@dataclass(frozen=True)
class Parameter:
    """`name` as in the objective; `part` as in `weights.py inspect`."""

    name: str
    part: str
    shape: tuple[int, ...]
    trainable: bool

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def parameters_of(recipe: "Recipe") -> list[Parameter]:
    """Of the objective that the recipe trains: the model, metaqueries and their head."""
    with torch.device("meta"):
        objective = UnoObjective(
            Bagel(recipe.architecture),
            PixelCodec(1),
            recipe.objective,
            KernelSettings(),
            recipe.sequence.metaquery_grid**2,
        )
    objective.set_trainable(everything=recipe.model.trains_everything)
    return [
        Parameter(name, _part_of(name), tuple(parameter.shape), parameter.requires_grad)
        for name, parameter in objective.named_parameters()
    ]


def _part_of(name: str) -> str:
    if not name.startswith("model."):
        return "metaqueries and their head"
    return part_of(bagel_name(name.removeprefix("model.")))


def count_by_part(parameters: list[Parameter]) -> dict[str, dict[str, int]]:
    """{part: {"trainable": n, "frozen": n}} in the order of the model."""
    parts: dict[str, dict[str, int]] = {}
    for parameter in parameters:
        part = parts.setdefault(parameter.part, {"trainable": 0, "frozen": 0})
        part["trainable" if parameter.trainable else "frozen"] += parameter.numel
    return parts
