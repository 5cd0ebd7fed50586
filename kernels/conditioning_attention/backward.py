"""Triton: backward of segment-masked attention.

A live pair of blocks takes five matrix products: S = QK', dP = dO V', dV += P' dO, dK += dS' Q, dQ += dS K, with
P = exp(S - lse), dS = P (dP - delta) and delta = rowsum(O dO). `attention_backward_keys` does all five for one tile of
keys that need a gradient and one key head: dK and dV stay in registers over all queries of all heads of the group, dQ is
added to an fp32 buffer by atomics. Where keys are constants only S, dP and dQ are wanted: `attention_backward_queries` walks
the constant key ranges of one tile of queries, needs no atomics, and writes before the other kernel adds. Queries
that need no gradient are in no list. The deterministic path has no atomics: the first kernel leaves dQ out and the second
walks all keys, which costs seven products for a live pair.

As in forward, blocks that lie wholly within a range are visited without a mask. A tile of keys that is not full visits all
its queries with masks: its padding would otherwise put exp(-lse), which may overflow, into dQ.

Legend of shape suffixes: M queries of a block, N keys of a block, D head dim.
"""
import triton
import triton.language as tl

from uno_ds.kernels.conditioning_attention.forward import LOG2_E, count_key_blocks, load_range, load_tile, whole_keys


