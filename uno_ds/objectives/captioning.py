"""Cross entropy of captions and answers by the language head.

Shape suffixes: docs/notation.md.
"""

import torch

from uno_ds.model.experts import LanguageHead


def captioning_loss(
    lm_head: LanguageHead, hidden_YH: torch.Tensor, labels_Y: torch.Tensor
) -> torch.Tensor:
    """[Y]: cross entropy in nats, in fp32 at least, of the next token of each row."""
    return lm_head(hidden_YH, labels_Y)
