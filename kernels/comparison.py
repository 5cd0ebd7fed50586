"""The tolerance rule: a backend against fp64, by the error that the specification has in the same
dtype."""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Rounding of both sides, in units of the dtype's epsilon.
FLOOR = 8.0
# (dtype, backend) -> outputs and gradients
Outputs = Callable[[torch.dtype, str], list[torch.Tensor]]


class Compared(NamedTuple):
    """Largest error of one tensor, and the error allowed, as shares of its largest value."""

    name: str
    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        # NaN is not.
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"the {self.name} is off by {self.error:.1e} of its largest value, allowed are "
            f"{self.allowed:.1e}"
        )


def compare(
    names: tuple[str, ...],
    outputs: Outputs,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    reference: str = "reference",
) -> list[Compared]:
    """Of each tensor of `outputs`: allowed is `tolerance` times the error of the backend
    `reference` in `dtype`."""
    with torch.enable_grad():
        exact = outputs(torch.float64, reference)
        usual = outputs(dtype, reference)
        given = outputs(dtype, backend)
    compared = []
    for name, right, same, ours in zip(names, exact, usual, given, strict=False):
        scale = float(right.abs().max()) or 1.0
        error = float((ours.double() - right).abs().max()) / scale
        usual_error = float((same.double() - right).abs().max()) / scale
        allowed = tolerance * usual_error + FLOOR * torch.finfo(dtype).eps
        compared.append(Compared(name, error, allowed))
    return compared
