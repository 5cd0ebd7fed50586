"""A model that is looked at: training's objective around an opened model, without an optimizer."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.generation.inference_model import OpenModel
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.regression_metadata import NO_IDENTITY
from uno_ds.objectives.regression_target import (
    REGRESSION_TARGETS,
    open_encoder,
    target_source,
    vision_folder_of,
)
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.composition import SpecialTokens, grids_of, queries_of
from uno_ds.sequence.packing import Collator
from uno_ds.settings import SettingsError, printable


@dataclass(frozen=True, eq=False)
class Subject:
    """metaqueries: side of their grid, or of several; 0 where the checkpoint has none."""

    objective: UnoObjective
    tokenizer: Tokenizer
    metaqueries: list[int] | int

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


def subject_of(
    opened: OpenModel,
    added: dict[str, torch.Tensor],
    settings: ObjectiveSettings,
    identity: Mapping[str, Any] = NO_IDENTITY,
) -> Subject:
    """The opened model with what UNO added to it: `metaqueries.weight` and, where the target has a
    head, `regression.weight`; none: a model without metaqueries. `settings`: weights of the losses
    and the folder of an encoder; `identity`: of the regression (model/regression_metadata). Raises
    SettingsError if the tensors do not fit the model."""
    weight = opened.model.lm_head.weight
    queries = added.get("metaqueries.weight")
    grid: list[int] | int = 0
    if queries is not None:
        grid = identity.get("grids") or math.isqrt(len(queries))
    own = "vit" if "regression.weight" in added else "connector"
    changes: dict[str, Any] = {"regression_target": identity.get("target", own)}
    if not grid:
        changes = {"regression_weight": 0.0}
        if not (settings.flow_weight or settings.caption_weight or settings.answer_weight):
            changes["flow_weight"] = 1.0
    elif not settings.regression_weight:
        changes["regression_weight"] = ObjectiveSettings.regression_weight
    settings = dataclasses.replace(settings, **changes)
    _check_identity(identity, settings)
    count = queries_of(grids_of(grid))
    encoder = open_encoder(settings, weight.device, weight.dtype) if grid else None
    with torch.device("meta"):
        objective = UnoObjective(
            opened.model,
            opened.codec,
            settings,
            KernelSettings().resolved(),
            count,
            encoder,
        )
    for name, parameter in list(objective.named_parameters()):
        if name.startswith("model."):
            continue
        values = added[name]
        if values.shape != parameter.shape or count != len(added["metaqueries.weight"]):
            raise SettingsError(
                "--checkpoint",
                f"its {name} has shape {list(values.shape)}, the model needs "
                f"{list(parameter.shape)}.",
            )
        owner, _, leaf = name.rpartition(".")
        placed = values.to(device=weight.device, dtype=weight.dtype)
        setattr(objective.get_submodule(owner), leaf, nn.Parameter(placed, requires_grad=False))
    return Subject(objective.eval(), opened.tokenizer, grid)


def _check_identity(identity: Mapping[str, Any], settings: ObjectiveSettings) -> None:
    """Raises SettingsError for values that no run wrote, and for another encoder."""
    grids = identity.get("grids", [1])
    plain = isinstance(grids, list) and all(type(side) is int and side > 0 for side in grids)
    if not plain or settings.regression_target not in REGRESSION_TARGETS:
        raise SettingsError(
            "--checkpoint", f"its regression is {printable(dict(identity))}, which no run wrote."
        )
    if "encoder" in identity and vision_folder_of(settings).digest() != identity["encoder"]:
        raise SettingsError(
            "--checkpoint",
            f"its regression targets are of another encoder than {settings.regression_encoder}.",
        )
