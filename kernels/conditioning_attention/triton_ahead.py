"""The Triton kernels with another forward: it issues the next block's scores before this block's
softmax. A check on the GPU times both."""

import torch

from uno_ds.kernels.conditioning_attention import triton_operator
from uno_ds.kernels.plan import AttentionPlan


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """As of `triton_operator`. Raises ValueError where the launch table has no such kernel."""
    return triton_operator.attention_and_lse(q_QND, k_TKD, v_TKD, plan, ahead=True)[0]
