"""Which backend runs a kernel: resolved once at start-up, never switched silently."""
import importlib.util
import os
from dataclasses import dataclass

import torch

from uno_ds.settings import SettingsError, setting

ATTENTION_BACKENDS = ("reference", "sdpa", "flex", "flash", "triton")
REGRESSION_BACKENDS = ("reference", "triton")
NORM_ROPE_BACKENDS = ("reference", "triton")
CROSS_ENTROPY_BACKENDS = ("reference", "chunked", "liger")
POINTWISE_BACKENDS = ("reference", "liger")
# Values per head that the triton attention computes, and those that it pads with zeros: the 72 of SigLIP so400m fit no tile.
HEAD_DIMS = (16, 32, 64, 128)
PADDED_HEAD_DIMS = {72: 128}


@dataclass(frozen=True)
class KernelSettings:
    attention: str = setting("auto", choices=("auto", *ATTENTION_BACKENDS),
                             doc="Backend of the segment-masked attention. reference: dense mask; sdpa: torch's "
                                 "scaled_dot_product_attention, one padded row per sample; flex: FlexAttention; flash: flash-attn, or torch's "
                                 "varlen attention; triton: kernels of this package; auto: triton on a GPU, else sdpa.")
    regression: str = setting("auto", choices=("auto", *REGRESSION_BACKENDS),
                              doc="Backend of the metaquery regression loss. auto: reference.")

    def resolved(self) -> "KernelSettings":
        """The same settings with every `auto` replaced by the backend that will run on this machine.

        Raises SettingsError if a backend was asked for that cannot."""
        attention = self.attention
        if attention == "auto":
            attention = "triton" if torch.cuda.is_available() and hindrance("triton") is None else "sdpa"
        reason = hindrance(attention)
        if reason is not None:
            raise SettingsError("kernels.attention", f"'{attention}' cannot run here: {reason}.")
        return KernelSettings(attention=attention, regression="reference" if self.regression == "auto" else self.regression)

    def check_heads(self, *dims: int) -> None:
        """Raises SettingsError if a backend that is resolved cannot compute heads of so many values."""
        allowed = sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))
        for dim in dims:
            if self.attention == "triton" and dim not in allowed:
                raise SettingsError("kernels.attention", f"'triton' takes heads of {', '.join(map(str, allowed))} values, but the model has heads of {dim}; "
                                                         "set it to sdpa.")


def hindrance(backend: str) -> str | None:
    """Why this machine cannot train with an attention backend, or None."""
    if backend in ("reference", "sdpa"):
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"
    if torch.cuda.is_available():
        return None
    return "FlexAttention has no backward on a CPU" if backend == "flex" else "flash attention needs a CUDA device"
