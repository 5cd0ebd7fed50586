"""Projections of both experts by the grouped GEMM that megablocks uses (package grouped_gemm)."""

import torch

from uno_ds.kernels.expert_products.api import OptionalPair, Pair
from uno_ds.kernels.expert_products.joint import joint_product


def expert_product(
    x_TI: torch.Tensor, understanding: int, weights_OI: Pair, biases_O: OptionalPair
) -> torch.Tensor:
    """Same as the specification, shapes as there."""
    return joint_product(_grouped, x_TI, understanding, weights_OI, biases_O)


def _grouped(
    rows_TJ: torch.Tensor, weights_GOI: torch.Tensor, understanding: int, transposed: bool
) -> torch.Tensor:
    from megablocks import grouped_gemm_util

    if not len(rows_TJ):  # refused by some releases
        return rows_TJ.new_empty(0, weights_GOI.shape[1 if transposed else 2])
    # It reads them on the host.
    sizes = torch.tensor([understanding, len(rows_TJ) - understanding], dtype=torch.int64)
    out: torch.Tensor = grouped_gemm_util.ops.gmm(
        rows_TJ.contiguous(), weights_GOI, sizes, trans_b=transposed
    )
    return out
