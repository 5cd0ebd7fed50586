"""Projections of both experts by torch's grouped_mm: one launch on GPUs of compute capability 9.0
and 10.0 in bf16. Elsewhere torch loops over products and reads the group sizes back first."""

import torch
import torch.nn.functional as F

from uno_ds.kernels.expert_products.api import OptionalPair, Pair
from uno_ds.kernels.expert_products.joint import joint_product


def expert_product(
    x_TI: torch.Tensor, understanding: int, weights_OI: Pair, biases_O: OptionalPair
) -> torch.Tensor:
    """Same as the specification, shapes as there. Rows of x and of the weights have to be multiples
    of 16 bytes."""
    return joint_product(_grouped, x_TI, understanding, weights_OI, biases_O)


def _grouped(
    rows_TJ: torch.Tensor, weights_GOI: torch.Tensor, understanding: int, transposed: bool
) -> torch.Tensor:
    # Filled on the device: a tensor from a list would be a copy that the host waits for.
    ends = torch.empty(2, dtype=torch.int32, device=rows_TJ.device).fill_(len(rows_TJ))
    ends[:1].fill_(understanding)
    weights = weights_GOI.transpose(1, 2) if transposed else weights_GOI
    return F.grouped_mm(rows_TJ.contiguous(), weights, offs=ends)
