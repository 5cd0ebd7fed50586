"""Cross entropy of a linear head, a chunk of rows at a time: the logits of all rows are never
stored.

With a frozen head forward also computes the gradient of `hidden`, two products a row, and backward
only scales it by row. With a head that trains backward recomputes the logits, since the gradient of
the weight is a sum over rows that are scaled differently. A chunk is computed by torch or by
liger-kernel. Liger's own function around its kernel is not used: it waits for the device twice a
call, and it does not accept zero rows.

Shape suffixes: docs/notation.md.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from uno_ds.kernels.accumulate import add_product

# Of the logits of a chunk in fp32. 448 rows at 152,064 tokens: enough that a product is not bound
# by reading the head's weight.
LOGITS_BYTES = 2**28


def linear_cross_entropy(
    hidden_YH: torch.Tensor, weight_VH: torch.Tensor, labels_Y: torch.Tensor, liger: bool = False
) -> torch.Tensor:
    """Same result as the reference. `liger`: the kernel of liger-kernel instead of torch within a
    chunk."""
    trains = torch.is_grad_enabled() and weight_VH.requires_grad
    at_once = torch.is_grad_enabled() and hidden_YH.requires_grad and not trains
    return torch.ops.uno_ds.linear_cross_entropy(
        hidden_YH.contiguous(), weight_VH, labels_Y.contiguous(), liger, at_once
    )[0]


def _by_torch(
    logits_ZV: torch.Tensor, labels_Z: torch.Tensor, wants_slope: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each row, gradient of the logits in their dtype; it may overwrite them)."""
    wide_ZV = logits_ZV.to(torch.promote_types(logits_ZV.dtype, torch.float32))
    total_Z1 = wide_ZV.logsumexp(dim=1, keepdim=True)
    loss_Z1 = total_Z1 - wide_ZV.gather(1, labels_Z[:, None])
    if wants_slope:
        # expm1 for the label's own entry p - 1, which would lose digits by cancellation.
        wide_ZV.sub_(total_Z1).exp_().scatter_(1, labels_Z[:, None], torch.expm1(-loss_Z1))
    return loss_Z1[:, 0], wide_ZV.to(logits_ZV.dtype)


def _by_liger(
    logits_ZV: torch.Tensor, labels_Z: torch.Tensor, wants_slope: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_by_torch`; the gradient overwrites the logits."""
    import triton
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    from uno_ds.kernels import launch

    rows, vocabulary = logits_ZV.shape
    loss_Z = logits_ZV.new_empty(rows, dtype=torch.float32)
    unused = {
        "weight_ptr": None,
        "z_loss_ptr": None,
        "token_accuracy_ptr": None,
        "token_accuracy_stride": 0,
        "predicted_tokens_ptr": None,
        "predicted_tokens_stride": 0,
        "n_non_ignore": rows,
        "sum_non_ignore_weight": rows,
        "weight_sum": 0.0,
        "ignore_index": -100,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "none",
        "softcap": None,
        "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False,
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False,
    }
    launch.start(
        liger_cross_entropy_kernel,
        rows,
        logits_ZV,
        X_stride=logits_ZV.stride(0),
        Y_ptr=labels_Z,
        Y_stride=1,
        loss_ptr=loss_Z,
        loss_stride=1,
        n_cols=vocabulary,
        HAS_GRADIENTS=wants_slope,
        BLOCK_SIZE=min(2**15, triton.next_power_of_2(vocabulary)),
        num_warps=32,
        **unused,
    )
    return loss_Z, logits_ZV


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
    rows = rows // 64 * 64 or rows
    for start in range(0, len(hidden), rows):
        yield slice(start, min(start + rows, len(hidden)))


def _within(
    liger: bool,
) -> Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]:
    return _by_liger if liger else _by_torch


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, liger: bool, at_once: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [Y], gradient of hidden [Y, H] for an upstream gradient of 1 if `at_once`, else
    empty)."""
    loss = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    d_hidden = torch.empty_like(hidden) if at_once else hidden.new_empty(0)
    for rows in _chunks(hidden, weight):
        loss[rows], slope = _within(liger)(hidden[rows] @ weight.T, labels[rows], at_once)
        if at_once:
            torch.mm(slope, weight, out=d_hidden[rows])
    return loss, d_hidden


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    liger: bool,
    wants_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of hidden or empty, gradient of weight) of a head that trains."""
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows in _chunks(hidden, weight):
        _, slope = _within(liger)(hidden[rows] @ weight.T, labels[rows], True)
        slope = slope.mul_(grad[rows, None])
        if wants_hidden:
            torch.mm(slope, weight, out=d_hidden[rows])
        add_product(total, slope.T, hidden[rows])
    return d_hidden, total.to(weight.dtype)


@torch.library.custom_op("uno_ds::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, liger: bool, at_once: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(hidden, weight, labels, liger, at_once)


@_forward.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, liger: bool, at_once: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden) if at_once else hidden.new_empty(0)


@torch.library.custom_op("uno_ds::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    liger: bool,
    wants_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return backward(grad, hidden, weight, labels, liger, wants_hidden)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    liger: bool,
    wants_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    return d_hidden, torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, labels, ctx.liger, ctx.at_once = inputs
    # A frozen head's weight is not kept: backward does not read it, and under ZeRO-3 it need not be
    # gathered again.
    saved = (output[1],) if ctx.at_once else (hidden, weight, labels)
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple:
    if ctx.at_once:
        (d_hidden,) = ctx.saved_tensors
        return (d_hidden * grad[:, None]).to(d_hidden.dtype), None, None, None, None
    wants_hidden = ctx.needs_input_grad[0]
    d_hidden, d_weight = torch.ops.uno_ds.linear_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.liger, wants_hidden
    )
    return d_hidden if wants_hidden else None, d_weight, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.uno_ds.linear_cross_entropy)
def _forward_flops(
    hidden: torch.Size,
    weight: torch.Size,
    labels: torch.Size,
    liger: bool,
    at_once: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * (1 + at_once) * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.uno_ds.linear_cross_entropy_backward)
def _backward_flops(
    grad: torch.Size,
    hidden: torch.Size,
    weight: torch.Size,
    labels: torch.Size,
    liger: bool,
    wants_hidden: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * (2 + wants_hidden) * hidden[0] * hidden[1] * weight[0]
