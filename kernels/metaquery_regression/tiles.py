"""Triton: tiles of the prediction p = hidden @ weight.T, which live in registers and are never
stored.

Forward writes three fp32 sums of each row and tile of features, and a second kernel adds them in a
fixed order: the loss is bit-identical from run to run. With s = 1/|p| and r = 1/|z| (0 for a row
without direction), and u = d loss / d(s p), the gradient is

    dp = s (u - (s p . u) s p)

For cosine and l2, u is -z r and -2 z r up to a multiple of s p, which drops out, so that one pass
computes loss and gradient. smooth_l1 clips s p - z r feature by feature, which needs s first: a
second pass recomputes the tiles.

Shape suffixes: docs/notation.md.
"""

import triton
import triton.language as tl

from uno_ds.kernels.metaquery_regression.kinds import RegressionKind

COSINE = tl.constexpr(RegressionKind.COSINE.value)
L2 = tl.constexpr(RegressionKind.L2.value)
SMOOTH_L1 = tl.constexpr(RegressionKind.SMOOTH_L1.value)
EPSILON = tl.constexpr(1e-6)
# Rows of the statistics that backward reads (s, r and s p . u) and of the sums of a tile (p.p, p.z
# and z.z).
STATISTICS = tl.constexpr(3)


@triton.jit
def _prediction(
    hidden,
    weight,
    row_M,
    feature_W,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_HEAD: tl.constexpr,
):
    """[BLOCK_M, BLOCK_D] in fp32; 0 for features that do not exist. Rows have to exist."""
    if HAS_HEAD:
        tile_MW = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        column_H = tl.arange(0, BLOCK_H)
        hidden += row_M.to(tl.int64)[:, None] * H + column_H[None, :]
        # Features past the last one repeat it: a mask on every load of the loop would cost more.
        weight += tl.minimum(feature_W, D - 1)[None, :] * H + column_H[:, None]
        for start in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            if H % BLOCK_H == 0:
                hidden_MH = tl.load(hidden + start)
                weight_HW = tl.load(weight + start)
            else:
                hidden_MH = tl.load(hidden + start, mask=(start + column_H < H)[None, :], other=0.0)
                weight_HW = tl.load(weight + start, mask=(start + column_H < H)[:, None], other=0.0)
            tile_MW = tl.dot(hidden_MH, weight_HW, tile_MW, input_precision="ieee")
        if D % BLOCK_D != 0:
            tile_MW = tl.where((feature_W < D)[None, :], tile_MW, 0.0)
    else:
        tile_MW = _features(hidden, row_M, feature_W, D)
    return tile_MW


