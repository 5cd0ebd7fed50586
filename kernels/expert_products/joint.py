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

# function(rows, weights [2, o, i], rows of the first expert, transposed): rows times the weight of
# their expert, [T, i] from rows [T, o], or `transposed` [T, o] from rows [T, i].
GroupedProduct = Callable[[torch.Tensor, torch.Tensor, int, bool], torch.Tensor]


def joint_product(
    grouped: GroupedProduct,
    x_Ti: torch.Tensor,
    understanding: int,
    weights_oi: Pair,
    biases_o: OptionalPair,
) -> torch.Tensor:
    """[T, o]."""
    out: torch.Tensor = _JointProduct.apply(grouped, x_Ti, understanding, *weights_oi, *biases_o)
    return out


class _JointProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grouped: GroupedProduct,
        x_Ti: torch.Tensor,
        understanding: int,
        first_oi: torch.Tensor,
        second_oi: torch.Tensor,
        first_bias_o: torch.Tensor | None,
        second_bias_o: torch.Tensor | None,
    ) -> torch.Tensor:
        a_weight_trains = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x_Ti if a_weight_trains else None, first_oi, second_oi)
        ctx.grouped, ctx.understanding = grouped, understanding
        out_To = grouped(x_Ti, torch.stack([first_oi, second_oi]), understanding, True)
        if first_bias_o is not None and second_bias_o is not None:
            out_To[:understanding] += first_bias_o
            out_To[understanding:] += second_bias_o
        return out_To

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_To: torch.Tensor) -> tuple[Any, ...]:
        x_Ti, *weights_oi = ctx.saved_tensors
        gradient_To = gradient_To.contiguous()
        rows = slice(ctx.understanding), slice(ctx.understanding, None)
        x_gradient_Ti = None
        if ctx.needs_input_grad[1]:
            stacked = torch.stack(weights_oi)
            x_gradient_Ti = ctx.grouped(gradient_To, stacked, ctx.understanding, False)
        weight_gradients = [
            gradient_To[own].T @ x_Ti[own] if wanted else None
            for own, wanted in zip(rows, ctx.needs_input_grad[3:5], strict=True)
        ]
        bias_gradients = [
            gradient_To[own].sum(dim=0) if wanted else None
            for own, wanted in zip(rows, ctx.needs_input_grad[5:7], strict=True)
        ]
        return None, x_gradient_Ti, None, *weight_gradients, *bias_gradients
