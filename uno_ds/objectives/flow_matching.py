"""Flow matching on latent rows: x_t = (1 - t) x + t eps, velocity target v = eps - x.

Legend of shape suffixes: G generation rows, N noised rows, C values of a latent token.
"""

import torch

from uno_ds.sequence.batch import LatentRows


def noise_latents(clean_GC: torch.Tensor, rows: LatentRows) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [G, C] as the model sees them, velocity target [N, C] of the noised rows). Clean
    rows stay as they are."""
    clean_NC = clean_GC[rows.noised_N]
    t_N1 = rows.timestep_G[rows.noised_N, None].to(clean_GC.dtype)
    noise_NC = rows.noise_NC.to(clean_GC.dtype)
    noised_NC = (1 - t_N1) * clean_NC + t_N1 * noise_NC
    return clean_GC.index_copy(0, rows.noised_N, noised_NC), noise_NC - clean_NC


def flow_matching_loss(velocity_NC: torch.Tensor, target_NC: torch.Tensor) -> torch.Tensor:
    """[N]: squared error of each latent row, mean over its values, in fp32 at least."""
    wide = torch.promote_types(velocity_NC.dtype, torch.float32)
    return (velocity_NC.to(wide) - target_NC.to(wide)).square().mean(dim=-1)
