"""Triton: backward of segment-masked attention.

A live pair of blocks takes five matrix products: S = QK', dP = dO V', dV += P' dO, dK += dS' Q, dQ
+= dS K, with P = exp(S - lse), dS = P (dP - delta) and delta = rowsum(O dO).
`attention_backward_keys` does all five for one tile of keys that need a gradient and one key head:
dK and dV stay in registers over all queries of all heads of the group, dQ is added to an fp32
buffer by atomics. Where keys are constants only S, dP and dQ are wanted:
`attention_backward_queries` walks the constant key ranges of one tile of queries, needs no atomics,
and writes before the other kernel adds. Queries that need no gradient are in no list. The
deterministic path has no atomics: the first kernel leaves dQ out and the second walks all keys,
which costs seven products for a live pair.

The scores start from -lse / scale and dP from -delta, so that neither is held together with the
product it is subtracted from: without it the kernel does not fit into the registers. Both are
stored that way, with as many more rows for each head as a block has, so that they are loaded
without a mask. As in forward, only tails
and diagonals take the branch with the mask.

Shape suffixes: docs/notation.md.
"""

import triton
import triton.language as tl

from uno_ds.kernels.conditioning_attention.forward import (
    LOG2_E,
    count_key_blocks,
    hide_keys,
    load_keys,
    load_rows,
    load_triple,
    next_keys,
)


