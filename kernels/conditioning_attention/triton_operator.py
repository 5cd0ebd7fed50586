"""The Triton kernels as one operator with a registered backward, so that torch.compile and FLOP
counters see it.

Shape suffixes: docs/notation.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from uno_ds.kernels.backends import HEAD_DIMS, PADDED_HEAD_DIMS
from uno_ds.kernels.conditioning_attention.backward import attention_delta
from uno_ds.kernels.conditioning_attention.launch import KERNELS, parameters
from uno_ds.kernels.launch import INTERPRETED
from uno_ds.kernels.plan import MOST_ROWS, TABLES, TILES, AttentionPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DELTA_ROWS = 64
# Rows behind the last one that a block may load: the largest tile.
PADDING = TILES[-1]


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Same result as the reference, shapes as there, D in HEAD_DIMS or PADDED_HEAD_DIMS,
    contiguous, on one CUDA device (on the CPU under TRITON_INTERPRET=1). Gradients are
    bit-identical from run to run under torch.use_deterministic_algorithms. Raises ValueError for
    tensors that it cannot compute."""
    return attention_and_lse(q_QND, k_TKD, v_TKD, plan)[0]


def attention_and_lse(
    q_QND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    plan: AttentionPlan,
    deterministic: bool | None = None,
    ahead: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention and [N, Q] the natural logarithm of each row's sum of exponentials, in fp32 and
    without gradient. `ahead`: by the table's second choice of the forward kernel, AHEAD."""
    _check(q_QND, k_TKD, v_TKD, plan)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    dim = q_QND.shape[2]
    width = PADDED_HEAD_DIMS.get(dim, dim)
    if width > dim:
        q_QND, k_TKD, v_TKD = (F.pad(x, (0, width - dim)) for x in (q_QND, k_TKD, v_TKD))
    out, lse = torch.ops.uno_ds.conditioning_attention(
        q_QND, k_TKD, v_TKD, plan.tables, plan.places, dim**-0.5, deterministic, ahead
    )
    return (out[..., :dim].contiguous() if width > dim else out), lse


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> None:
    dim = q.shape[2]
    if q.dtype not in DTYPES:
        raise ValueError(
            f"The triton attention computes in bfloat16, float16 or float32, got {q.dtype}."
        )
    if dim not in (*HEAD_DIMS, *PADDED_HEAD_DIMS):
        raise ValueError(
            "The triton attention takes heads of "
            f"{', '.join(map(str, sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))))} values, got {dim}."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_contiguous():
            raise ValueError(
                f"The triton attention reads contiguous tensors, but {name} has strides "
                f"{list(x.stride())}."
            )
    if not q.device == k.device == v.device == plan.tables.device:
        raise ValueError(
            f"q, k, v and the plan must lie on one device; got {q.device}, {k.device}, {v.device}, "
            f"{plan.tables.device}."
        )
    needed = "cpu" if INTERPRETED else "cuda"
    if q.device.type != needed:
        where = (
            "TRITON_INTERPRET=1 computes on the CPU"
            if INTERPRETED
            else "a CPU can only interpret it, under TRITON_INTERPRET=1"
        )
        raise ValueError(
            f"The triton attention needs a CUDA device and {where}; got tensors on {q.device}."
        )
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter computes wrong values in bfloat16; use float32 or float16 under "
            "TRITON_INTERPRET=1."
        )
    if len(q) > MOST_ROWS or len(k) > MOST_ROWS or q.shape[1] * dim * 128 >= 2**31:
        raise ValueError(
            "The triton attention numbers rows and the values of a tile with 32 bits, too few for "
            f"{list(q.shape)} and {list(k.shape)}."
        )


@torch.library.custom_op("uno_ds::conditioning_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    deterministic: bool,
    ahead: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    launch = Launch(q, k, tables, places, scale)
    kernel = "forward_ahead" if ahead else "forward"
    launch(kernel, "query_tiles", "keys", q.shape[1], (q, k, v, out, lse), (k, v))
    return out, lse


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    deterministic: bool,
    ahead: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("uno_ds::conditioning_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tables: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, key_heads = q.shape[1], k.shape[1]
    # Rows that no tile names, and dq before the atomic additions, are 0.
    dq = torch.zeros_like(q, dtype=q.dtype if deterministic else torch.float32)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    launch = Launch(q, k, tables, places, scale)
    statistics = starting_values(out, grad, lse, scale)
    # The kernel over queries computes all of dq, or only its part from constant keys.
    query_tiles = "live_query_tiles" if deterministic else "mixed_query_tiles"
    ranges = "keys" if deterministic else "constant_keys"
    launch(
        "backward_queries",
        query_tiles,
        ranges,
        heads,
        (q, k, v, grad, *statistics, dq),
        (k, v),
        own=(q, grad),
    )
    launch(
        "backward_keys",
        "live_key_tiles",
        "queries",
        key_heads,
        (q, k, v, grad, *statistics, dq, dk, dv),
        (q, grad),
        dq,
        WITH_QUERIES=not deterministic,
    )
    return dq.to(q.dtype), dk, dv


def starting_values(
    out: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-lse / scale, -delta) [N, Q + PADDING], see `attention_delta`."""
    rows, heads, dim = out.shape
    padded = rows + PADDING
    minus_lse, minus_delta = (lse.new_empty(heads, padded) for _ in range(2))
    if rows:
        with torch.cuda.device(out.device if out.is_cuda else -1):
            attention_delta[(triton.cdiv(padded, DELTA_ROWS), heads)](
                out,
                grad,
                lse,
                minus_lse,
                minus_delta,
                scale,
                rows,
                padded,
                HEADS=heads,
                D=dim,
                BLOCK_M=DELTA_ROWS,
            )
    return minus_lse, minus_delta


@_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tables: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.deterministic, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple:
    q, k, v, tables, places, out, lse = ctx.saved_tensors
    gradients = torch.ops.uno_ds.conditioning_attention_backward(
        grad.contiguous(), q, k, v, out, lse, tables, places, ctx.scale, ctx.deterministic
    )
    return *gradients, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class Launch:
    """Starts a kernel on the tiles and ranges of a plan with the parameters of the launch table."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        tables: torch.Tensor,
        places: torch.Tensor,
        scale: float,
    ):
        self.q = q
        self.group = q.shape[1] // k.shape[1]
        self.scale = scale
        self.tables = tables
        self.places = dict(zip(TABLES, places.numpy().tolist()))
        self.device = torch.cuda.device(q.device if q.is_cuda else -1)

    def __call__(
        self,
        kernel: str,
        tiles: str,
        ranges: str,
        heads: int,
        tensors: tuple[torch.Tensor, ...],
        walked: tuple[torch.Tensor, ...],
        added: torch.Tensor | None = None,
        own: tuple[torch.Tensor, ...] = (),
        **constants: bool,
    ) -> None:
        """`walked`: the tensors whose rows the kernel reads block by block; `added`: the one that
        it adds blocks of rows to; `own`: of `tensors`, those whose rows of the tile it reads."""
        q = self.q
        chosen = parameters(q.device, q.dtype, q.shape[2], kernel) | constants
        if kernel == "backward_keys":
            tile, block = chosen["BLOCK_N"], chosen["BLOCK_M"]
        else:
            tile, block = chosen["BLOCK_M"], chosen["BLOCK_N"]
        tiles_of_size = f"{tiles}_{tile}"
        start, stop = self.places[tiles_of_size]
        if start == stop:
            return
        programs = (stop - start) // 3 * heads
        names = (tiles_of_size, ranges, f"{ranges}_of_run")
        lists = [self.tables[self.places[name][0] :] for name in names]
        blocks = [_blocks(x, block) if chosen["DESCRIPTORS"] else x for x in walked]
        if added is not None:
            chosen["REDUCE"] &= chosen["WITH_QUERIES"]
            blocks.append(_blocks(added, block) if chosen["REDUCE"] else added)
        given: list[torch.Tensor | TensorDescriptor] = list(tensors)
        if chosen.get("TILE"):
            own_ids = set(map(id, own))
            given = [_blocks(x, tile) if id(x) in own_ids else x for x in tensors]
        with self.device:
            KERNELS[kernel][(programs,)](
                *given,
                *blocks,
                *lists,
                self.scale,
                len(q) + PADDING if kernel.startswith("backward") else len(q),
                HEADS=q.shape[1],
                GROUP=self.group,
                D=q.shape[2],
                num_warps=chosen.pop("warps"),
                num_stages=chosen["STAGES"],
                **chosen,
            )


def _blocks(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of x [T, N, D] as [T, N * D], read in blocks of one head's `rows` rows."""
    values = x.shape[1] * x.shape[2]
    return TensorDescriptor(
        x, shape=[len(x), values], strides=[values, 1], block_shape=[rows, x.shape[2]]
    )
