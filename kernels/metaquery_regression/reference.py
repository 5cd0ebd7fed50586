"""Metaquery regression loss in plain torch: the specification.

Shape suffixes: docs/notation.md.
"""

import torch
import torch.nn.functional as F

from uno_ds.kernels.metaquery_regression.contrast_reference import direction
from uno_ds.kernels.metaquery_regression.contrast_reference import (
    metaquery_contrast as metaquery_contrast,
)
from uno_ds.kernels.metaquery_regression.kinds import RegressionKind


def metaquery_regression(
    hidden_MH: torch.Tensor,
    weight_WH: torch.Tensor | None,
    target_MW: torch.Tensor,
    kind: RegressionKind,
) -> torch.Tensor:
    """Loss of each row between the normalised prediction p = weight @ hidden and the normalised
    target z, in fp32 or fp64.

    cosine: 1 - p.z; l2: |p - z|^2; smooth_l1: Huber with beta 1, summed over features. A row whose
    norm is at most 1e-6 has no direction: it counts as 0 and gets a gradient of 0."""
    prediction = hidden_MH if weight_WH is None else hidden_MH @ weight_WH.T
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = direction(prediction.to(wide)), direction(target_MW.to(wide))
    return DISTANCES[kind](prediction, target)


def _cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - (prediction * target).sum(dim=-1)


def _l2(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).square().sum(dim=-1)


def _smooth_l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(prediction, target, reduction="none").sum(dim=-1)


DISTANCES = {
    RegressionKind.COSINE: _cosine,
    RegressionKind.L2: _l2,
    RegressionKind.SMOOTH_L1: _smooth_l1,
}
