"""A model that is looked at: training's objective around an opened model, without an optimizer."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.generation.inference_model import OpenModel
from uno_ds.kernels.selection import KernelSettings
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.settings import SettingsError


@dataclass(frozen=True, eq=False)
class Subject:
    """metaqueries: side of their grid; 0 where the checkpoint has none."""

    objective: UnoObjective
    tokenizer: Tokenizer
    metaqueries: int

    @property
    def tokens(self) -> SpecialTokens:
        return special_tokens(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.objective.model.lm_head.weight.device

    def collator(self) -> Collator:
        """That of post-training with a frozen understanding expert."""
        return Collator(
            self.objective.model.shape.geometry,
            self.tokens,
            train_understanding=False,
            stop_at_context=True,
        )


def subject_of(
    opened: OpenModel, added: dict[str, torch.Tensor], settings: ObjectiveSettings
) -> Subject:
    """The opened model with what UNO added to it: `metaqueries.weight` and, where the target is
    that of the visual encoder, `regression.weight`; none: a model without metaqueries. `settings`:
    weights of the losses. Raises SettingsError if the tensors do not fit the model."""
    weight = opened.model.lm_head.weight
    queries = added.get("metaqueries.weight")
    side = 0 if queries is None else math.isqrt(len(queries))
    head = added.get("regression.weight")
    changes: dict[str, Any] = {"regression_target": "vit" if head is not None else "connector"}
    if not side:
        changes = {"regression_weight": 0.0}
        if not (settings.flow_weight or settings.caption_weight or settings.answer_weight):
            changes["flow_weight"] = 1.0
    elif not settings.regression_weight:
        changes["regression_weight"] = ObjectiveSettings.regression_weight
    with torch.device("meta"):
        objective = UnoObjective(
            opened.model,
            opened.codec,
            dataclasses.replace(settings, **changes),
            KernelSettings().resolved(),
            side**2,
        )
    for name, parameter in list(objective.named_parameters()):
        if name.startswith("model."):
            continue
        values = added[name]
        if values.shape != parameter.shape or side**2 != len(added["metaqueries.weight"]):
            raise SettingsError(
                "--checkpoint",
                f"its {name} has shape {list(values.shape)}, the model needs "
                f"{list(parameter.shape)}.",
            )
        owner, _, leaf = name.rpartition(".")
        placed = values.to(device=weight.device, dtype=weight.dtype)
        setattr(objective.get_submodule(owner), leaf, nn.Parameter(placed, requires_grad=False))
    return Subject(objective.eval(), opened.tokenizer, side)
