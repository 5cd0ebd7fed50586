"""Flow matching on latent rows: x_t = (1 - t) x + t eps, velocity target v = eps - x.

Shape suffixes: docs/notation.md.
"""

import torch

from uno_ds.sequence.batch import LatentRows


def noise_latents(clean_GC: torch.Tensor, rows: LatentRows) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [G, C] with noise added to the noised rows, velocity target [X, C] of the noised
    rows). Clean rows are returned unchanged."""
    clean_XC = clean_GC[rows.noised_X]
    t_X1 = rows.timestep_G[rows.noised_X, None].to(clean_GC.dtype)
    noise_XC = rows.noise_XC.to(clean_GC.dtype)
    noised_XC = (1 - t_X1) * clean_XC + t_X1 * noise_XC
    return clean_GC.index_copy(0, rows.noised_X, noised_XC), noise_XC - clean_XC


def flow_matching_loss(velocity_XC: torch.Tensor, target_XC: torch.Tensor) -> torch.Tensor:
    """[X]: squared error of each latent row, mean over its values, in fp32 at least."""
    wide = torch.promote_types(velocity_XC.dtype, torch.float32)
    return (velocity_XC.to(wide) - target_XC.to(wide)).square().mean(dim=-1)


def flow_contrast_loss(
    velocity_XC: torch.Tensor, target_XC: torch.Tensor, rows: LatentRows
) -> torch.Tensor:
    """[X], or [0] without partners: squared distance of each row's velocity to the target of its
    partner's row, mean over its values, in fp32 at least (arXiv 2506.05350)."""
    has_partner = slice(len(rows.partner_X))
    return flow_matching_loss(velocity_XC[has_partner], target_XC[rows.partner_X])
