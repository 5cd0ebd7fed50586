"""Cross entropy of captions and answers, read out by the language head."""
import torch
import torch.nn.functional as F
from torch import nn


def captioning_loss(lm_head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N]: cross entropy in nats of the next token of each row of hidden [N, H], in fp32 at least."""
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
