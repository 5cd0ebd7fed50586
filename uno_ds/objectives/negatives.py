"""Negative captions: a wrong caption of an image must be less likely than its own, by a margin.

Shape suffixes: docs/notation.md."""

from collections.abc import Callable

import torch
from torch.nn import functional

from uno_ds.sequence.batch import NegativeCaptions

# The loss of what is missing to the margin.
NEGATIVE_FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softplus": functional.softplus,
    "hinge": functional.relu,
}


def negative_loss(
    entropy_Y: torch.Tensor, negatives: NegativeCaptions, margin: float, form: str
) -> torch.Tensor:
    """[B], one for each negative. `entropy_Y`: cross entropy in nats of each token of captions and
    then negatives; `margin`: by how many nats a token the mean of the negative must exceed that of
    the caption; `form`: a name of NEGATIVE_FORMS."""
    shares_BT = negatives.shares_BT.to(entropy_Y.dtype)
    gap_B = (entropy_Y[negatives.tokens_BT] * shares_BT).sum(dim=1)
    return NEGATIVE_FORMS[form](margin - gap_B)