@triton.jit
def _features(tensor, row_M, feature_W, D: tl.constexpr):
    """A tile of a tensor [rows, D] in fp32; 0 for features that do not exist. Rows have to
    exist."""
    return tl.load(
        tensor + row_M.to(tl.int64)[:, None] * D + feature_W[None, :],
        mask=(feature_W < D)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _place(rows, first, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tile of features, rows, rows for loads: the last one is repeated past the end, features) of
    this program. The tiles of features of one row tile are neighbours, so that they share its
    hidden rows in the cache."""
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    number = tl.program_id(0) % tiles
    row_M = first + tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return number, row_M, tl.minimum(row_M, rows - 1), number * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def regression_sums(
    hidden,
    weight,
    target,
    sums,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_HEAD: tl.constexpr,
):
    """sums [tiles of features, 3, rows]: p.p, p.z and z.z over the features of the tile."""
    number, row_M, safe_M, feature_W = _place(rows, 0, D, BLOCK_M, BLOCK_D)
    tile_MW = _prediction(
        hidden, weight, safe_M, feature_W, H, D, BLOCK_M, BLOCK_D, BLOCK_H, STAGES, HAS_HEAD
    )
    target_MW = _features(target, safe_M, feature_W, D)
    sums += number * STATISTICS * rows.to(tl.int64) + row_M
    tl.store(sums, tl.sum(tile_MW * tile_MW, 1), mask=row_M < rows)
    tl.store(sums + rows.to(tl.int64), tl.sum(tile_MW * target_MW, 1), mask=row_M < rows)
    tl.store(sums + 2 * rows.to(tl.int64), tl.sum(target_MW * target_MW, 1), mask=row_M < rows)


@triton.jit
def _inverse_norm(square_M):
    known_M = square_M > EPSILON * EPSILON
    return tl.where(known_M, 1.0 / tl.sqrt_rn(tl.where(known_M, square_M, 1.0)), 0.0)


@triton.jit(do_not_specialize=["rows"])
def regression_loss(
    sums, statistics, loss, rows, TILES: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr
):
    """statistics [3, rows] and loss [rows] from the sums of `regression_sums`; of smooth_l1 only s
    and r."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = row_M < rows
    rows = rows.to(tl.int64)
    own_M = tl.zeros([BLOCK_M], tl.float32)
    cross_M = tl.zeros([BLOCK_M], tl.float32)
    other_M = tl.zeros([BLOCK_M], tl.float32)
    for number in tl.static_range(TILES):
        place = sums + number * STATISTICS * rows + row_M
        own_M += tl.load(place, mask=inside_M, other=0.0)
        cross_M += tl.load(place + rows, mask=inside_M, other=0.0)
        other_M += tl.load(place + 2 * rows, mask=inside_M, other=0.0)
    s_M, r_M = _inverse_norm(own_M), _inverse_norm(other_M)
    tl.store(statistics + row_M, s_M, mask=inside_M)
    tl.store(statistics + rows + row_M, r_M, mask=inside_M)
    cosine_M = cross_M * s_M * r_M
    if KIND == COSINE:
        tl.store(statistics + 2 * rows + row_M, -cosine_M, mask=inside_M)
        tl.store(loss + row_M, 1.0 - cosine_M, mask=inside_M)
    elif KIND == L2:
        ones_M = (s_M > 0).to(tl.float32) + (r_M > 0).to(tl.float32)
        tl.store(statistics + 2 * rows + row_M, -2.0 * cosine_M, mask=inside_M)
        tl.store(loss + row_M, tl.maximum(ones_M - 2.0 * cosine_M, 0.0), mask=inside_M)
    else:
        # `regression_clipped_loss` writes the rest of smooth_l1.
        tl.static_assert(KIND == SMOOTH_L1, "this kind of regression loss has no branch here")


@triton.jit
def _difference(tile_MW, target_MW, statistics, rows, row_M):
    """(s p, s p - r z)."""
    unit_MW = tile_MW * tl.load(statistics + row_M)[:, None]
    return unit_MW, unit_MW - target_MW * tl.load(statistics + rows.to(tl.int64) + row_M)[:, None]


@triton.jit(do_not_specialize=["rows"])
def regression_clipped_sums(
    hidden,
    weight,
    target,
    statistics,
    sums,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_HEAD: tl.constexpr,
):
    """sums [tiles of features, 2, rows] of smooth_l1: the loss and s p . u over the features of the
    tile."""
    number, row_M, safe_M, feature_W = _place(rows, 0, D, BLOCK_M, BLOCK_D)
    tile_MW = _prediction(
        hidden, weight, safe_M, feature_W, H, D, BLOCK_M, BLOCK_D, BLOCK_H, STAGES, HAS_HEAD
    )
    unit_MW, difference_MW = _difference(
        tile_MW, _features(target, safe_M, feature_W, D), statistics, rows, safe_M
    )
    size_MW = tl.abs(difference_MW)
    huber_MW = tl.where(size_MW < 1.0, 0.5 * size_MW * size_MW, size_MW - 0.5)
    clipped_MW = tl.minimum(tl.maximum(difference_MW, -1.0), 1.0)
    sums += number * 2 * rows.to(tl.int64) + row_M
    tl.store(sums, tl.sum(huber_MW, 1), mask=row_M < rows)
    tl.store(sums + rows.to(tl.int64), tl.sum(unit_MW * clipped_MW, 1), mask=row_M < rows)


@triton.jit(do_not_specialize=["rows"])
def regression_clipped_loss(
    sums, statistics, loss, rows, TILES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """loss [rows] and the last row of the statistics from the sums of `regression_clipped_sums`."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = row_M < rows
    rows = rows.to(tl.int64)
    loss_M = tl.zeros([BLOCK_M], tl.float32)
    projection_M = tl.zeros([BLOCK_M], tl.float32)
    for number in tl.static_range(TILES):
        place = sums + number * 2 * rows + row_M
        loss_M += tl.load(place, mask=inside_M, other=0.0)
        projection_M += tl.load(place + rows, mask=inside_M, other=0.0)
    tl.store(loss + row_M, loss_M, mask=inside_M)
    tl.store(statistics + 2 * rows + row_M, projection_M, mask=inside_M)


@triton.jit(do_not_specialize=["first", "rows"])
def regression_slope(
    hidden,
    weight,
    target,
    statistics,
    grad,
    slope,
    first,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_HEAD: tl.constexpr,
):
    """slope [.., D]: gradient of the prediction for the rows from `first` on, row `first` in its
    row 0."""
    _, row_M, safe_M, feature_W = _place(rows, first, D, BLOCK_M, BLOCK_D)
    tile_MW = _prediction(
        hidden, weight, safe_M, feature_W, H, D, BLOCK_M, BLOCK_D, BLOCK_H, STAGES, HAS_HEAD
    )
    target_MW = _features(target, safe_M, feature_W, D)
    unit_MW, difference_MW = _difference(tile_MW, target_MW, statistics, rows, safe_M)
    if KIND == SMOOTH_L1:
        direction_MW = tl.minimum(tl.maximum(difference_MW, -1.0), 1.0)
    elif KIND == L2:
        direction_MW = 2.0 * (difference_MW - unit_MW)
    else:
        tl.static_assert(KIND == COSINE, "this kind of regression loss has no branch here")
        direction_MW = difference_MW - unit_MW
    projection_M = tl.load(statistics + 2 * rows.to(tl.int64) + safe_M)
    scale_M = tl.load(grad + safe_M) * tl.load(statistics + safe_M)
    slope_MW = scale_M[:, None] * (direction_MW - projection_M[:, None] * unit_MW)
    place_MW = (row_M - first).to(tl.int64)[:, None] * D + feature_W[None, :]
    tl.store(
        slope + place_MW,
        slope_MW.to(slope.dtype.element_ty),
        mask=(row_M < rows)[:, None] & (feature_W < D)[None, :],
    )
