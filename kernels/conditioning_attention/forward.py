"""Triton: forward of segment-masked attention, and the ranges of a tile that the backward kernels read too.

One program computes one tile of queries, which lies within one run, for one query head. It walks the run's key ranges
twice. First every block of BLOCK_N keys that lies wholly within a range and wholly before its diagonal, as one loop over
all ranges, so that the pipeline of loads is filled once; there is no mask in it. Then what is left of each range, the tail
and the diagonal, with masks. Softmax is to base 2 with statistics in fp32. Programs are numbered so that the heads of a
tile are neighbours (the heads of a group share keys in the cache) and the tiles with most work come first.

Legend of shape suffixes: M queries of a block, N keys of a block, D head dim.
"""
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(tiles, number):
    """(first row, row past the last, run) of a tile."""
    return tl.load(tiles + number * 3), tl.load(tiles + number * 3 + 1), tl.load(tiles + number * 3 + 2)


@triton.jit
def load_range(ranges, number):
    """(start, stop, reach) of a range."""
    return tl.load(ranges + number * 3), tl.load(ranges + number * 3 + 1), tl.load(ranges + number * 3 + 2)


@triton.jit
def whole_keys(ranges, number, query):
    """(start, stop) of the keys of a range that every query from `query` on sees."""
    start, stop, reach = load_range(ranges, number)
    return start, tl.maximum(start, tl.minimum(stop, query + reach + 1))


@triton.jit
def count_key_blocks(ranges, first, last, query, BLOCK: tl.constexpr):
    """(number of the first range that holds a whole block, whole blocks of the ranges first .. last - 1)."""
    cursor, blocks = first, 0
    for number in range(first, last):
        start, stop = whole_keys(ranges, number, query)
        count = (stop - start) // BLOCK
        # Only the first range can be without a block before one that has some: the others are sorted by length.
        cursor += ((number == first) & (count == 0)).to(tl.int32)
        blocks += count
    return cursor, blocks


@triton.jit
def _forward_block(acc_MD, peak_M, total_M, q_MD, k, v, place_ND, row, stop, reach, query_M, scale, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr,
                   MASKED: tl.constexpr):
    """Adds BLOCK_N keys from `row` on to the running softmax."""
    base = row.to(tl.int64) * STRIDE
    if MASKED:
        key_N = row + tl.arange(0, BLOCK_N)
        k_ND = tl.load(k + base + place_ND, mask=(key_N < stop)[:, None], other=0.0)
        v_ND = tl.load(v + base + place_ND, mask=(key_N < stop)[:, None], other=0.0)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        visible_MN = (key_N < stop)[None, :] & (key_N[None, :] <= query_M[:, None] + reach)
        score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1) * scale)
        # A row that has seen nothing yet has a peak of -inf, and -inf - -inf is NaN.
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
    else:
        k_ND = tl.load(k + base + place_ND)
        v_ND = tl.load(v + base + place_ND)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1) * scale)
        base_M = new_peak_M
    weight_MN = tl.exp2(score_MN * scale - base_M[:, None])
    shrink_M = tl.exp2(peak_M - base_M)
    total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee")
    return acc_MD, new_peak_M, total_M


@triton.jit(do_not_specialize=["rows"])
def attention_forward(q, k, v, out, lse, tiles, ranges, of_run, scale, rows, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """out [rows, HEADS, D] and lse [HEADS, rows] (natural logarithm) of q over k and v [keys, HEADS / GROUP, D]."""
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first_query, stop_query, run = load_tile(tiles, number)
    first, plain, end = load_range(of_run, run)
    STRIDE: tl.constexpr = HEADS // GROUP * D
    scale = scale * LOG2_E

    query_M = first_query + tl.arange(0, BLOCK_M)
    base = first_query.to(tl.int64) * (HEADS * D) + head * D
    place_MD = tl.arange(0, BLOCK_M)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    place_ND = tl.arange(0, BLOCK_N)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k += head // GROUP * D
    v += head // GROUP * D
    q_MD = tl.load(q + base + place_MD, mask=(query_M < stop_query)[:, None], other=0.0)
    acc_MD = tl.zeros([BLOCK_M, D], tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)

    cursor, blocks = count_key_blocks(ranges, first, plain, first_query, BLOCK_N)
    row, stop = whole_keys(ranges, cursor, first_query)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        acc_MD, peak_M, total_M = _forward_block(acc_MD, peak_M, total_M, q_MD, k, v, place_ND, row, stop, 0, query_M, scale, STRIDE, BLOCK_N, False)
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
            acc_MD, peak_M, total_M = _forward_block(acc_MD, peak_M, total_M, q_MD, k, v, place_ND, start + block * BLOCK_N, stop, reach, query_M,
                                                     scale, STRIDE, BLOCK_N, True)

    empty_M = total_M == 0.0
    total_M = tl.where(empty_M, 1.0, total_M)
    out_MD = (acc_MD / total_M[:, None]).to(out.dtype.element_ty)
    tl.store(out + base + place_MD, out_MD, mask=(query_M < stop_query)[:, None])
    lse_M = tl.where(empty_M, float("-inf"), (peak_M + tl.log2(total_M)) * LN_2)
    tl.store(lse + head * rows.to(tl.int64) + query_M, lse_M, mask=query_M < stop_query)
