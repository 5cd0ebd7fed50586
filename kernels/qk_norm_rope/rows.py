"""Triton: QK-norm and rotary embedding of one slab, each value read once and written once.

A program takes BLOCK_T rows of HEADS neighbouring heads, all of them queries, keys or values; the
angles of its rows are read once. All arithmetic is in fp32, with one rounding at the end. Programs
of one row block are neighbours: together they read whole rows. Backward recomputes the root mean
square from the raw rows and leaves the sums of the weights' gradients, one row a program, to be
added in a fixed order.

Shape suffixes: docs/notation.md.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(length, N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(row block, group of heads, rows, which of them exist) of this program."""
    groups: tl.constexpr = (N + 2 * K) // HEADS
    block, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    return block, group, row_T, row_T < length


@triton.jit
def _target_rows(place, first, row_T, inside_T, HAS_PLACE: tl.constexpr):
    if HAS_PLACE:
        return tl.load(place + first + row_T, mask=inside_T, other=0).to(tl.int64)
    return (first + row_T).to(tl.int64)


@triton.jit
def _angles(cos, sin, first, row_T, inside_T, F: tl.constexpr):
    place_TF = (first + row_T).to(tl.int64)[:, None] * F + tl.arange(0, F)[None, :]
    cos_TF = tl.load(cos + place_TF, mask=inside_T[:, None], other=0.0).to(tl.float32)
    return cos_TF, tl.load(sin + place_TF, mask=inside_T[:, None], other=0.0).to(tl.float32)


@triton.jit
def _load_halves(tensor, inside_T, F: tl.constexpr):
    return (
        tl.load(tensor, mask=inside_T[:, None], other=0.0).to(tl.float32),
        tl.load(tensor + F, mask=inside_T[:, None], other=0.0).to(tl.float32),
    )


@triton.jit
def _store_halves(tensor, first_TF, second_TF, inside_T, F: tl.constexpr):
    tl.store(tensor, first_TF.to(tensor.dtype.element_ty), mask=inside_T[:, None])
    tl.store(tensor + F, second_TF.to(tensor.dtype.element_ty), mask=inside_T[:, None])


@triton.jit
def _inverse_root(first_TF, second_TF, eps, F: tl.constexpr):
    return tl.rsqrt(
        (tl.sum(first_TF * first_TF, 1) + tl.sum(second_TF * second_TF, 1)) / (2 * F) + eps
    )


@triton.jit
def _copy(source, target, inside_T, F: tl.constexpr, HEADS: tl.constexpr):
    for head in tl.static_range(HEADS):
        offset = head * 2 * F
        first_TF, second_TF = _load_halves(source + offset, inside_T, F)
        _store_halves(target + offset, first_TF, second_TF, inside_T, F)


@triton.jit
def _norm_and_rotate(
    source, target, weight, cos_TF, sin_TF, inside_T, eps, F: tl.constexpr, HEADS: tl.constexpr
):
    channel_F = tl.arange(0, F)
    weight_F = tl.load(weight + channel_F).to(tl.float32)
    other_F = tl.load(weight + F + channel_F).to(tl.float32)
    for head in tl.static_range(HEADS):
        offset = head * 2 * F
        first_TF, second_TF = _load_halves(source + offset, inside_T, F)
        inverse_T1 = _inverse_root(first_TF, second_TF, eps, F)[:, None]
        first_TF = first_TF * inverse_T1 * weight_F[None, :]
        second_TF = second_TF * inverse_T1 * other_F[None, :]
        _store_halves(
            target + offset,
            first_TF * cos_TF - second_TF * sin_TF,
            second_TF * cos_TF + first_TF * sin_TF,
            inside_T,
            F,
        )


