"""Projections of both experts by torch's grouped_mm: one launch on GPUs of compute capability 9.0
and 10.0 in bf16. Elsewhere torch loops over products and reads the group sizes back first."""

import torch
import torch.nn.functional as F

from uno_ds.kernels.expert_products.api import OptionalPair, Pair
from uno_ds.kernels.expert_products.joint import joint_product


def expert_product(
    x_Ti: torch.Tensor, understanding: int, weights_oi: Pair, biases_o: OptionalPair
) -> torch.Tensor:
    """Same as the specification, shapes as there. Rows of x and of the weights have to be multiples
    of 16 bytes."""
    return joint_product(_grouped, x_Ti, understanding, weights_oi, biases_o)


def _grouped(
    rows_Ti: torch.Tensor, weights_2oi: torch.Tensor, understanding: int, transposed: bool
) -> torch.Tensor:
    # Filled on the device: a tensor from a list would be a copy that the host waits for.
    ends = torch.empty(2, dtype=torch.int32, device=rows_Ti.device).fill_(len(rows_Ti))
    ends[:1].fill_(understanding)
    weights = weights_2oi.transpose(1, 2) if transposed else weights_2oi
    return F.grouped_mm(rows_Ti.contiguous(), weights, offs=ends)
