"""Public functions of the metaquery regression losses: they check their arguments and call the
backend."""

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


def metaquery_contrast(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    candidates: torch.Tensor,
    first: int,
    temperature: float,
    backend: str = "reference",
) -> torch.Tensor:
    """Contrastive loss [M] of each row, fp32 (fp64 for fp64 input), of hidden [M, H], weight [W, H]
    (None: identity) and candidates [O, W]: row i is to be nearest to candidate `first` + i among
    all.

    Candidates are constants: they get no gradient. The caller normalises by the count. Raises
    ValueError for shapes and dtypes that do not fit, a temperature that is not above 0, an unknown
    backend, and inputs that the backend cannot compute with."""
    module = implementation("regression", backend)
    shapes = [list(hidden.shape), None if weight is None else list(weight.shape)]
    shapes.append(list(candidates.shape))
    if hidden.dim() != 2 or candidates.dim() != 2 or not _widths_fit(hidden, weight, candidates):
        raise ValueError(
            f"hidden [M, H], weight [W, H] and candidates [O, W] do not fit: got {shapes}."
        )
    if not 0 <= first <= len(candidates) - len(hidden):
        raise ValueError(
            f"The rows' own candidates are {first} to {first + len(hidden) - 1}, but there are "
            f"{len(candidates)}."
        )
    if not temperature > 0:
        raise ValueError(f"The temperature must be above 0, got {temperature}.")
    if weight is not None and weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype; got {hidden.dtype} and {weight.dtype}."
        )
    loss: torch.Tensor = module.metaquery_contrast(
        hidden, weight, candidates.detach(), first, temperature
    )
    return loss


def _widths_fit(hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor) -> bool:
    if weight is None:
        return hidden.shape[1] == target.shape[1]
    return tuple(weight.shape) == (target.shape[1], hidden.shape[1])


def _fit(hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor) -> bool:
    if hidden.dim() != 2 or target.dim() != 2 or len(hidden) != len(target):
        return False
    return _widths_fit(hidden, weight, target)
