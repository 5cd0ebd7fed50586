"""Contrastive metaquery loss in plain torch: the specification.

Scores are made for some rows at a time and made again in backward, so that no matrix of all rows
and all candidates exists. Shape suffixes: docs/notation.md."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

EPSILON = 1e-6
# Of the scores of some rows in fp32.
SCORE_BYTES = 2**26


def metaquery_contrast(
    hidden_MH: torch.Tensor,
    weight_WH: torch.Tensor | None,
    candidates_OW: torch.Tensor,
    first: int,
    temperature: float,
) -> torch.Tensor:
    """InfoNCE (arXiv:1807.03748) of each row, in fp32 or fp64: the cross entropy of the softmax
    over candidates of p . z / temperature at the row's own candidate, which is number `first` +
    row. p: direction of weight @ hidden; z: direction of a candidate. A row whose norm is at most
    1e-6 has no direction: it counts as 0 and gets a gradient of 0."""
    prediction = hidden_MH if weight_WH is None else hidden_MH @ weight_WH.T
    wide = torch.promote_types(prediction.dtype, torch.float32)
    p_MW, z_OW = direction(prediction.to(wide)), direction(candidates_OW.to(wide))
    own_M = first + torch.arange(len(p_MW), device=p_MW.device)
    rows = max(1, SCORE_BYTES // (4 * max(1, len(z_OW))))
    losses = [
        # There is nothing random, and reading the generator's state waits for the device.
        checkpoint(
            _losses,
            block_MW,
            z_OW,
            own_block_M,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for block_MW, own_block_M in zip(p_MW.split(rows), own_M.split(rows), strict=True)
    ]
    return torch.cat(losses)


def _losses(
    block_MW: torch.Tensor, z_OW: torch.Tensor, own_block_M: torch.Tensor, temperature: float
) -> torch.Tensor:
    scores_MO = block_MW @ z_OW.T / temperature
    return F.cross_entropy(scores_MO, own_block_M, reduction="none")


def direction(rows_MW: torch.Tensor) -> torch.Tensor:
    norm_M1 = torch.linalg.vector_norm(rows_MW, dim=-1, keepdim=True)
    known_M1 = norm_M1 > EPSILON
    return rows_MW.where(known_M1, 0.0) / norm_M1.where(known_M1, 1.0)
