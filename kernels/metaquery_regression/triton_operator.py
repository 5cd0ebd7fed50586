"""The Triton kernels as one operator with a registered backward, so that torch.compile and FLOP
counters see it.

Shape suffixes: docs/notation.md.
"""

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from uno_ds.kernels import launch
from uno_ds.kernels.accumulate import add_product
from uno_ds.kernels.metaquery_regression import tiles
from uno_ds.kernels.metaquery_regression.contrast_operator import (
    metaquery_contrast as metaquery_contrast,
)
from uno_ds.kernels.metaquery_regression.kinds import RegressionKind

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The gradient of the prediction of as many rows as fit is held at a time: [N, D] never is.
WORKSPACE_BYTES = 12_000_000
# Rows of a part of it are a multiple of every row tile.
PART = 128
LOSS_ROWS = 128
# Up to here smaller row tiles are needed to occupy every multiprocessor.
FEW_ROWS = 1024
STATISTICS = tiles.STATISTICS.value
MOST_ROWS = 2**31 - 2 * PART


def metaquery_regression(
    hidden_MH: torch.Tensor,
    weight_WH: torch.Tensor | None,
    target_MW: torch.Tensor,
    kind: RegressionKind,
) -> torch.Tensor:
    """Same result as the reference, in fp32, bit-identical from run to run; on one CUDA device (on
    the CPU under TRITON_INTERPRET=1)."""
    launch.check_device("triton regression", hidden=hidden_MH, weight=weight_WH, target=target_MW)
    if hidden_MH.dtype not in DTYPES:
        raise ValueError(
            "The triton regression computes in bfloat16, float16 or float32, got "
            f"{hidden_MH.dtype}."
        )
    if len(hidden_MH) > MOST_ROWS or target_MW.shape[1] * hidden_MH.shape[1] >= 2**31:
        raise ValueError(
            "The triton regression numbers rows and weights with 32 bits, too few for hidden "
            f"{list(hidden_MH.shape)} and target {list(target_MW.shape)}."
        )
    # Outside the operator, so that a strided hidden gets its gradient through the copy.
    hidden_MH = hidden_MH.contiguous()
    target_MW = target_MW.detach().contiguous()
    weight_WH = weight_WH if weight_WH is None else weight_WH.contiguous()
    return torch.ops.uno_ds.metaquery_regression(hidden_MH, weight_WH, target_MW, int(kind))[0]


