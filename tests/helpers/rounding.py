"""How far two right evaluations of one formula may lie apart on any processor: what bounds on
differences are derived from.

Another BLAS sums in another order, with or without fused multiply-adds, and vectorises exp and erf
otherwise. Numbers are equal bit for bit only where the same operations run in the same order on the
same shapes."""

import math

import torch

# Against the fp64 value two right roundings of the same formula have errors of the same size; their
# maxima over some hundred values differ by less than this.
FACTOR = 4


def rounding(dtype: torch.dtype, *sums: int) -> float:
    """Largest difference, relative to the largest value, of a chain of sums of so many terms each:
    every term is off by up to eps, the errors of n terms add up like sqrt(n), and those of the
    links of the chain add up."""
    return FACTOR * torch.finfo(dtype).eps * sum(math.sqrt(terms) for terms in sums)


def assert_equal_up_to_rounding(
    got: torch.Tensor, wanted: torch.Tensor, *sums: int, what: str = ""
) -> None:
    """Both are fp32 or fp64 results of a chain of `sums`."""
    assert got.shape == wanted.shape, f"{what} {tuple(got.shape)}, {tuple(wanted.shape)}"
    if not got.numel():
        return
    error = (got.double() - wanted.double()).abs().max().item()
    allowed = rounding(got.dtype, *sums) * wanted.abs().max().item()
    assert error <= allowed, f"{what} differs by {error:.1e}, and rounding by {allowed:.1e}"


def assert_as_near_as(got: torch.Tensor, other: torch.Tensor, exact: torch.Tensor) -> None:
    """The error of `got` against the fp64 result is that of `other`, which is right, up to
    FACTOR."""
    error, usual = ((tensor.double() - exact).abs().max().item() for tensor in (got, other))
    assert error <= FACTOR * usual + torch.finfo(got.dtype).eps * exact.abs().max().item(), (
        f"is off by {error:.1e}, where {usual:.1e} is usual"
    )
