"""The Triton kernels as one operator over all slabs with a registered backward, so that
torch.compile sees it.

Shape suffixes: docs/notation.md."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton

from uno_ds.kernels import launch
from uno_ds.kernels.backends import NORM_ROPE_HEAD_DIMS
from uno_ds.kernels.qk_norm_rope.rows import qk_norm_rope_backward, qk_norm_rope_forward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Heads that one program takes: enough to read the angles of its rows seldom.
MOST_HEADS = 4
Tensors = Sequence[torch.Tensor]


def qk_norm_rope(
    q_TND: Tensors,
    k_TKD: Tensors,
    v_TKD: Tensors,
    q_weight_D: Tensors,
    k_weight_D: Tensors,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    eps: float,
    place_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same result as the reference, with one rounding; gradients are bit-identical from run to
    run."""
    dim = q_TND[0].shape[2]
    named = {
        f"{name}[{number}]": slab
        for name, slabs in (
            ("q", q_TND),
            ("k", k_TKD),
            ("v", v_TKD),
            ("q_weight", q_weight_D),
            ("k_weight", k_weight_D),
        )
        for number, slab in enumerate(slabs)
    }
    launch.check_device("triton QK-norm", **named, cos=cos_TF, sin=sin_TF, place=place_T)
    if q_TND[0].dtype not in DTYPES:
        raise ValueError(
            f"The triton QK-norm computes in bfloat16, float16 or float32, got {q_TND[0].dtype}."
        )
    if dim not in NORM_ROPE_HEAD_DIMS:
        raise ValueError(
            f"The triton QK-norm takes heads of {', '.join(map(str, NORM_ROPE_HEAD_DIMS))} values, "
            f"got {dim}."
        )
    # Outside the operator, so that strided slabs get their gradients through the copy.
    slabs = [
        [x.contiguous() for x in given] for given in (q_TND, k_TKD, v_TKD, q_weight_D, k_weight_D)
    ]
    place_T = None if place_T is None else place_T.to(torch.int32).contiguous()
    return torch.ops.uno_ds.qk_norm_rope(
        *slabs, cos_TF.contiguous(), sin_TF.contiguous(), place_T, eps
    )


