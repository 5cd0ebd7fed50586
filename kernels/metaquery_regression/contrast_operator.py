"""The Triton kernels of the contrastive loss as one operator with a registered backward, so that
torch.compile and FLOP counters see it.

The prediction [M, W] is stored, the scores [M, O] are not: backward holds the slope of some rows at
a time. Shape suffixes: docs/notation.md.
"""

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from uno_ds.kernels import launch
from uno_ds.kernels.accumulate import add_product
from uno_ds.kernels.metaquery_regression import contrast_tiles
from uno_ds.kernels.metaquery_regression.contrast_reference import EPSILON

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the slope of as many rows as fit.
WORKSPACE_BYTES = 12_000_000
# Candidates whose scores one program goes through: few enough that several programs share a row.
RANGE = 512
LOSS_ROWS = 128
# Up to here smaller row tiles are needed to occupy every multiprocessor.
FEW_ROWS = 1024
SUMS = contrast_tiles.SUMS.value


def metaquery_contrast(
    hidden_MH: torch.Tensor,
    weight_WH: torch.Tensor | None,
    candidates_OW: torch.Tensor,
    first: int,
    temperature: float,
) -> torch.Tensor:
    """Same result as the reference, in fp32, bit-identical from run to run; on one CUDA device (on
    the CPU under TRITON_INTERPRET=1)."""
    name = "triton regression"
    launch.check_device(name, hidden=hidden_MH, weight=weight_WH, candidates=candidates_OW)
    if hidden_MH.dtype not in DTYPES:
        raise ValueError(
            "The triton regression computes in bfloat16, float16 or float32, got "
            f"{hidden_MH.dtype}."
        )
    prediction_MW = hidden_MH if weight_WH is None else hidden_MH @ weight_WH.T
    candidates_OW = candidates_OW.detach().to(prediction_MW.dtype).contiguous()
    return torch.ops.uno_ds.metaquery_contrast(
        prediction_MW.contiguous(), candidates_OW, first, temperature
    )[0]


def forward(
    prediction: torch.Tensor, candidates: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [M], logarithm of the sum of exponentials [M])."""
    rows, columns = len(prediction), len(candidates)
    loss = prediction.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss)
    if not rows:
        return loss, lse
    ranges = triton.cdiv(columns, RANGE)
    sums = prediction.new_empty(ranges, SUMS, rows, dtype=torch.float32)
    tiles = _Tiles(prediction, candidates)
    programs = triton.cdiv(rows, tiles.rows) * ranges
    given = (*tiles.tensors, sums, rows, columns, first, 1 / temperature)
    tiles.start(contrast_tiles.contrast_sums, programs, *given, RANGE=RANGE)
    blocks = triton.cdiv(rows, LOSS_ROWS)
    launch.start(
        contrast_tiles.contrast_loss, blocks, sums, lse, loss, rows, ranges, BLOCK_M=LOSS_ROWS
    )
    return loss, lse


def backward(
    grad: torch.Tensor,
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    lse: torch.Tensor,
    first: int,
    temperature: float,
) -> torch.Tensor:
    """Gradient of the prediction."""
    rows, columns = len(prediction), len(candidates)
    d_prediction = torch.empty_like(prediction)
    if not rows:
        return d_prediction
    tiles = _Tiles(prediction, candidates)
    part = min(rows, rows_of_part(columns, prediction.element_size()))
    slope = prediction.new_empty(part, columns)
    for begin in range(0, rows, part):
        end = min(begin + part, rows)
        programs = triton.cdiv(end - begin, tiles.rows) * triton.cdiv(columns, tiles.columns)
        given = (*tiles.tensors, lse, grad, slope, begin, end, columns, first, 1 / temperature)
        tiles.start(contrast_tiles.contrast_slope, programs, *given)
        # Of the direction; the projection makes it that of the prediction.
        d_direction = prediction.new_zeros(end - begin, prediction.shape[1], dtype=torch.float32)
        add_product(d_direction, slope[: end - begin], candidates)
        scale_M1 = tiles.scales[begin:end, None]
        unit = prediction[begin:end] * scale_M1
        along_M1 = (d_direction * unit).sum(dim=1, keepdim=True)
        d_prediction[begin:end] = scale_M1 * (d_direction - along_M1 * unit)
    return d_prediction


def rows_of_part(columns: int, element_size: int) -> int:
    """Rows of the workspace."""
    return max(1, WORKSPACE_BYTES // (columns * element_size))


class _Tiles:
    """Starts kernels over tiles of rows and candidates with the parameters of the launch table."""

    def __init__(self, prediction: torch.Tensor, candidates: torch.Tensor):
        self.scales, lengths = _inverse_norms(prediction), _inverse_norms(candidates)
        self.tensors = prediction, candidates, self.scales, lengths
        shape = "few_rows" if len(prediction) <= FEW_ROWS else "many_rows"
        chosen = launch.parameters(__package__, prediction, shape, "scores")
        self.rows, self.columns = chosen["BLOCK_M"], chosen["BLOCK_O"]
        self.constants = {
            "num_warps": chosen.pop("warps"),
            "num_stages": chosen["STAGES"],
            **chosen,
            "W": prediction.shape[1],
        }

    def start(self, kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
        launch.start(kernel, programs, *arguments, **self.constants, **constants)


def _inverse_norms(rows_MW: torch.Tensor) -> torch.Tensor:
    """[M], fp32; 0 for a row without direction."""
    norm_M = torch.linalg.vector_norm(rows_MW, dim=1, dtype=torch.float32)
    known_M = norm_M > EPSILON
    return known_M / norm_M.where(known_M, 1.0)


@torch.library.custom_op("uno_ds::metaquery_contrast", mutates_args=())
def _forward(
    prediction: torch.Tensor, candidates: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(prediction, candidates, first, temperature)


@_forward.register_fake
def _(
    prediction: torch.Tensor, candidates: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = prediction.new_empty(prediction.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@torch.library.custom_op("uno_ds::metaquery_contrast_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    lse: torch.Tensor,
    first: int,
    temperature: float,
) -> torch.Tensor:
    return backward(grad, prediction, candidates, lse, first, temperature)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    prediction: torch.Tensor,
    candidates: torch.Tensor,
    lse: torch.Tensor,
    first: int,
    temperature: float,
) -> torch.Tensor:
    return torch.empty_like(prediction)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    prediction, candidates, ctx.first, ctx.temperature = inputs
    ctx.save_for_backward(prediction, candidates, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple:
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    d_prediction = torch.ops.uno_ds.metaquery_contrast_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.first, ctx.temperature
    )
    return d_prediction, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.uno_ds.metaquery_contrast)
def _forward_flops(prediction: torch.Size, candidates: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * prediction[0] * candidates[0] * prediction[1]


@register_flop_formula(torch.ops.uno_ds.metaquery_contrast_backward)
def _backward_flops(
    grad: torch.Size, prediction: torch.Size, candidates: torch.Size, *_: Any, **__: Any
) -> int:
    # The scores are recomputed.
    return 2 * 2 * prediction[0] * candidates[0] * prediction[1]
