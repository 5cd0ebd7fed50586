"""Metaqueries: learned tokens at which the understanding expert predicts the visual encoder's
features of the clean image.

Shape suffixes: docs/notation.md."""

import torch
from torch import nn

from uno_ds.kernels.metaquery_regression import metaquery_regression
from uno_ds.sequence.batch import RegressionTargets


class MetaqueryRegression(nn.Module):
    """The linear head and its loss. `target_width` None: no head, hidden states are compared with
    the target directly."""

    def __init__(self, hidden: int, target_width: int | None, kind: str, backend: str):
        super().__init__()
        self.weight = None
        if target_width is not None:
            self.weight = nn.Parameter(torch.empty(target_width, hidden))
        self.kind = kind
        self.backend = backend
        # The kernel check replaces it to record its inputs.
        self.compute = metaquery_regression

    def forward(self, hidden_MH: torch.Tensor, target_MW: torch.Tensor) -> torch.Tensor:
        """[M]: loss of each metaquery."""
        return self.compute(hidden_MH, self.weight, target_MW, self.kind, self.backend)


def regression_targets(features_PW: torch.Tensor, targets: RegressionTargets) -> torch.Tensor:
    """[M, W]: the target of every metaquery, from its image's features or prepared before training;
    constants."""
    prepared_EW = targets.prepared_EW.reshape(-1, features_PW.shape[1]).to(features_PW.dtype)
    return torch.cat([grid_targets(features_PW, targets), prepared_EW])[targets.source_M]


def grid_targets(features_PW: torch.Tensor, targets: RegressionTargets) -> torch.Tensor:
    """[R, W]: mean feature of the clean target image over each metaquery's grid cell; constants."""
    cells_RPW = features_PW.detach()[targets.patches_RP]
    return (cells_RPW * targets.weights_RP[..., None].to(cells_RPW.dtype)).sum(dim=1)
