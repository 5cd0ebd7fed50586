"""RMSNorm and SwiGLU by liger-kernel, one Triton kernel each way, on CUDA."""

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Same as the reference, which casts before it multiplies with the weight: liger's "llama"
    mode. Never in place: the gradient that comes in is read by the residual stream too."""
    _check_device(x)
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False) if len(x) else x * weight


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Same as the reference. Its backward writes into `gate` and `up`, which nothing else may
    read."""
    _check_device(gate)
    return LigerSiLUMulFunction.apply(gate, up) if len(gate) else gate * up


def _check_device(x: torch.Tensor) -> None:
    if not x.is_cuda:
        raise ValueError(
            "The liger backend of RMSNorm and SwiGLU needs a CUDA device; got tensors on "
            f"{x.device}."
        )
