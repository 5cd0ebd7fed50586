"""Projections of both experts by the grouped GEMM that megablocks uses (package grouped_gemm)."""

import torch

from uno_ds.kernels.expert_products.api import OptionalPair, Pair
from uno_ds.kernels.expert_products.joint import joint_product


def expert_product(
    x_Ti: torch.Tensor, understanding: int, weights_oi: Pair, biases_o: OptionalPair
) -> torch.Tensor:
    """Same as the specification, shapes as there."""
    return joint_product(_grouped, x_Ti, understanding, weights_oi, biases_o)


def _grouped(
    rows_Ti: torch.Tensor, weights_2oi: torch.Tensor, understanding: int, transposed: bool
) -> torch.Tensor:
    from megablocks import grouped_gemm_util

    if not len(rows_Ti):  # refused by some releases
        return rows_Ti.new_empty(0, weights_2oi.shape[1 if transposed else 2])
    # It reads them on the host.
    sizes = torch.tensor([understanding, len(rows_Ti) - understanding], dtype=torch.int64)
    out: torch.Tensor = grouped_gemm_util.ops.gmm(
        rows_Ti.contiguous(), weights_2oi, sizes, trans_b=transposed
    )
    return out
