"""Public functions RMSNorm and SwiGLU: check their arguments and call the backend."""

import torch

from uno_ds.kernels.backends import implementation


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "reference"
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., H]; statistics in fp32
    at least.

    Raises ValueError for an unknown backend and for inputs that it cannot compute with.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"The weight of RMSNorm must be [{x.shape[-1]}] for rows of x {list(x.shape)}; got "
            f"{list(weight.shape)}."
        )
    return implementation("pointwise", backend).rms_norm(x, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str = "reference") -> torch.Tensor:
    """silu(gate) * up of two tensors of one shape and dtype; the liger backend may overwrite them
    in backward.

    Raises ValueError for an unknown backend and for inputs that it cannot compute with.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype; got {list(gate.shape)} {gate.dtype} and "
            f"{list(up.shape)} {up.dtype}."
        )
    return implementation("pointwise", backend).swiglu(gate, up)
