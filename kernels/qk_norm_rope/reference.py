"""QK-norm and rotary embedding in plain torch: the specification.

Shape suffixes: docs/notation.md."""

from collections.abc import Sequence

import torch

from uno_ds.kernels.pointwise import reference as pointwise


def qk_norm_rope(
    q_TND: Sequence[torch.Tensor],
    k_TKD: Sequence[torch.Tensor],
    v_TKD: Sequence[torch.Tensor],
    q_weight_D: Sequence[torch.Tensor],
    k_weight_D: Sequence[torch.Tensor],
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    eps: float,
    place_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [T, heads, D] of all slabs; queries and keys normalised by their
    slab's weight, then rotated."""
    q = rotate(_normed(q_TND, q_weight_D, eps), cos_TF, sin_TF)
    k = rotate(_normed(k_TKD, k_weight_D, eps), cos_TF, sin_TF)
    v = torch.cat(list(v_TKD))
    if place_T is None:
        return q, k, v
    return _placed(q, place_T), _placed(k, place_T), _placed(v, place_T)


def _normed(
    slabs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], eps: float
) -> torch.Tensor:
    normed = [pointwise.rms_norm(slab, weight, eps) for slab, weight in zip(slabs, weights)]
    return torch.cat(normed)


def _placed(x: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
    """Row i becomes row place_T[i]."""
    return torch.zeros_like(x).index_copy(0, place_T.long(), x)


def rotate(x_TND: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split convention: channel i is paired with channel i + D/2."""
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    first, second = x_TND.chunk(2, dim=-1)
    rotated_first = first * cos_T1F - second * sin_T1F
    rotated_second = second * cos_T1F + first * sin_T1F
    return torch.cat([rotated_first, rotated_second], dim=-1)
