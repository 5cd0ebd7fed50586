"""Public function of the cross entropy of a linear head: checks its arguments and calls the
backend."""

import torch

from uno_ds.kernels.backends import implementation


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, backend: str = "chunked"
) -> torch.Tensor:
    """[Y]: cross entropy in nats, in fp32 at least, of softmax(hidden @ weight.T) at labels [Y] in
    0 .. V - 1.

    hidden [Y, H] and weight [V, H] of one dtype. With a weight that does not train only the
    gradient of `hidden` is computed. Raises ValueError for shapes and dtypes that do not fit, an
    unknown backend, and inputs that the backend cannot compute."""
    module = implementation("cross_entropy", backend)
    if not (
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and labels.shape == hidden.shape[:1]
    ):
        raise ValueError(
            f"hidden [Y, H], weight [V, H] and labels [Y] do not fit: got {list(hidden.shape)}, "
            f"{list(weight.shape)}, {list(labels.shape)}."
        )
    if hidden.dtype != weight.dtype or labels.dtype != torch.int64:
        raise ValueError(
            f"hidden and weight must have one dtype and labels int64; got {hidden.dtype}, "
            f"{weight.dtype}, {labels.dtype}."
        )
    return module.linear_cross_entropy(hidden, weight, labels)
