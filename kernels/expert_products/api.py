"""Public function expert_product: checks its arguments and calls the backend.

Shape suffixes: docs/notation.md; I, O are the values of a row before and after the projection."""

import torch

from uno_ds.kernels.backends import KERNELS, implementation

Pair = tuple[torch.Tensor, torch.Tensor]
OptionalPair = tuple[torch.Tensor | None, torch.Tensor | None]


def expert_product(
    x_TI: torch.Tensor,
    understanding: int,
    weights_OI: Pair,
    biases_O: OptionalPair = (None, None),
    backend: str = KERNELS["experts"].reference,
) -> torch.Tensor:
    """One projection of the rows of both experts: [T, O]. The first `understanding` rows are
    multiplied with the first weight and get the first bias, the others the second.

    A weight or bias that needs no gradient gets none, and no work is done for it. Raises ValueError
    for an unknown backend and for inputs that do not fit together."""
    first, second = weights_OI
    if first.shape != second.shape or x_TI.ndim != 2 or x_TI.shape[1:] != first.shape[1:]:
        raise ValueError(
            "Two weights of one shape [O, I] and rows [T, I] are needed; got weights "
            f"{list(first.shape)} and {list(second.shape)}, and rows {list(x_TI.shape)}."
        )
    if (biases_O[0] is None) != (biases_O[1] is None):
        raise ValueError("Both experts have a bias, or neither has.")
    if not 0 <= understanding <= len(x_TI):
        raise ValueError(
            f"The rows of the first expert are 0 to {len(x_TI)} in number; got {understanding}."
        )
    module = implementation("experts", backend)
    out: torch.Tensor = module.expert_product(x_TI, understanding, weights_OI, biases_O)
    return out
