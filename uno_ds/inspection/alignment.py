"""How alike two representations of the same images are, and how a representation varies over an
image.

Shape suffixes: docs/notation.md."""

import functools
import math

import torch
import torch.nn.functional as F

NEIGHBOURS = 10
# iREPA measures 16 x 16 tokens: pairs at least 6 apart are distant, and the slope is fitted up to a
# distance of 8. Other grids have the same shares of their shorter side.
DISTANT, LONGEST_FITTED, MEASURED_SIDE = 6, 8, 16
SPATIAL_MEASURES = ("local_minus_distant", "decay", "contrast", "region")


def linear_cka(x_BW: torch.Tensor, y_BW: torch.Tensor) -> float:
    """Linear centred kernel alignment of two features of the same images, 0 to 1:
    ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred columns, Frobenius norms (Kornblith et al. 2019,
    arXiv:1905.00414). Invariant to rotation and to scaling of either side. It is biased upwards:
    unrelated features of B images and W values have about W / B, and near 1 where they are wider
    than there are images. Compare it with the value of a shuffled pairing. NaN if one side is the
    same for all images."""
    x_BB = _gram(x_BW - x_BW.mean(dim=0))
    y_BB = _gram(y_BW - y_BW.mean(dim=0))
    # <K, L> of the centred kernels K = XX', L = YY' is ||Y'X||^2, and needs no W x W matrix.
    scale = x_BB.norm() * y_BB.norm()
    return float((x_BB * y_BB).sum() / scale) if scale > 0 else math.nan


def cknna(x_BW: torch.Tensor, y_BW: torch.Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al. 2024, arXiv:2405.07987; k
    = 10 as in REPA, arXiv:2410.06940): CKA with the unbiased estimate of HSIC over those pairs of
    images that are among the `neighbours` nearest of each other's row in both features. Features
    are scaled to length 1, so that kernels are cosines. 1 for equal neighbourhoods, about 0 for
    unrelated ones, namely their share of neighbours, k / images; NaN where no pair is a neighbour
    in both. Needs more images than neighbours, and at least 4. The estimate is applied to kernels
    that neighbourhoods make asymmetric, as in the authors' code."""
    count = len(x_BW)
    if not 1 <= neighbours < count or count < 4:
        raise ValueError(f"{neighbours} neighbours need more than {count} images, and at least 4.")
    x_BB, y_BB = _gram(F.normalize(x_BW, dim=1)), _gram(F.normalize(y_BW, dim=1))
    near_x_BB, near_y_BB = _nearest(x_BB, neighbours), _nearest(y_BB, neighbours)
    both_BB = near_x_BB & near_y_BB
    shared = unbiased_hsic(x_BB * both_BB, y_BB * both_BB)
    own_x = unbiased_hsic(x_BB * near_x_BB, x_BB * near_x_BB)
    own_y = unbiased_hsic(y_BB * near_y_BB, y_BB * near_y_BB)
    scale = own_x * own_y
    return shared / math.sqrt(scale) if scale > 0 else math.nan


