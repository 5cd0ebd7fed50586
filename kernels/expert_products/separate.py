"""Projections of both experts as a product for each: the specification."""

import torch
import torch.nn.functional as F

from uno_ds.kernels.expert_products.api import OptionalPair, Pair


def expert_product(
    x_Ti: torch.Tensor, understanding: int, weights_oi: Pair, biases_o: OptionalPair
) -> torch.Tensor:
    """[T, o]."""
    rows = x_Ti[:understanding], x_Ti[understanding:]
    products = [
        F.linear(x, weight, bias)
        for x, weight, bias in zip(rows, weights_oi, biases_o, strict=True)
    ]
    return torch.cat(products)
