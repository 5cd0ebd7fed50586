"""Segment-masked attention in plain torch: the specification. Any dtype up to fp64, differentiable.

Legend of shape suffixes: Q query rows, T key rows, N query heads, K key heads, D head dim.
"""
import torch

from uno_ds.kernels.plan import AttentionPlan


def conditioning_attention(q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that the plan shows to each query. A row that sees nothing gives 0."""
    groups = q_QND.shape[1] // k_TKD.shape[1]
    k_TND, v_TND = k_TKD.repeat_interleave(groups, dim=1), v_TKD.repeat_interleave(groups, dim=1)
    visible = plan.visible()
    scores = torch.einsum("qnd,tnd->nqt", q_QND, k_TND) * q_QND.shape[-1] ** -0.5
    # A row that sees nothing is uniform after the softmax; its weights are cleared below.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.einsum("nqt,tnd->qnd", weights.masked_fill(~visible, 0.0), v_TND)
