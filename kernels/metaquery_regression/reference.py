"""Metaquery regression loss in plain torch: the specification.

Legend of shape suffixes: M metaqueries, H hidden, E features of the target.
"""
import torch
import torch.nn.functional as F

EPSILON = 1e-6


def metaquery_regression(hidden_MH: torch.Tensor, weight_EH: torch.Tensor | None, target_ME: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss of each row between the normalised prediction p = weight @ hidden and the normalised target z, in fp32 or fp64.

    Rows are divided by max(norm, 1e-6). cosine: 1 - p.z; l2: |p - z|^2; smooth_l1: Huber with beta 1, summed over features.
    """
    prediction = hidden_MH if weight_EH is None else hidden_MH @ weight_EH.T
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction = F.normalize(prediction.to(wide), dim=-1, eps=EPSILON)
    target = F.normalize(target_ME.to(wide), dim=-1, eps=EPSILON)
    if kind == "cosine":
        return 1 - (prediction * target).sum(dim=-1)
    if kind == "l2":
        return (prediction - target).square().sum(dim=-1)
    return F.smooth_l1_loss(prediction, target, reduction="none").sum(dim=-1)