@torch.library.custom_op("uno_ds::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensors,
    k: Tensors,
    v: Tensors,
    q_weight: Tensors,
    k_weight: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, first = _outputs(q, k), 0
    for slab in zip(q, k, v, q_weight, k_weight):
        length = len(slab[0])
        programs, constants = _grid("forward", *slab[:2])
        if programs:
            launch.start(
                qk_norm_rope_forward,
                programs,
                *slab,
                cos,
                sin,
                cos if place is None else place,
                *out,
                first,
                length,
                eps,
                HAS_PLACE=place is not None,
                **constants,
            )
        first += length
    return out


@_forward.register_fake
def _(
    q: Tensors,
    k: Tensors,
    v: Tensors,
    q_weight: Tensors,
    k_weight: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(q, k)


@torch.library.custom_op("uno_ds::qk_norm_rope_backward", mutates_args=())
def _backward(
    q_grad: torch.Tensor,
    k_grad: torch.Tensor,
    v_grad: torch.Tensor,
    q: Tensors,
    k: Tensors,
    q_weight: Tensors,
    k_weight: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor | None,
    eps: float,
    wants_rows: Sequence[bool],
    wants_weight: Sequence[bool],
) -> list[torch.Tensor]:
    """For each slab the gradients of q, k, v, q_weight and k_weight; empty tensors where nobody
    wants them."""
    gradients, first = [], 0
    for number, slab in enumerate(zip(q, k, q_weight, k_weight)):
        made = _gradients(*slab, wants_rows[number], wants_weight[number])
        length, (_, heads, dim), key_heads = len(slab[0]), slab[0].shape, slab[1].shape[1]
        programs, constants = _grid("backward", *slab[:2])
        if programs and (wants_rows[number] or wants_weight[number]):
            blocks, taken = triton.cdiv(length, constants["BLOCK_T"]), constants["HEADS"]
            sums = [
                slab[0].new_empty(
                    (blocks * (count // taken) if wants_weight[number] else 0, dim),
                    dtype=torch.float32,
                )
                for count in (heads, key_heads)
            ]
            rows = made[:3] if wants_rows[number] else _gradients(*slab, True, False)[:3]
            launch.start(
                qk_norm_rope_backward,
                programs,
                *slab,
                cos,
                sin,
                cos if place is None else place,
                q_grad,
                k_grad,
                v_grad,
                *rows,
                *sums,
                first,
                length,
                eps,
                HAS_PLACE=place is not None,
                WANTS_WEIGHT=wants_weight[number],
                **constants,
            )
            if wants_weight[number]:
                made[3:] = [total.sum(dim=0).to(slab[2].dtype) for total in sums]
        elif wants_weight[number]:
            made[3:] = [gradient.zero_() for gradient in made[3:]]
        gradients += made
        first += length
    return gradients


@_backward.register_fake
def _(
    q_grad: torch.Tensor,
    k_grad: torch.Tensor,
    v_grad: torch.Tensor,
    q: Tensors,
    k: Tensors,
    q_weight: Tensors,
    k_weight: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor | None,
    eps: float,
    wants_rows: Sequence[bool],
    wants_weight: Sequence[bool],
) -> list[torch.Tensor]:
    return [
        gradient
        for number, slab in enumerate(zip(q, k, q_weight, k_weight))
        for gradient in _gradients(*slab, wants_rows[number], wants_weight[number])
    ]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, _, q_weight, k_weight, cos, sin, place, ctx.eps = inputs
    ctx.slabs = len(q)
    ctx.save_for_backward(*q, *k, *q_weight, *k_weight, cos, sin, place)


def _autograd(ctx: Any, q_grad: torch.Tensor, k_grad: torch.Tensor, v_grad: torch.Tensor) -> tuple:
    saved, slabs = ctx.saved_tensors, ctx.slabs
    tensors = [list(saved[start * slabs : (start + 1) * slabs]) for start in range(4)]
    wants_rows, wants_weight = (
        [any(wanted) for wanted in zip(*(ctx.needs_input_grad[place] for place in places))]
        for places in ((0, 1, 2), (3, 4))
    )
    flat = torch.ops.uno_ds.qk_norm_rope_backward(
        q_grad.contiguous(),
        k_grad.contiguous(),
        v_grad.contiguous(),
        *tensors,
        *saved[4 * slabs :],
        ctx.eps,
        wants_rows,
        wants_weight,
    )
    each = (
        [
            gradient if ctx.needs_input_grad[place][number] else None
            for number, gradient in enumerate(flat[place::5])
        ]
        for place in range(5)
    )
    return *each, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _outputs(q: Tensors, k: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = sum(x.shape[0] for x in q)
    keys = (rows, *k[0].shape[1:])
    return q[0].new_empty((rows, *q[0].shape[1:])), k[0].new_empty(keys), k[0].new_empty(keys)


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rows: bool,
    weight: bool,
) -> list[torch.Tensor]:
    of_rows = [torch.empty_like(x) if rows else x.new_empty(0) for x in (q, k, k)]
    return of_rows + [
        torch.empty_like(x) if weight else x.new_empty(0) for x in (q_weight, k_weight)
    ]


def _grid(kernel: str, q: torch.Tensor, k: torch.Tensor) -> tuple[int, dict[str, int]]:
    """(programs for one slab, its constants)."""
    (length, heads, dim), key_heads = q.shape, k.shape[1]
    common = math.gcd(heads, key_heads)
    taken = max((count for count in range(1, MOST_HEADS + 1) if common % count == 0), default=1)
    chosen = launch.parameters(__package__, q, "any", kernel)
    constants = {
        "N": heads,
        "K": key_heads,
        "F": dim // 2,
        "HEADS": taken,
        "BLOCK_T": chosen["BLOCK_T"],
        "num_warps": chosen["warps"],
    }
    return triton.cdiv(length, chosen["BLOCK_T"]) * ((heads + 2 * key_heads) // taken), constants