def spatial_measures(
    tokens_TW: torch.Tensor, grid: tuple[int, int], foreground_T: torch.Tensor | None = None
) -> torch.Tensor:
    """[4], in the order of SPATIAL_MEASURES, of one image's tokens, row by row (iREPA,
    arXiv:2512.10794, and its code; similarities are cosines, distances are Manhattan):

    local_minus_distant  mean similarity of direct neighbours less that of distant pairs (LDS)
    decay                minus the slope of the mean similarity over the distance (CDS)
    contrast             root mean square distance of the unit tokens from their mean (RMSC)
    region               over the tokens of the foreground that have both: mean similarity with its
                         direct neighbours in the foreground less that with distant tokens of the
                         background (SRSS)

    `foreground_T`: bool [T]; without it the last is not known. NaN where the grid has no such
    pairs."""
    assert len(tokens_TW) == grid[0] * grid[1], f"{len(tokens_TW)} tokens are not {grid}"
    unit_TW = F.normalize(tokens_TW, dim=1)
    similarity_TT = unit_TW @ unit_TW.T
    distance_TT = _distances(grid).to(tokens_TW.device)
    side = min(grid)
    distant = _share_of(side, DISTANT)
    longest = _share_of(side, LONGEST_FITTED)
    local = similarity_TT[distance_TT == 1].mean()
    far = similarity_TT[distance_TT >= distant].mean()
    centred_TW = unit_TW - unit_TW.mean(dim=0)
    contrast = centred_TW.square().sum(dim=1).mean().sqrt()
    region = similarity_TT.new_tensor(math.nan)
    if foreground_T is not None:
        inside_T = foreground_T.to(tokens_TW.device)
        near_TT = inside_T[:, None] & inside_T[None, :] & (distance_TT == 1)
        far_TT = inside_T[:, None] & ~inside_T[None, :] & (distance_TT >= distant)
        region = _region(similarity_TT, near_TT, far_TT)
    decay = _decay(similarity_TT, distance_TT, longest)
    return torch.stack([local - far, decay, contrast, region])


def _region(
    similarity_TT: torch.Tensor, near_TT: torch.Tensor, far_TT: torch.Tensor
) -> torch.Tensor:
    """Mean over the rows that have both kinds of pairs of the difference of their means."""
    near_T, far_T = near_TT.sum(dim=1), far_TT.sum(dim=1)
    has_both_T = (near_T > 0) & (far_T > 0)
    near_means = (similarity_TT * near_TT).sum(dim=1)[has_both_T] / near_T[has_both_T]
    far_means = (similarity_TT * far_TT).sum(dim=1)[has_both_T] / far_T[has_both_T]
    return (near_means - far_means).mean()


def _decay(similarity_TT: torch.Tensor, distance_TT: torch.Tensor, longest: int) -> torch.Tensor:
    distances = [step for step in range(1, longest + 1) if (distance_TT == step).any()]
    if len(distances) < 2:
        return similarity_TT.new_tensor(math.nan)
    means = torch.stack([similarity_TT[distance_TT == step].mean() for step in distances])
    centred = torch.tensor(distances, dtype=means.dtype, device=means.device)
    centred = centred - centred.mean()
    return -(means * centred).sum() / centred.square().sum()


def _share_of(side: int, of_measured: int) -> int:
    return max(2, round(side * of_measured / MEASURED_SIDE))


@functools.lru_cache(maxsize=4)
def _distances(grid: tuple[int, int]) -> torch.Tensor:
    """int16 [T, T]: Manhattan distance of the tokens of a grid."""
    sides = [torch.arange(side, dtype=torch.int16) for side in grid]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    rows_T, columns_T = rows.flatten(), columns.flatten()
    across_TT = (columns_T[:, None] - columns_T[None, :]).abs()
    return (rows_T[:, None] - rows_T[None, :]).abs() + across_TT


def _gram(x_BW: torch.Tensor) -> torch.Tensor:
    wide = x_BW.double()
    return wide @ wide.T


def _nearest(similarity_BB: torch.Tensor, neighbours: int) -> torch.Tensor:
    """bool [B, B]: whether the column is among the row's most similar ones, itself left out."""
    others_BB = similarity_BB.clone().fill_diagonal_(-math.inf)
    nearest = others_BB.topk(neighbours, dim=1).indices
    return torch.zeros_like(others_BB, dtype=torch.bool).scatter(1, nearest, True)


def unbiased_hsic(k_BB: torch.Tensor, l_BB: torch.Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, JMLR
    13, equation 5) of two symmetric kernels, whose diagonals do not count."""
    count = len(k_BB)
    k_BB, l_BB = k_BB.clone().fill_diagonal_(0), l_BB.clone().fill_diagonal_(0)
    trace = (k_BB * l_BB.T).sum()
    means = k_BB.sum() * l_BB.sum() / ((count - 1) * (count - 2))
    paths = 2 * (k_BB @ l_BB).sum() / (count - 2)
    return float((trace + means - paths) / (count * (count - 3)))
