"""Triton: tiles of the scores p . z / temperature of rows and candidates, which live in registers;
the matrix of all of them is never stored.

Forward keeps of every row a running maximum, the sum of exponentials below it, and the score of its
own candidate, over a range of candidates; ranges are combined in a fixed order, so that the loss is
bit-identical from run to run. Rows and candidates are read as they are and scores are scaled by
their inverse norms, s and r. Backward makes for some rows the slope

    g / temperature (exp(score - lse) - [own]) r

of which the gradient of the direction is a product with the candidates.

Shape suffixes: docs/notation.md.
"""

import triton
import triton.language as tl

# Rows of the sums of a range of candidates: maximum, sum of exponentials, own score.
SUMS = tl.constexpr(3)
# Below every score, and no infinity, whose difference with itself would be NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _scores(
    prediction,
    candidates,
    s_M,
    r_O,
    row_M,
    column_O,
    inverse_temperature,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_M, BLOCK_O] in fp32. Rows and columns have to exist."""
    score_MO = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    feature_W = tl.arange(0, BLOCK_W)
    prediction += row_M.to(tl.int64)[:, None] * W + feature_W[None, :]
    candidates += column_O.to(tl.int64)[None, :] * W + feature_W[:, None]
    for start in tl.range(0, W, BLOCK_W, num_stages=STAGES):
        if W % BLOCK_W == 0:
            p_MW = tl.load(prediction + start)
            z_WO = tl.load(candidates + start)
        else:
            p_MW = tl.load(prediction + start, mask=(start + feature_W < W)[None, :], other=0.0)
            z_WO = tl.load(candidates + start, mask=(start + feature_W < W)[:, None], other=0.0)
        score_MO = tl.dot(p_MW, z_WO, score_MO, input_precision="ieee")
    return score_MO * (s_M * inverse_temperature)[:, None] * r_O[None, :]


@triton.jit(do_not_specialize=["rows", "columns", "first"])
def contrast_sums(
    prediction,
    candidates,
    scales,
    lengths,
    sums,
    rows,
    columns,
    first,
    inverse_temperature,
    W: tl.constexpr,
    RANGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums [ranges, 3, rows] of ranges of RANGE candidates; scales [rows], lengths [columns]: the
    inverse norms s and r."""
    ranges = tl.cdiv(columns, RANGE)
    number = tl.program_id(0) % ranges
    row_M = tl.program_id(0) // ranges * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_M = tl.minimum(row_M, rows - 1)
    s_M = tl.load(scales + safe_M)
    highest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    own_M = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum((number + 1) * RANGE, columns)
    for begin in tl.range(number * RANGE, end, BLOCK_O):
        column_O = begin + tl.arange(0, BLOCK_O)
        safe_O = tl.minimum(column_O, columns - 1)
        score_MO = _scores(
            prediction, candidates, s_M, tl.load(lengths + safe_O), safe_M, safe_O,
            inverse_temperature, W, BLOCK_M, BLOCK_O, BLOCK_W, STAGES,
        )  # fmt: skip
        is_own_MO = column_O[None, :] == (first + row_M)[:, None]
        own_M += tl.sum(tl.where(is_own_MO, score_MO, 0.0), 1)
        score_MO = tl.where((column_O < end)[None, :], score_MO, LOWEST)
        higher_M = tl.maximum(highest_M, tl.max(score_MO, 1))
        total_M = total_M * tl.exp(highest_M - higher_M)
        total_M += tl.sum(tl.exp(score_MO - higher_M[:, None]), 1)
        highest_M = higher_M
    sums += number * SUMS * rows.to(tl.int64) + row_M
    tl.store(sums, highest_M, mask=row_M < rows)
    tl.store(sums + rows.to(tl.int64), total_M, mask=row_M < rows)
    tl.store(sums + 2 * rows.to(tl.int64), own_M, mask=row_M < rows)


@triton.jit(do_not_specialize=["rows", "ranges"])
def contrast_loss(sums, lse, loss, rows, ranges, BLOCK_M: tl.constexpr):
    """lse and loss [rows] from the sums of all ranges."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = row_M < rows
    rows = rows.to(tl.int64)
    highest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    own_M = tl.zeros([BLOCK_M], tl.float32)
    for number in tl.range(0, ranges):
        place = sums + number * SUMS * rows + row_M
        of_range_M = tl.load(place, mask=inside_M, other=LOWEST)
        higher_M = tl.maximum(highest_M, of_range_M)
        total_M = total_M * tl.exp(highest_M - higher_M)
        of_range_M = tl.exp(of_range_M - higher_M)
        total_M += of_range_M * tl.load(place + rows, mask=inside_M, other=0.0)
        own_M += tl.load(place + 2 * rows, mask=inside_M, other=0.0)
        highest_M = higher_M
    lse_M = highest_M + tl.log(tl.where(inside_M, total_M, 1.0))
    tl.store(lse + row_M, lse_M, mask=inside_M)
    tl.store(loss + row_M, lse_M - own_M, mask=inside_M)


@triton.jit(do_not_specialize=["start", "rows", "columns", "first"])
def contrast_slope(
    prediction,
    candidates,
    scales,
    lengths,
    lse,
    grad,
    slope,
    start,
    rows,
    columns,
    first,
    inverse_temperature,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """slope [.., columns] of the rows from `start` up to `rows`, row `start` in its row 0."""
    tiles = tl.cdiv(columns, BLOCK_O)
    column_O = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    row_M = start + tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_M, safe_O = tl.minimum(row_M, rows - 1), tl.minimum(column_O, columns - 1)
    r_O = tl.load(lengths + safe_O)
    score_MO = _scores(
        prediction, candidates, tl.load(scales + safe_M), r_O, safe_M, safe_O,
        inverse_temperature, W, BLOCK_M, BLOCK_O, BLOCK_W, STAGES,
    )  # fmt: skip
    share_MO = tl.exp(score_MO - tl.load(lse + safe_M)[:, None])
    share_MO -= tl.where(column_O[None, :] == (first + row_M)[:, None], 1.0, 0.0)
    factor_M = tl.load(grad + safe_M) * inverse_temperature
    slope_MO = share_MO * factor_M[:, None] * r_O[None, :]
    place_MO = (row_M - start).to(tl.int64)[:, None] * columns + column_O[None, :]
    tl.store(
        slope + place_MO,
        slope_MO.to(slope.dtype.element_ty),
        mask=(row_M < rows)[:, None] & (column_O < columns)[None, :],
    )
