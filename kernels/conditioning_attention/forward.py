"""Triton: forward of segment-masked attention, and the walk over a tile's ranges that the backward
kernels share.

One program computes one tile of queries, which lies within one run, for one query head. It walks
all blocks of BLOCK_N keys of all ranges of the run in one loop, so that the pipeline of loads is
filled once for a tile and not once for a range. A block that lies wholly within its range and
before its diagonal is computed without a mask; tails and diagonals take a branch that all threads
share. Softmax is to base 2 with statistics in fp32. Programs are numbered so that the heads of a
tile are neighbours (the heads of a group share keys in the cache) and the tiles with most work come
first.

Legend of shape suffixes: M queries of a block, N keys of a block, D head dim.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_triple(table, number):
    """The three numbers of a tile (first row, row past the last, run) or of a range (start, stop,
    reach)."""
    return (
        tl.load(table + number * 3),
        tl.load(table + number * 3 + 1),
        tl.load(table + number * 3 + 2),
    )


@triton.jit
def load_keys(ranges, number, stop_query):
    """(start, stop, reach) of a range of keys, cut where the last query of the tile sees no more of
    it."""
    start, stop, reach = load_triple(ranges, number)
    return start, tl.minimum(stop, stop_query + reach), reach


@triton.jit
def count_key_blocks(ranges, first, end, stop_query, BLOCK: tl.constexpr):
    """Blocks of the ranges first .. end - 1. A range that the tile does not reach counts as one,
    wholly masked."""
    blocks = 0
    for number in range(first, end):
        start, stop, _ = load_keys(ranges, number, stop_query)
        blocks += tl.maximum(tl.cdiv(stop - start, BLOCK), 1)
    return blocks


@triton.jit
def next_keys(ranges, cursor, row, stop, reach, stop_query, BLOCK: tl.constexpr):
    """(cursor, row, stop, reach) of the block after the one at `row`. Behind the last range it
    reads one more, unused."""
    row += BLOCK
    done = row >= stop
    cursor += done.to(tl.int32)
    start, stop, reach = load_keys(ranges, cursor, stop_query)
    return cursor, tl.where(done, start, row), stop, reach


@triton.jit
def load_rows(
    pointer,
    blocks,
    column,
    row,
    stop,
    place,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """BLOCK rows from `row` on, D values from `column` on. By pointers rows from `stop` on are 0;
    the tensor descriptor `blocks` gives them as they are, other rows of the batch, which the
    caller's mask keeps out."""
    if DESCRIPTORS:
        return blocks.load([row, column])
    inside = row + tl.arange(0, BLOCK) < stop
    return tl.load(
        pointer + row.to(tl.int64) * STRIDE + column + place, mask=inside[:, None], other=0.0
    )


@triton.jit(do_not_specialize=["rows"])
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    k_blocks,
    v_blocks,
    tiles,
    ranges,
    of_run,
    scale,
    rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """out [rows, HEADS, D] and lse [HEADS, rows] (natural logarithm) of q over k and v [keys, HEADS
    / GROUP, D]."""
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first_query, stop_query, run = load_triple(tiles, number)
    cursor, end = tl.load(of_run + run), tl.load(of_run + run + 1)
    STRIDE: tl.constexpr = HEADS // GROUP * D
    scale = scale * LOG2_E

    query_M = first_query + tl.arange(0, BLOCK_M)
    base = first_query.to(tl.int64) * (HEADS * D) + head * D
    place_MD = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    place_ND = tl.arange(0, BLOCK_N)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    q_MD = tl.load(q + base + place_MD, mask=(query_M < stop_query)[:, None], other=0.0)
    acc_MD = tl.zeros([BLOCK_M, D], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)

    blocks = count_key_blocks(ranges, cursor, end, stop_query, BLOCK_N)
    row, stop, reach = load_keys(ranges, cursor, stop_query)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        key_N = row + tl.arange(0, BLOCK_N)
        k_ND = load_rows(
            k, k_blocks, head // GROUP * D, row, stop, place_ND, STRIDE, BLOCK_N, DESCRIPTORS
        )
        v_ND = load_rows(
            v, v_blocks, head // GROUP * D, row, stop, place_ND, STRIDE, BLOCK_N, DESCRIPTORS
        )
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if (row + BLOCK_N > stop) | (row + BLOCK_N > first_query + reach + 1):
            score_MN = tl.where(
                (key_N < stop)[None, :] & (key_N[None, :] <= query_M[:, None] + reach),
                score_MN,
                float("-inf"),
            )
        new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1) * scale)
        # A row that has seen nothing yet has a peak of -inf, and -inf - -inf is NaN.
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        weight_MN = tl.exp2(score_MN * scale - base_M[:, None])
        shrink_M = tl.exp2(peak_M - base_M)
        total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
        acc_MD = tl.dot(
            weight_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee"
        )
        peak_M = new_peak_M
        cursor, row, stop, reach = next_keys(ranges, cursor, row, stop, reach, stop_query, BLOCK_N)

    empty_M = total_M == 0.0
    total_M = tl.where(empty_M, 1.0, total_M)
    tl.store(
        out + base + place_MD,
        (acc_MD / total_M[:, None]).to(out.dtype.element_ty),
        mask=(query_M < stop_query)[:, None],
    )
    lse_M = tl.where(empty_M, float("-inf"), (peak_M + tl.log2(total_M)) * LN_2)
    tl.store(lse + head * rows.to(tl.int64) + query_M, lse_M, mask=query_M < stop_query)
