"""Projections of both experts as a product for each: the specification."""

import torch
import torch.nn.functional as F

from uno_ds.kernels.expert_products.api import OptionalPair, Pair


def expert_product(
    x_TI: torch.Tensor, understanding: int, weights_OI: Pair, biases_O: OptionalPair
) -> torch.Tensor:
    """[T, O]."""
    rows = x_TI[:understanding], x_TI[understanding:]
    products = [
        F.linear(x, weight, bias)
        for x, weight, bias in zip(rows, weights_OI, biases_O, strict=True)
    ]
    return torch.cat(products)
