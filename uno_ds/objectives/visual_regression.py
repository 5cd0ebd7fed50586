"""Metaqueries: learned tokens at which the understanding expert predicts the visual encoder's
features of the clean image.

Shape suffixes: docs/notation.md."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from uno_ds.kernels.metaquery_regression import metaquery_contrast, metaquery_regression
from uno_ds.sequence.batch import RegressionTargets

if TYPE_CHECKING:
    from uno_ds.objectives.uno import ObjectiveSettings


CONTRASTIVE = "contrastive"
# Given this rank's targets [M, W]: (those of all ranks, number of the first of its own).
Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


class MetaqueryRegression(nn.Module):
    """The linear head and its loss. `target_width` None: no head, hidden states are compared with
    the target directly."""

    # How training/kernel_check compares the backend.
    checked_as = "regression"

    def __init__(self, hidden: int, target_width: int | None, kind: str, backend: str):
        super().__init__()
        self.weight = _head(hidden, target_width)
        self.kind = kind
        self.backend = backend
        # The kernel check replaces it to record its inputs.
        self.compute = metaquery_regression

    def forward(self, hidden_MH: torch.Tensor, target_MW: torch.Tensor) -> torch.Tensor:
        """[M]: loss of each metaquery."""
        return self.compute(hidden_MH, self.weight, target_MW, self.kind, self.backend)


class MetaqueryContrast(nn.Module):
    """The linear head and the contrastive loss: the prediction is to be nearer to its own target
    than to those of all other metaqueries. `gather`: adds the targets of other ranks; collective,
    so every rank calls `forward` equally often."""

    checked_as = "contrast"

    def __init__(self, hidden: int, target_width: int | None, temperature: float, backend: str):
        super().__init__()
        self.weight = _head(hidden, target_width)
        self.temperature = temperature
        self.backend = backend
        self.gather: Gather | None = None
        # The kernel check replaces it to record its inputs.
        self.compute = metaquery_contrast

    def forward(self, hidden_MH: torch.Tensor, target_MW: torch.Tensor) -> torch.Tensor:
        """[M]: loss of each metaquery."""
        candidates_OW, first = target_MW, 0
        if self.gather is not None:
            candidates_OW, first = self.gather(target_MW)
        return self.compute(
            hidden_MH, self.weight, candidates_OW, first, self.temperature, self.backend
        )


def _head(hidden: int, target_width: int | None) -> nn.Parameter | None:
    return None if target_width is None else nn.Parameter(torch.empty(target_width, hidden))


def regression_module(
    settings: "ObjectiveSettings", hidden: int, target_width: int | None, backend: str
) -> MetaqueryRegression | MetaqueryContrast:
    """The module of objective.regression_loss."""
    if settings.regression_loss == CONTRASTIVE:
        temperature = settings.regression_temperature
        return MetaqueryContrast(hidden, target_width, temperature, backend)
    return MetaqueryRegression(hidden, target_width, settings.regression_loss, backend)


def regression_targets(features_PW: torch.Tensor, targets: RegressionTargets) -> torch.Tensor:
    """[M, W]: the target of every metaquery, from its image's features or prepared before training;
    constants."""
    prepared_EW = targets.prepared_EW.reshape(-1, features_PW.shape[1]).to(features_PW.dtype)
    return torch.cat([grid_targets(features_PW, targets), prepared_EW])[targets.source_M]


def grid_targets(features_PW: torch.Tensor, targets: RegressionTargets) -> torch.Tensor:
    """[R, W]: mean feature of the clean target image over each metaquery's grid cell; constants."""
    cells_RPW = features_PW.detach()[targets.patches_RP]
    return (cells_RPW * targets.weights_RP[..., None].to(cells_RPW.dtype)).sum(dim=1)
