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
from uno_ds.model.architecture import Architecture
from uno_ds.objectives.regression_target import head_width, open_encoder, target_source
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
            targets=target_source(self.objective.settings),
        )


def _target_changes(
    settings: ObjectiveSettings, head: torch.Tensor | None, shape: Architecture
) -> dict[str, Any]:
    """The settings' target where the checkpoint's head is one of that target, else the one of the
    model's own encoder that has such a head."""
    width = None if head is None else len(head)
    if head_width(settings, shape) == width:
        return {}
    return {"regression_target": "connector" if head is None else "vit"}


def subject_of(
    opened: OpenModel, added: dict[str, torch.Tensor], settings: ObjectiveSettings
) -> Subject:
    """The opened model with what UNO added to it: `metaqueries.weight` and, where the target has a
    head, `regression.weight`; none: a model without metaqueries. `settings`: weights of the losses
    and the regression target. Raises SettingsError if the tensors do not fit the model."""
    weight = opened.model.lm_head.weight
    queries = added.get("metaqueries.weight")
    side = 0 if queries is None else math.isqrt(len(queries))
    head = added.get("regression.weight")
    changes = _target_changes(settings, head, opened.model.shape)
    if not side:
        changes = {"regression_weight": 0.0}
        if not (settings.flow_weight or settings.caption_weight or settings.answer_weight):
            changes["flow_weight"] = 1.0
    elif not settings.regression_weight:
        changes["regression_weight"] = ObjectiveSettings.regression_weight
    settings = dataclasses.replace(settings, **changes)
    encoder = open_encoder(settings, weight.device, weight.dtype) if side else None
    with torch.device("meta"):
        objective = UnoObjective(
            opened.model,
            opened.codec,
            settings,
            KernelSettings().resolved(),
            side**2,
            encoder,
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
