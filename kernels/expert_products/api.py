"""Public function expert_product: checks its arguments and calls the backend.

Shape suffixes: docs/notation.md."""

import torch

from uno_ds.kernels.backends import KERNELS, implementation

Pair = tuple[torch.Tensor, torch.Tensor]
OptionalPair = tuple[torch.Tensor | None, torch.Tensor | None]


def expert_product(
    x_Ti: torch.Tensor,
    understanding: int,
    weights_oi: Pair,
    biases_o: OptionalPair = (None, None),
    backend: str = KERNELS["experts"].reference,
) -> torch.Tensor:
    """One projection of the rows of both experts: [T, o]. The first `understanding` rows are
    multiplied with the first weight and get the first bias, the others the second.

    A weight or bias that needs no gradient gets none, and no work is done for it. Raises ValueError
    for an unknown backend and for inputs that do not fit together."""
    first, second = weights_oi
    if first.shape != second.shape or x_Ti.ndim != 2 or x_Ti.shape[1:] != first.shape[1:]:
        raise ValueError(
            "Two weights of one shape [o, i] and rows [T, i] are needed; got weights "
            f"{list(first.shape)} and {list(second.shape)}, and rows {list(x_Ti.shape)}."
        )
    if (biases_o[0] is None) != (biases_o[1] is None):
        raise ValueError("Both experts have a bias, or neither has.")
    if not 0 <= understanding <= len(x_Ti):
        raise ValueError(
            f"The rows of the first expert are 0 to {len(x_Ti)} in number; got {understanding}."
        )
    module = implementation("experts", backend)
    out: torch.Tensor = module.expert_product(x_Ti, understanding, weights_oi, biases_o)
    return out