def forward(
    hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss [M] and the statistics [3, M] that backward reads."""
    rows = len(target)
    loss = hidden.new_empty(rows, dtype=torch.float32)
    statistics = hidden.new_empty(STATISTICS, rows, dtype=torch.float32)
    if not rows:
        return loss, statistics
    over_tiles = _OverTiles(hidden, weight, target)
    sums = hidden.new_empty(over_tiles.count, STATISTICS, rows, dtype=torch.float32)
    over_tiles.start(tiles.regression_sums, rows, target, sums, rows)
    per_row = sums, statistics, loss, rows
    blocks = triton.cdiv(rows, LOSS_ROWS)
    constants = {"TILES": over_tiles.count, "BLOCK_M": LOSS_ROWS}
    launch.start(tiles.regression_loss, blocks, *per_row, KIND=kind, **constants)
    if kind == RegressionKind.SMOOTH_L1:
        over_tiles.start(tiles.regression_clipped_sums, rows, target, statistics, sums, rows)
        launch.start(tiles.regression_clipped_loss, blocks, *per_row, **constants)
    return loss, statistics


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    target: torch.Tensor,
    statistics: torch.Tensor,
    kind: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of hidden, gradient of weight); empty where it is not wanted."""
    rows, features = target.shape
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    total = None
    if wants_weight:
        assert weight is not None, "only a head has a gradient"
        total = torch.zeros_like(weight, dtype=torch.float32)
    if rows:
        over_tiles = _OverTiles(hidden, weight, target)
        part = rows if weight is None else min(rows, rows_of_part(features, hidden.element_size()))
        slope = d_hidden if weight is None else hidden.new_empty(part, features)
        for first in range(0, rows, part):
            count = min(part, rows - first)
            over_tiles.start(
                tiles.regression_slope,
                count,
                target,
                statistics,
                grad,
                slope,
                first,
                rows,
                KIND=kind,
            )
            if weight is not None and wants_hidden:
                torch.mm(slope[:count], weight, out=d_hidden[first : first + count])
            if total is not None:
                add_product(total, slope[:count].T, hidden[first : first + count])
    if weight is None or total is None:
        return d_hidden, hidden.new_empty(0)
    return d_hidden, total.to(weight.dtype)


def rows_of_part(features: int, element_size: int) -> int:
    """Rows of the workspace: a multiple of PART where that many fit."""
    fitting = WORKSPACE_BYTES // (features * element_size)
    return max(1, fitting if fitting < PART else fitting // PART * PART)


class _OverTiles:
    """Starts kernels over row tiles and feature tiles with the parameters of the launch table."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor):
        self.tensors = hidden, hidden if weight is None else weight
        shape = "few_rows" if len(hidden) <= FEW_ROWS else "many_rows"
        chosen = launch.parameters(__package__, hidden, shape, "prediction")
        self.constants = {
            "num_warps": chosen.pop("warps"),
            "num_stages": chosen["STAGES"],
            **chosen,
            "H": hidden.shape[1],
            "D": target.shape[1],
            "HAS_HEAD": weight is not None,
        }
        self.count = triton.cdiv(target.shape[1], chosen["BLOCK_D"])

    def start(
        self, kernel: Any, rows: int, *arguments: torch.Tensor | int, **constants: int
    ) -> None:
        programs = triton.cdiv(rows, self.constants["BLOCK_M"]) * self.count
        launch.start(kernel, programs, *self.tensors, *arguments, **self.constants, **constants)


@torch.library.custom_op("uno_ds::metaquery_regression", mutates_args=())
def _forward(
    hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(hidden, weight, target, kind)


@_forward.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, hidden.new_empty((STATISTICS, hidden.shape[0]), dtype=torch.float32)


@torch.library.custom_op("uno_ds::metaquery_regression_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    target: torch.Tensor,
    statistics: torch.Tensor,
    kind: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return backward(grad, hidden, weight, target, statistics, kind, wants_hidden, wants_weight)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    target: torch.Tensor,
    statistics: torch.Tensor,
    kind: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    if weight is None or not wants_weight:
        return d_hidden, hidden.new_empty(0)
    return d_hidden, torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, ctx.kind = inputs
    ctx.save_for_backward(hidden, weight, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple:
    hidden, weight, target, statistics = ctx.saved_tensors
    wants_hidden = ctx.needs_input_grad[0]
    wants_weight = ctx.needs_input_grad[1] and weight is not None
    d_hidden, d_weight = torch.ops.uno_ds.metaquery_regression_backward(
        grad.contiguous(),
        hidden,
        weight,
        target,
        statistics,
        ctx.kind,
        wants_hidden,
        wants_weight,
    )
    return d_hidden if wants_hidden else None, d_weight if wants_weight else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.uno_ds.metaquery_regression)
def _forward_flops(
    hidden: torch.Size, weight: torch.Size | None, target: torch.Size, kind: int, *_: Any, **__: Any
) -> int:
    if weight is None:
        return 0
    passes = 2 if kind == RegressionKind.SMOOTH_L1 else 1
    return 2 * passes * hidden[0] * hidden[1] * target[1]


@register_flop_formula(torch.ops.uno_ds.metaquery_regression_backward)
def _backward_flops(
    grad: torch.Size,
    hidden: torch.Size,
    weight: torch.Size | None,
    target: torch.Size,
    statistics: torch.Size,
    kind: int,
    wants_hidden: bool,
    wants_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    if weight is None:
        return 0
    # The prediction is recomputed.
    products = 1 + wants_hidden + wants_weight
    return 2 * products * hidden[0] * hidden[1] * target[1]