@triton.jit(do_not_specialize=["rows", "padded"])
def attention_delta(
    out,
    grad,
    lse,
    minus_lse,
    minus_delta,
    scale,
    rows,
    padded,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What scores and their gradients start from, [HEADS, padded] each, in fp32: -lse / scale, and
    minus the sum over D of out * grad. 0 behind the last row, for a row that sees nothing, and for
    a sum that is not finite: a block may load the numbers of rows that it does not compute."""
    row_Q, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    place_QD = row_Q.to(tl.int64)[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
    inside_Q = row_Q < rows
    out_QD = tl.load(out + place_QD, mask=inside_Q[:, None], other=0.0).to(tl.float32)
    grad_QD = tl.load(grad + place_QD, mask=inside_Q[:, None], other=0.0).to(tl.float32)
    delta_Q = tl.sum(out_QD * grad_QD, 1)
    lse_Q = tl.load(lse + head * rows.to(tl.int64) + row_Q, mask=inside_Q, other=0.0)
    lse_Q = tl.where(lse_Q == float("-inf"), 0.0, lse_Q)
    delta_Q = tl.where(tl.abs(delta_Q) < float("inf"), delta_Q, 0.0)
    place_Q = head * padded.to(tl.int64) + row_Q
    tl.store(minus_lse + place_Q, -lse_Q / scale, mask=row_Q < padded)
    tl.store(minus_delta + place_Q, -delta_Q, mask=row_Q < padded)


@triton.jit
def _load_queries(ranges, number, first_key):
    """(start, stop, reach) of a range of queries, cut where they begin to see the first key of the
    tile."""
    start, stop, reach = load_triple(ranges, number)
    return tl.maximum(start, first_key - reach), stop, reach


@triton.jit(do_not_specialize=["padded"])
def attention_backward_keys(
    q,
    k,
    v,
    grad,
    minus_lse,
    minus_delta,
    dq,
    dk,
    dv,
    q_blocks,
    grad_blocks,
    dq_blocks,
    tiles,
    ranges,
    of_run,
    scale,
    padded,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    REDUCE: tl.constexpr,
    WITH_QUERIES: tl.constexpr,
):
    """dk and dv of one tile of keys for one key head; WITH_QUERIES: adds to dq (fp32), REDUCE: by a
    descriptor."""
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    STRIDE: tl.constexpr = HEADS * D
    number, key_head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    first_key, stop_key, run = load_triple(tiles, number)
    first, end = tl.load(of_run + run), tl.load(of_run + run + 1)
    partial = stop_key - first_key < BLOCK_N

    key_T = first_key + tl.arange(0, BLOCK_N)
    key_base = first_key.to(tl.int64) * (KEY_HEADS * D) + key_head * D
    place_TD = tl.arange(0, BLOCK_N)[:, None] * (KEY_HEADS * D) + tl.arange(0, D)[None, :]
    place_QD = tl.arange(0, BLOCK_M)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k_TD = tl.load(k + key_base + place_TD, mask=(key_T < stop_key)[:, None], other=0.0)
    v_TD = tl.load(v + key_base + place_TD, mask=(key_T < stop_key)[:, None], other=0.0)
    dk_TD = tl.zeros([BLOCK_N, D], tl.float32)
    dv_TD = tl.zeros([BLOCK_N, D], tl.float32)
    zero_TQ = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    blocks = 0
    for number in range(first, end):
        start, stop, _ = _load_queries(ranges, number, first_key)
        blocks += tl.maximum(tl.cdiv(stop - start, BLOCK_M), 1)

    for member in range(GROUP):
        head = key_head * GROUP + member
        head_lse = minus_lse + head * padded.to(tl.int64)
        head_delta = minus_delta + head * padded.to(tl.int64)
        cursor = first
        row, stop, reach = _load_queries(ranges, cursor, first_key)
        for _ in tl.range(0, blocks, num_stages=STAGES):
            query_Q = row + tl.arange(0, BLOCK_M)
            inside_Q = query_Q < stop
            q_QD = load_rows(
                q, q_blocks, head * D, row, stop, place_QD, STRIDE, BLOCK_M, DESCRIPTORS
            )
            lse_Q = tl.load(head_lse + query_Q)
            score_TQ = tl.dot(
                k_TD, tl.trans(q_QD), zero_TQ + lse_Q[None, :], input_precision="ieee"
            )
            if partial | (row + BLOCK_M > stop) | (stop_key > row + reach + 1):
                visible_TQ = (
                    inside_Q[None, :]
                    & (key_T < stop_key)[:, None]
                    & (key_T[:, None] <= query_Q[None, :] + reach)
                )
                score_TQ = tl.where(visible_TQ, score_TQ, float("-inf"))
            weight_TQ = tl.exp2(score_TQ * (scale * LOG2_E))
            grad_QD = load_rows(
                grad, grad_blocks, head * D, row, stop, place_QD, STRIDE, BLOCK_M, DESCRIPTORS
            )
            # dV first where dQ follows, else last: with Triton 3.6 and 3.9 the other order spills
            # at head dim 128.
            if WITH_QUERIES:
                dv_TD = tl.dot(weight_TQ.to(grad_QD.dtype), grad_QD, dv_TD, input_precision="ieee")
            delta_Q = tl.load(head_delta + query_Q)
            slope_TQ = tl.dot(
                v_TD, tl.trans(grad_QD), zero_TQ + delta_Q[None, :], input_precision="ieee"
            )
            slope_TQ = (weight_TQ * slope_TQ).to(q_QD.dtype)
            dk_TD = tl.dot(slope_TQ, q_QD, dk_TD, input_precision="ieee")
            if WITH_QUERIES:
                dq_QD = tl.dot(tl.trans(slope_TQ), k_TD, input_precision="ieee") * scale
                if REDUCE:
                    # Rows from `stop` on belong to others and get an addition of 0.
                    dq_blocks.atomic_add([row, head * D], dq_QD)
                else:
                    tl.atomic_add(
                        dq + row.to(tl.int64) * STRIDE + head * D + place_QD,
                        dq_QD,
                        mask=inside_Q[:, None],
                        sem="relaxed",
                    )
            else:
                dv_TD = tl.dot(weight_TQ.to(grad_QD.dtype), grad_QD, dv_TD, input_precision="ieee")
            row += BLOCK_M
            done = row >= stop
            cursor += done.to(tl.int32)
            start, stop, reach = _load_queries(ranges, cursor, first_key)
            row = tl.where(done, start, row)

    tl.store(
        dk + key_base + place_TD,
        (dk_TD * scale).to(dk.dtype.element_ty),
        mask=(key_T < stop_key)[:, None],
    )
    tl.store(
        dv + key_base + place_TD, dv_TD.to(dv.dtype.element_ty), mask=(key_T < stop_key)[:, None]
    )


@triton.jit(do_not_specialize=["padded"])
def attention_backward_queries(
    q,
    k,
    v,
    grad,
    minus_lse,
    minus_delta,
    dq,
    k_blocks,
    v_blocks,
    tiles,
    ranges,
    of_run,
    scale,
    padded,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dq of one tile of queries for one head over the ranges given: the constant keys, or all of
    them. TILE: q and grad are descriptors too."""
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first_query, stop_query, run = load_triple(tiles, number)
    cursor, end = tl.load(of_run + run), tl.load(of_run + run + 1)
    STRIDE: tl.constexpr = HEADS // GROUP * D

    query_Q = first_query + tl.arange(0, BLOCK_M)
    inside_Q = query_Q < stop_query
    base = first_query.to(tl.int64) * (HEADS * D) + head * D
    place_QD = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    place_TD = tl.arange(0, BLOCK_N)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    if TILE:
        # Rows from `stop_query` on are those of other queries, whose dq is not stored.
        q_QD = q.load([first_query, head * D])
        grad_QD = grad.load([first_query, head * D])
    else:
        q_QD = tl.load(q + base + place_QD, mask=inside_Q[:, None], other=0.0)
        grad_QD = tl.load(grad + base + place_QD, mask=inside_Q[:, None], other=0.0)
    lse_Q = tl.load(minus_lse + head * padded.to(tl.int64) + query_Q)
    delta_Q = tl.load(minus_delta + head * padded.to(tl.int64) + query_Q)
    dq_QD = tl.zeros([BLOCK_M, D], tl.float32)

    blocks = count_key_blocks(ranges, cursor, end, stop_query, BLOCK_N)
    row, stop, reach = load_keys(ranges, cursor, stop_query)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        key_T = row + tl.arange(0, BLOCK_N)
        k_TD = load_rows(
            k, k_blocks, head // GROUP * D, row, stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS
        )
        v_TD = load_rows(
            v, v_blocks, head // GROUP * D, row, stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS
        )
        score_QT = tl.dot(q_QD, tl.trans(k_TD), input_precision="ieee")
        score_QT = hide_keys(score_QT, query_Q, key_T, row, stop, reach, first_query, BLOCK_N)
        weight_QT = tl.exp2((score_QT + lse_Q[:, None]) * (scale * LOG2_E))
        slope_QT = weight_QT * (
            tl.dot(grad_QD, tl.trans(v_TD), input_precision="ieee") + delta_Q[:, None]
        )
        dq_QD = tl.dot(slope_QT.to(k_TD.dtype), k_TD, dq_QD, input_precision="ieee")
        cursor, row, stop, reach = next_keys(ranges, cursor, row, stop, reach, stop_query, BLOCK_N)
    tl.store(dq + base + place_QD, (dq_QD * scale).to(dq.dtype.element_ty), mask=inside_Q[:, None])
