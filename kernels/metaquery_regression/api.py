"""Public function of the metaquery regression loss: checks its arguments and calls the backend."""

import torch

from uno_ds.kernels.backends import implementation
from uno_ds.kernels.metaquery_regression.kinds import kind_of


def metaquery_regression(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    target: torch.Tensor,
    kind: str = "cosine",
    backend: str = "reference",
) -> torch.Tensor:
    """Loss [M] of each row, fp32 (fp64 for fp64 input), of hidden [M, H], weight [W, H] (None:
    identity), target [M, W].

    The target is a constant: it gets no gradient. The caller normalises by the count. Raises
    ValueError for shapes and dtypes that do not fit, an unknown kind or backend, and inputs that
    the backend cannot compute with."""
    module = implementation("regression", backend)
    distance = kind_of(kind)
    if not _fit(hidden, weight, target):
        weight_shape = None if weight is None else list(weight.shape)
        shapes = [list(hidden.shape), weight_shape, list(target.shape)]
        raise ValueError(
            f"hidden [M, H], weight [W, H] and target [M, W] do not fit: got {shapes}."
        )
    if weight is not None and weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype; got {hidden.dtype} and {weight.dtype}."
        )
    return module.metaquery_regression(hidden, weight, target.detach(), distance)


def _fit(hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor) -> bool:
    if hidden.dim() != 2 or target.dim() != 2 or len(hidden) != len(target):
        return False
    if weight is None:
        return hidden.shape[1] == target.shape[1]
    return tuple(weight.shape) == (target.shape[1], hidden.shape[1])
