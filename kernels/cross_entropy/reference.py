"""Cross entropy of a linear head in plain torch: the specification.

Shape suffixes: docs/notation.md.
"""

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden_YH: torch.Tensor, weight_VH: torch.Tensor, labels_Y: torch.Tensor
) -> torch.Tensor:
    """[Y]: cross entropy in nats of softmax(hidden @ weight.T), in fp32 at least. Holds all
    logits."""
    logits_YV = hidden_YH @ weight_VH.T
    return F.cross_entropy(
        logits_YV.to(torch.promote_types(logits_YV.dtype, torch.float32)),
        labels_Y,
        reduction="none",
    )
