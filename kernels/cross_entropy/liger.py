"""Cross entropy in chunks, with liger-kernel's Triton kernel within a chunk."""

import torch

from uno_ds.kernels import launch
from uno_ds.kernels.cross_entropy import chunked


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Same result as the reference. Raises ValueError for fp64, which the kernel cannot compute."""
    launch.check_device("liger cross entropy", hidden=hidden, weight=weight, labels=labels)
    if hidden.dtype == torch.float64:
        raise ValueError("The liger cross entropy computes in float32 at most, got torch.float64.")
    return chunked.linear_cross_entropy(hidden, weight, labels, liger=True)
