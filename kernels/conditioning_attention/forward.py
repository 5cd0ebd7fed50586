"""Triton: forward of segment-masked attention, and the walk over a tile's ranges that the backward
kernels share.

One program computes one tile of queries, which lies within one run, for one query head. It walks
all blocks of BLOCK_N keys of all ranges of the run in one loop, so that the pipeline of loads is
filled once for a tile and not once for a range. A block that lies wholly within its range and
before its diagonal is computed without a mask; tails and diagonals take a branch that all threads
share. Softmax is to base 2 with statistics in fp32. Programs are numbered so that the heads of a
tile are neighbours (the heads of a group share keys in the cache) and the tiles with most work come
first.

Shape suffixes: docs/notation.md.
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


@triton.jit
def hide_keys(score_QT, query_Q, key_T, row, stop, reach, first_query, BLOCK: tl.constexpr):
    """The scores of a block of keys from `row` on, -inf where the query does not see the key. A
    block that all queries of the tile see is left as it is, by a branch that all threads share."""
    if (row + BLOCK > stop) | (row + BLOCK > first_query + reach + 1):
        score_QT = tl.where(
            (key_T < stop)[None, :] & (key_T[None, :] <= query_Q[:, None] + reach),
            score_QT,
            float("-inf"),
        )
    return score_QT


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
    AHEAD: tl.constexpr,
):
    """out [rows, HEADS, D] and lse [HEADS, rows] (natural logarithm) of q over k and v [keys, HEADS
    / GROUP, D]. AHEAD: the scores of the next block are issued before the softmax of this one, so
    that the matrix units work meanwhile."""
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first_query, stop_query, run = load_triple(tiles, number)
    cursor, end = tl.load(of_run + run), tl.load(of_run + run + 1)
    STRIDE: tl.constexpr = HEADS // GROUP * D
    scale = scale * LOG2_E

    query_Q = first_query + tl.arange(0, BLOCK_M)
    base = first_query.to(tl.int64) * (HEADS * D) + head * D
    place_QD = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    place_TD = tl.arange(0, BLOCK_N)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    q_QD = tl.load(q + base + place_QD, mask=(query_Q < stop_query)[:, None], other=0.0)
    acc_QD = tl.zeros([BLOCK_M, D], tl.float32)
    peak_Q = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_M], tl.float32)

    blocks = count_key_blocks(ranges, cursor, end, stop_query, BLOCK_N)
    row, stop, reach = load_keys(ranges, cursor, stop_query)
    column = head // GROUP * D
    if AHEAD:
        k_TD = load_rows(k, k_blocks, column, row, stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS)
        score_QT = tl.dot(q_QD, tl.trans(k_TD), input_precision="ieee")
    for block in tl.range(0, blocks, num_stages=STAGES):
        key_T = row + tl.arange(0, BLOCK_N)
        v_TD = load_rows(v, v_blocks, column, row, stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS)
        if AHEAD:
            next_cursor, next_row, next_stop, next_reach = next_keys(
                ranges, cursor, row, stop, reach, stop_query, BLOCK_N
            )
            # Behind the last block there is no range: nothing is loaded.
            k_stop = tl.where(block + 1 < blocks, next_stop, 0)
            k_TD = load_rows(
                k, k_blocks, column, next_row, k_stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS
            )
            next_score_QT = tl.dot(q_QD, tl.trans(k_TD), input_precision="ieee")
        else:
            k_TD = load_rows(k, k_blocks, column, row, stop, place_TD, STRIDE, BLOCK_N, DESCRIPTORS)
            score_QT = tl.dot(q_QD, tl.trans(k_TD), input_precision="ieee")
        score_QT = hide_keys(score_QT, query_Q, key_T, row, stop, reach, first_query, BLOCK_N)
        new_peak_Q = tl.maximum(peak_Q, tl.max(score_QT, 1) * scale)
        # A row that has seen nothing yet has a peak of -inf, and -inf - -inf is NaN.
        base_Q = tl.where(new_peak_Q == float("-inf"), 0.0, new_peak_Q)
        weight_QT = tl.exp2(score_QT * scale - base_Q[:, None])
        shrink_Q = tl.exp2(peak_Q - base_Q)
        total_Q = total_Q * shrink_Q + tl.sum(weight_QT, 1)
        acc_QD = tl.dot(
            weight_QT.to(v_TD.dtype), v_TD, acc_QD * shrink_Q[:, None], input_precision="ieee"
        )
        peak_Q = new_peak_Q
        if AHEAD:
            score_QT = next_score_QT
            cursor, row, stop, reach = next_cursor, next_row, next_stop, next_reach
        else:
            cursor, row, stop, reach = next_keys(
                ranges, cursor, row, stop, reach, stop_query, BLOCK_N
            )

    empty_Q = total_Q == 0.0
    total_Q = tl.where(empty_Q, 1.0, total_Q)
    tl.store(
        out + base + place_QD,
        (acc_QD / total_Q[:, None]).to(out.dtype.element_ty),
        mask=(query_Q < stop_query)[:, None],
    )
    lse_Q = tl.where(empty_Q, float("-inf"), (peak_Q + tl.log2(total_Q)) * LN_2)
    tl.store(lse + head * rows.to(tl.int64) + query_Q, lse_Q, mask=query_Q < stop_query)
