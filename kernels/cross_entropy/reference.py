"""Cross entropy of a linear head in plain torch: the specification.

Legend of shape suffixes: N rows, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor
) -> torch.Tensor:
    """[N]: cross entropy in nats of softmax(hidden @ weight.T), in fp32 at least. Holds all
    logits."""
    logits_NV = hidden_NH @ weight_VH.T
    return F.cross_entropy(
        logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)),
        labels_N,
        reduction="none",
    )
