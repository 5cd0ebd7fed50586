"""Hidden states as pictures: their first three principal components as red, green and blue.

Shape suffixes: docs/notation.md."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

COLOURS = 3
# Shares of the values that are shown as the darkest and the brightest.
LOW, HIGH = 0.01, 0.99


@dataclass(frozen=True)
class Basis:
    """axes_3H: directions of most variance; low_3, high_3: values that are shown as 0 and 1.
    explained: share of the variance that the three have."""

    axes_3H: torch.Tensor
    low_3: torch.Tensor
    high_3: torch.Tensor
    explained: float


def fit_basis(pieces: Callable[[], Iterable[torch.Tensor]]) -> Basis:
    """A basis for all pieces [T, H] together, of which one at a time is held: principal component
    analysis of tokens that are centred within their piece, so that a shift that all tokens of a
    piece share, as the noise level's embedding is, has no colour (tokens as colours: DINOv2,
    arXiv:2304.07193). The sign of an axis is such that its largest entry is
    positive."""
    covariance_HH = torch.zeros(0)
    count = 0
    for tokens_TH in pieces():
        centred_TH = centre(tokens_TH)
        if not count:
            covariance_HH = torch.zeros(centred_TH.shape[1], centred_TH.shape[1]).double()
        covariance_HH += centred_TH.T @ centred_TH
        count += len(centred_TH)
    assert count, "no piece was given"
    variances_H, vectors_HH = torch.linalg.eigh(covariance_HH / count)
    axes_3H = vectors_HH.flip(1)[:, :COLOURS].T
    largest_3 = axes_3H.gather(1, axes_3H.abs().argmax(dim=1, keepdim=True))
    axes_3H = axes_3H * largest_3.sign()
    shown_T3 = torch.cat([centre(tokens_TH) @ axes_3H.T for tokens_TH in pieces()])
    total = variances_H.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Basis(
        axes_3H,
        shown_T3.quantile(LOW, dim=0),
        shown_T3.quantile(HIGH, dim=0),
        float(variances_H[-COLOURS:].sum() / total),
    )


def colours(tokens_TH: torch.Tensor, basis: Basis, grid: tuple[int, int]) -> torch.Tensor:
    """[rows, columns, 3] in 0..1: the tokens of one image, row by row, in the colours of a
    basis."""
    shown_T3 = centre(tokens_TH) @ basis.axes_3H.T
    span_3 = (basis.high_3 - basis.low_3).clamp(min=1e-12)
    return ((shown_T3 - basis.low_3) / span_3).clamp(0, 1).reshape(*grid, COLOURS)


def centre(tokens_TH: torch.Tensor) -> torch.Tensor:
    wide = tokens_TH.double()
    return wide - wide.mean(dim=0)
