"""Cross entropy of captions and answers, read out by the language head."""

import torch

from uno_ds.model.experts import LanguageHead


def captioning_loss(
    lm_head: LanguageHead, hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """[N]: cross entropy in nats of the next token of each row of hidden [N, H], in fp32 at least.
    Only these rows are read."""
    return lm_head(hidden, labels)
