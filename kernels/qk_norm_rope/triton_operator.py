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
# Heads of one program: enough that reading the angles of its rows costs little.
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
    given = {"q": q_TND, "k": k_TKD, "v": v_TKD, "q_weight": q_weight_D, "k_weight": k_weight_D}
    named: dict[str, torch.Tensor] = {}
    for name, tensors in given.items():
        named |= {f"{name}[{number}]": tensor for number, tensor in enumerate(tensors)}
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
    slabs = [[tensor.contiguous() for tensor in tensors] for tensors in given.values()]
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
    out = _outputs(q, k)
    first = 0
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
    """For each slab the gradients of q, k, v, q_weight and k_weight; empty tensors where they are
    not wanted."""
    gradients: list[torch.Tensor] = []
    first = 0
    for number, slab in enumerate(zip(q, k, q_weight, k_weight)):
        with_rows, with_weight = wants_rows[number], wants_weight[number]
        slab_gradients = _gradients(*slab, with_rows, with_weight)
        length = len(slab[0])
        programs, constants = _grid("backward", *slab[:2])
        if programs and (with_rows or with_weight):
            sums = _weight_sums(slab[0], constants, with_weight)
            # The kernel always writes the gradients of rows.
            rows = slab_gradients[:3] if with_rows else _gradients(*slab, True, False)[:3]
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
                WANTS_WEIGHT=with_weight,
                **constants,
            )
            if with_weight:
                slab_gradients[3:] = [total.sum(dim=0).to(slab[2].dtype) for total in sums]
        elif with_weight:
            slab_gradients[3:] = [gradient.zero_() for gradient in slab_gradients[3:]]
        gradients += slab_gradients
        first += length
    return gradients


def _weight_sums(q: torch.Tensor, constants: dict[str, int], wanted: bool) -> list[torch.Tensor]:
    """Buffers fp32 [programs, D] for the parts of the gradients of q_weight and k_weight; empty if
    they are not wanted."""
    length, _, dim = q.shape
    blocks = triton.cdiv(length, constants["BLOCK_T"])
    sums = []
    for heads in (constants["N"], constants["K"]):
        programs = blocks * (heads // constants["HEADS"]) if wanted else 0
        sums.append(q.new_empty((programs, dim), dtype=torch.float32))
    return sums


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
    gradients: list[torch.Tensor] = []
    for number, slab in enumerate(zip(q, k, q_weight, k_weight)):
        gradients += _gradients(*slab, wants_rows[number], wants_weight[number])
    return gradients


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, _, q_weight, k_weight, cos, sin, place, ctx.eps = inputs
    ctx.slabs = len(q)
    ctx.save_for_backward(*q, *k, *q_weight, *k_weight, cos, sin, place)


def _autograd(ctx: Any, q_grad: torch.Tensor, k_grad: torch.Tensor, v_grad: torch.Tensor) -> tuple:
    saved, slabs = ctx.saved_tensors, ctx.slabs
    tensors = [list(saved[start * slabs : (start + 1) * slabs]) for start in range(4)]
    wants_q, wants_k, wants_v, wants_q_weight, wants_k_weight = ctx.needs_input_grad[:5]
    wants_rows = [any(wanted) for wanted in zip(wants_q, wants_k, wants_v)]
    wants_weight = [any(wanted) for wanted in zip(wants_q_weight, wants_k_weight)]
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
    by_argument = []
    for argument, wanted in enumerate(ctx.needs_input_grad[:5]):
        of_slabs = flat[argument::5]
        by_argument.append([x if want else None for x, want in zip(of_slabs, wanted)])
    return *by_argument, None, None, None, None


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
    """Buffers for the gradients of q, k, v, q_weight and k_weight; empty where not wanted."""
    of_rows = [torch.empty_like(x) if rows else x.new_empty(0) for x in (q, k, k)]
    of_weights = [torch.empty_like(x) if weight else x.new_empty(0) for x in (q_weight, k_weight)]
    return of_rows + of_weights


def _grid(kernel: str, q: torch.Tensor, k: torch.Tensor) -> tuple[int, dict[str, int]]:
    """(programs for one slab, its constants)."""
    length, heads, dim = q.shape
    key_heads = k.shape[1]
    common = math.gcd(heads, key_heads)
    divisors = [count for count in range(1, MOST_HEADS + 1) if common % count == 0]
    heads_of_program = max(divisors, default=1)
    chosen = launch.parameters(__package__, q, "any", kernel)
    constants = {
        "N": heads,
        "K": key_heads,
        "F": dim // 2,
        "HEADS": heads_of_program,
        "BLOCK_T": chosen["BLOCK_T"],
        "num_warps": chosen["warps"],
    }
    blocks = triton.cdiv(length, chosen["BLOCK_T"])
    return blocks * ((heads + 2 * key_heads) // heads_of_program), constants