@triton.jit(do_not_specialize=["first", "length"])
def qk_norm_rope_forward(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    place,
    q_out,
    k_out,
    v_out,
    first,
    length,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_PLACE: tl.constexpr,
):
    """One slab of `length` rows, whose row 0 is row `first` of all slabs, into the outputs of all
    slabs."""
    _, group, row_T, inside_T = _rows(length, N, K, HEADS, BLOCK_T)
    target_T1 = _target_rows(place, first, row_T, inside_T, HAS_PLACE)[:, None]
    row_T1, channel_1F = row_T.to(tl.int64)[:, None], tl.arange(0, F)[None, :]
    key_group = group - N // HEADS
    if key_group < 0:
        cos_TF, sin_TF = _angles(cos, sin, first, row_T, inside_T, F)
        offset = group * HEADS * 2 * F
        _norm_and_rotate(
            q + (row_T1 * N * 2 * F + offset + channel_1F),
            q_out + (target_T1 * N * 2 * F + offset + channel_1F),
            q_weight,
            cos_TF,
            sin_TF,
            inside_T,
            eps,
            F,
            HEADS,
        )
    elif key_group < K // HEADS:
        cos_TF, sin_TF = _angles(cos, sin, first, row_T, inside_T, F)
        offset = key_group * HEADS * 2 * F
        _norm_and_rotate(
            k + (row_T1 * K * 2 * F + offset + channel_1F),
            k_out + (target_T1 * K * 2 * F + offset + channel_1F),
            k_weight,
            cos_TF,
            sin_TF,
            inside_T,
            eps,
            F,
            HEADS,
        )
    else:
        offset = (key_group - K // HEADS) * HEADS * 2 * F
        _copy(
            v + (row_T1 * K * 2 * F + offset + channel_1F),
            v_out + (target_T1 * K * 2 * F + offset + channel_1F),
            inside_T,
            F,
            HEADS,
        )


@triton.jit
def _backward_heads(
    raw,
    grad,
    d_raw,
    weight,
    sums,
    cos_TF,
    sin_TF,
    inside_T,
    eps,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
):
    channel_F = tl.arange(0, F)
    weight_F = tl.load(weight + channel_F).to(tl.float32)
    other_F = tl.load(weight + F + channel_F).to(tl.float32)
    total_TF, total_other_TF = tl.zeros_like(cos_TF), tl.zeros_like(cos_TF)
    for head in tl.static_range(HEADS):
        offset = head * 2 * F
        first_TF, second_TF = _load_halves(raw + offset, inside_T, F)
        grad_first_TF, grad_second_TF = _load_halves(grad + offset, inside_T, F)
        inverse_T1 = _inverse_root(first_TF, second_TF, eps, F)[:, None]
        first_TF, second_TF = first_TF * inverse_T1, second_TF * inverse_T1
        back_TF = grad_first_TF * cos_TF + grad_second_TF * sin_TF
        back_other_TF = grad_second_TF * cos_TF - grad_first_TF * sin_TF
        if WANTS_WEIGHT:
            total_TF += back_TF * first_TF
            total_other_TF += back_other_TF * second_TF
        back_TF, back_other_TF = back_TF * weight_F[None, :], back_other_TF * other_F[None, :]
        along_T1 = (
            (tl.sum(back_TF * first_TF, 1) + tl.sum(back_other_TF * second_TF, 1)) / (2 * F)
        )[:, None]
        _store_halves(
            d_raw + offset,
            inverse_T1 * (back_TF - along_T1 * first_TF),
            inverse_T1 * (back_other_TF - along_T1 * second_TF),
            inside_T,
            F,
        )
    if WANTS_WEIGHT:
        tl.store(sums + channel_F, tl.sum(total_TF, 0))
        tl.store(sums + F + channel_F, tl.sum(total_other_TF, 0))


@triton.jit(do_not_specialize=["first", "length"])
def qk_norm_rope_backward(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    place,
    q_grad,
    k_grad,
    v_grad,
    dq,
    dk,
    dv,
    q_sums,
    k_sums,
    first,
    length,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
):
    """Gradients of one slab's rows; WANTS_WEIGHT: also q_sums [row blocks, N / HEADS, D] and k_sums
    [row blocks, K / HEADS, D]."""
    block, group, row_T, inside_T = _rows(length, N, K, HEADS, BLOCK_T)
    target_T1 = _target_rows(place, first, row_T, inside_T, HAS_PLACE)[:, None]
    row_T1, channel_1F = row_T.to(tl.int64)[:, None], tl.arange(0, F)[None, :]
    key_group = group - N // HEADS
    if key_group < 0:
        cos_TF, sin_TF = _angles(cos, sin, first, row_T, inside_T, F)
        here_TF = row_T1 * N * 2 * F + group * HEADS * 2 * F + channel_1F
        there_TF = target_T1 * N * 2 * F + group * HEADS * 2 * F + channel_1F
        _backward_heads(
            q + here_TF,
            q_grad + there_TF,
            dq + here_TF,
            q_weight,
            q_sums + (block * (N // HEADS) + group) * 2 * F,
            cos_TF,
            sin_TF,
            inside_T,
            eps,
            F,
            HEADS,
            WANTS_WEIGHT,
        )
    elif key_group < K // HEADS:
        cos_TF, sin_TF = _angles(cos, sin, first, row_T, inside_T, F)
        here_TF = row_T1 * K * 2 * F + key_group * HEADS * 2 * F + channel_1F
        there_TF = target_T1 * K * 2 * F + key_group * HEADS * 2 * F + channel_1F
        _backward_heads(
            k + here_TF,
            k_grad + there_TF,
            dk + here_TF,
            k_weight,
            k_sums + (block * (K // HEADS) + key_group) * 2 * F,
            cos_TF,
            sin_TF,
            inside_T,
            eps,
            F,
            HEADS,
            WANTS_WEIGHT,
        )
    else:
        offset = (key_group - K // HEADS) * HEADS * 2 * F
        _copy(
            v_grad + (target_T1 * K * 2 * F + offset + channel_1F),
            dv + (row_T1 * K * 2 * F + offset + channel_1F),
            inside_T,
            F,
            HEADS,
        )