@triton.jit(do_not_specialize=["rows"])
def attention_delta(out, grad, delta, rows, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta [HEADS, rows]: sum over D of out * grad, in fp32."""
    row_M, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    place_MD = row_M.to(tl.int64)[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
    inside_M = row_M < rows
    out_MD = tl.load(out + place_MD, mask=inside_M[:, None], other=0.0).to(tl.float32)
    grad_MD = tl.load(grad + place_MD, mask=inside_M[:, None], other=0.0).to(tl.float32)
    tl.store(delta + head * rows.to(tl.int64) + row_M, tl.sum(out_MD * grad_MD, 1), mask=inside_M)


@triton.jit
def _whole_queries(ranges, number, last_key):
    """(start, stop) of the queries of a range that see every key up to `last_key`."""
    start, stop, reach = load_range(ranges, number)
    return tl.minimum(stop, tl.maximum(start, last_key - reach)), stop


@triton.jit
def _keys_block(dk_ND, dv_ND, k_ND, v_ND, q, grad, lse, delta, dq, place_MD, key_N, row, stop, stop_key, reach, scale, STRIDE: tl.constexpr,
                BLOCK_M: tl.constexpr, WITH_QUERIES: tl.constexpr, MASKED: tl.constexpr):
    """Adds BLOCK_M queries from `row` on to dK and dV, and these keys' share of dQ to `dq`."""
    base = row.to(tl.int64) * STRIDE
    query_M = row + tl.arange(0, BLOCK_M)
    if MASKED:
        inside_M = query_M < stop
        q_MD = tl.load(q + base + place_MD, mask=inside_M[:, None], other=0.0)
        lse_M = tl.load(lse + query_M, mask=inside_M, other=0.0) * LOG2_E
        visible_NM = inside_M[None, :] & (key_N < stop_key)[:, None] & (key_N[:, None] <= query_M[None, :] + reach)
        weight_NM = tl.exp2(tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * (scale * LOG2_E) - lse_M[None, :])
        weight_NM = tl.where(visible_NM, weight_NM, 0.0)
        grad_MD = tl.load(grad + base + place_MD, mask=inside_M[:, None], other=0.0)
        delta_M = tl.load(delta + query_M, mask=inside_M, other=0.0)
    else:
        q_MD = tl.load(q + base + place_MD)
        lse_M = tl.load(lse + query_M) * LOG2_E
        weight_NM = tl.exp2(tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * (scale * LOG2_E) - lse_M[None, :])
        grad_MD = tl.load(grad + base + place_MD)
        delta_M = tl.load(delta + query_M)
    dv_ND = tl.dot(weight_NM.to(grad_MD.dtype), grad_MD, dv_ND, input_precision="ieee")
    slope_NM = (weight_NM * (tl.dot(v_ND, tl.trans(grad_MD), input_precision="ieee") - delta_M[None, :])).to(q_MD.dtype)
    dk_ND = tl.dot(slope_NM, q_MD, dk_ND, input_precision="ieee")
    if WITH_QUERIES:
        dq_MD = tl.dot(tl.trans(slope_NM), k_ND, input_precision="ieee") * scale
        if MASKED:
            tl.atomic_add(dq + base + place_MD, dq_MD, mask=(query_M < stop)[:, None], sem="relaxed")
        else:
            tl.atomic_add(dq + base + place_MD, dq_MD, sem="relaxed")
    return dk_ND, dv_ND


@triton.jit(do_not_specialize=["rows"])
def attention_backward_keys(q, k, v, grad, lse, delta, dq, dk, dv, tiles, ranges, of_run, scale, rows, HEADS: tl.constexpr, GROUP: tl.constexpr,
                            D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, WITH_QUERIES: tl.constexpr):
    """dk and dv of one tile of keys for one key head; WITH_QUERIES: adds to dq (fp32) by atomics."""
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    STRIDE: tl.constexpr = HEADS * D
    number, key_head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    first_key, stop_key, run = load_tile(tiles, number)
    first, plain, end = load_range(of_run, run)

    key_N = first_key + tl.arange(0, BLOCK_N)
    key_base = first_key.to(tl.int64) * (KEY_HEADS * D) + key_head * D
    place_ND = tl.arange(0, BLOCK_N)[:, None] * (KEY_HEADS * D) + tl.arange(0, D)[None, :]
    place_MD = tl.arange(0, BLOCK_M)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k_ND = tl.load(k + key_base + place_ND, mask=(key_N < stop_key)[:, None], other=0.0)
    v_ND = tl.load(v + key_base + place_ND, mask=(key_N < stop_key)[:, None], other=0.0)
    dk_ND = tl.zeros([BLOCK_N, D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, D], tl.float32)

    plain = tl.where(stop_key - first_key == BLOCK_N, plain, first)
    first_cursor, blocks = first, 0
    for number in range(first, plain):
        start, stop = _whole_queries(ranges, number, stop_key - 1)
        count = (stop - start) // BLOCK_M
        first_cursor += ((number == first) & (count == 0)).to(tl.int32)
        blocks += count

    for member in range(GROUP):
        head = key_head * GROUP + member
        head_q, head_grad, head_dq = q + head * D, grad + head * D, dq + head * D
        head_lse, head_delta = lse + head * rows.to(tl.int64), delta + head * rows.to(tl.int64)
        # Blocks are aligned to the end of a range: what is left of it lies at its beginning, where the diagonal is.
        cursor = first_cursor
        low, row = _whole_queries(ranges, cursor, stop_key - 1)
        for _ in tl.range(0, blocks, num_stages=STAGES):
            row -= BLOCK_M
            dk_ND, dv_ND = _keys_block(dk_ND, dv_ND, k_ND, v_ND, head_q, head_grad, head_lse, head_delta, head_dq, place_MD, key_N, row, 0, stop_key, 0,
                                       scale, STRIDE, BLOCK_M, WITH_QUERIES, False)
            done = row - BLOCK_M < low
            cursor += done.to(tl.int32)
            low, next_row = _whole_queries(ranges, cursor, stop_key - 1)
            row = tl.where(done, next_row, row)
        for number in range(first, end):
            start, stop, reach = load_range(ranges, number)
            low, stop = _whole_queries(ranges, number, stop_key - 1)
            stop -= tl.where(number < plain, (stop - low) // BLOCK_M * BLOCK_M, 0)
            start = tl.maximum(start, first_key - reach)
            for block in tl.range(0, tl.cdiv(stop - start, BLOCK_M), num_stages=1):
                dk_ND, dv_ND = _keys_block(dk_ND, dv_ND, k_ND, v_ND, head_q, head_grad, head_lse, head_delta, head_dq, place_MD, key_N,
                                           start + block * BLOCK_M, stop, stop_key, reach, scale, STRIDE, BLOCK_M, WITH_QUERIES, True)

    tl.store(dk + key_base + place_ND, (dk_ND * scale).to(dk.dtype.element_ty), mask=(key_N < stop_key)[:, None])
    tl.store(dv + key_base + place_ND, dv_ND.to(dv.dtype.element_ty), mask=(key_N < stop_key)[:, None])


@triton.jit
def _queries_block(dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, place_ND, row, stop, reach, query_M, scale, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr,
                   MASKED: tl.constexpr):
    """Adds BLOCK_N keys from `row` on to dQ."""
    base = row.to(tl.int64) * STRIDE
    if MASKED:
        key_N = row + tl.arange(0, BLOCK_N)
        k_ND = tl.load(k + base + place_ND, mask=(key_N < stop)[:, None], other=0.0)
        v_ND = tl.load(v + base + place_ND, mask=(key_N < stop)[:, None], other=0.0)
        visible_MN = (key_N < stop)[None, :] & (key_N[None, :] <= query_M[:, None] + reach)
        weight_MN = tl.exp2(tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * (scale * LOG2_E) - lse_M[:, None])
        weight_MN = tl.where(visible_MN, weight_MN, 0.0)
    else:
        k_ND = tl.load(k + base + place_ND)
        v_ND = tl.load(v + base + place_ND)
        weight_MN = tl.exp2(tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * (scale * LOG2_E) - lse_M[:, None])
    slope_MN = weight_MN * (tl.dot(grad_MD, tl.trans(v_ND), input_precision="ieee") - delta_M[:, None])
    return tl.dot(slope_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def attention_backward_queries(q, k, v, grad, lse, delta, dq, tiles, ranges, of_run, scale, rows, HEADS: tl.constexpr, GROUP: tl.constexpr,
                               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """dq of one tile of queries for one head over the ranges given: the constant keys, or all of them."""
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first_query, stop_query, run = load_tile(tiles, number)
    first, plain, end = load_range(of_run, run)
    STRIDE: tl.constexpr = HEADS // GROUP * D

    query_M = first_query + tl.arange(0, BLOCK_M)
    inside_M = query_M < stop_query
    base = first_query.to(tl.int64) * (HEADS * D) + head * D
    place_MD = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    place_ND = tl.arange(0, BLOCK_N)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k += head // GROUP * D
    v += head // GROUP * D
    q_MD = tl.load(q + base + place_MD, mask=inside_M[:, None], other=0.0)
    grad_MD = tl.load(grad + base + place_MD, mask=inside_M[:, None], other=0.0)
    lse_M = tl.load(lse + head * rows.to(tl.int64) + query_M, mask=inside_M, other=0.0) * LOG2_E
    delta_M = tl.load(delta + head * rows.to(tl.int64) + query_M, mask=inside_M, other=0.0)
    dq_MD = tl.zeros([BLOCK_M, D], tl.float32)

    cursor, blocks = count_key_blocks(ranges, first, plain, first_query, BLOCK_N)
    row, stop = whole_keys(ranges, cursor, first_query)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        dq_MD = _queries_block(dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, place_ND, row, stop, 0, query_M, scale, STRIDE, BLOCK_N, False)
        row += BLOCK_N
        done = row + BLOCK_N > stop
        cursor += done.to(tl.int32)
        next_row, stop = whole_keys(ranges, cursor, first_query)
        row = tl.where(done, next_row, row)
    for number in range(first, end):
        start, stop, reach = load_range(ranges, number)
        whole = tl.maximum(tl.minimum(stop, first_query + reach + 1) - start, 0) // BLOCK_N * BLOCK_N
        start += tl.where(number < plain, whole, 0)
        stop = tl.minimum(stop, stop_query + reach)
        for block in tl.range(0, tl.cdiv(stop - start, BLOCK_N), num_stages=1):
            dq_MD = _queries_block(dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, place_ND, start + block * BLOCK_N, stop, reach, query_M, scale, STRIDE,
                                   BLOCK_N, True)
    tl.store(dq + base + place_MD, (dq_MD * scale).to(dq.dtype.element_ty), mask=inside_M[:, None])
