"""The one entrance to the metaquery regression loss."""

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
    """Per-row loss [N], fp32 (fp64 for fp64 input), of hidden [N, H], weight [D, H] (None:
    identity), target [N, D].

    The target is a constant: it gets no gradient. The caller normalises by the count. Raises
    ValueError for shapes and dtypes that do not fit, an unknown kind or backend, and inputs that
    the backend cannot compute with."""
    module, distance = implementation("regression", backend), kind_of(kind)
    fits = hidden.dim() == target.dim() == 2 and len(hidden) == len(target)
    fits = fits and (
        hidden.shape[1] == target.shape[1]
        if weight is None
        else tuple(weight.shape) == (target.shape[1], hidden.shape[1])
    )
    if not fits:
        shapes = [
            list(hidden.shape),
            None if weight is None else list(weight.shape),
            list(target.shape),
        ]
        raise ValueError(
            f"hidden [N, H], weight [D, H] and target [N, D] do not fit: got {shapes}."
        )
    if weight is not None and weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype; got {hidden.dtype} and {weight.dtype}."
        )
    return module.metaquery_regression(hidden, weight, target.detach(), distance)
