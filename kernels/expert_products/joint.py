"""Projections of both experts as one grouped product each way, by a library's function.

Such a function reads the weights of all groups from one tensor, and the experts' weights are
parameters of their own. They are copied into one tensor for each product, in forward and again in
backward, and the copy is dropped at once: kept until backward, the copies of all projections would
be as large as the model. The gradients of the weights stay a product for each expert, computed only
where that expert trains and written into a tensor of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from uno_ds.kernels.expert_products.api import OptionalPair, Pair

# function(rows [T, J], weights [2, O, I], rows of the first expert, transposed): rows times the
# weight of their expert, [T, I] from J = O, or `transposed` [T, O] from J = I.
GroupedProduct = Callable[[torch.Tensor, torch.Tensor, int, bool], torch.Tensor]


def joint_product(
    grouped: GroupedProduct,
    x_TI: torch.Tensor,
    understanding: int,
    weights_OI: Pair,
    biases_O: OptionalPair,
) -> torch.Tensor:
    """[T, O]."""
    out: torch.Tensor = _JointProduct.apply(grouped, x_TI, understanding, *weights_OI, *biases_O)
    return out


class _JointProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grouped: GroupedProduct,
        x_TI: torch.Tensor,
        understanding: int,
        first_OI: torch.Tensor,
        second_OI: torch.Tensor,
        first_bias_O: torch.Tensor | None,
        second_bias_O: torch.Tensor | None,
    ) -> torch.Tensor:
        a_weight_trains = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x_TI if a_weight_trains else None, first_OI, second_OI)
        ctx.grouped, ctx.understanding = grouped, understanding
        out_TO = grouped(x_TI, torch.stack([first_OI, second_OI]), understanding, True)
        if first_bias_O is not None and second_bias_O is not None:
            out_TO[:understanding] += first_bias_O
            out_TO[understanding:] += second_bias_O
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: torch.Tensor) -> tuple[Any, ...]:
        x_TI, *weights_OI = ctx.saved_tensors
        gradient_TO = gradient_TO.contiguous()
        rows = slice(ctx.understanding), slice(ctx.understanding, None)
        x_gradient_TI = None
        if ctx.needs_input_grad[1]:
            stacked = torch.stack(weights_OI)
            x_gradient_TI = ctx.grouped(gradient_TO, stacked, ctx.understanding, False)
        weight_gradients = [
            gradient_TO[own].T @ x_TI[own] if wanted else None
            for own, wanted in zip(rows, ctx.needs_input_grad[3:5], strict=True)
        ]
        bias_gradients = [
            gradient_TO[own].sum(dim=0) if wanted else None
            for own, wanted in zip(rows, ctx.needs_input_grad[5:7], strict=True)
        ]
        return None, x_gradient_TI, None, *weight_gradients, *bias_gradients
