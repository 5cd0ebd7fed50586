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
# Values per head that the triton QK-norm computes.
NORM_ROPE_HEAD_DIMS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class KernelSettings:
    attention: str = setting(
        "auto",
        choices=("auto", *ATTENTION_BACKENDS),
        doc="Backend of the segment-masked attention. reference: dense mask; sdpa: torch's "
        "scaled_dot_product_attention, one padded row per sample; flex: FlexAttention; flash: flash-attn, or torch's "
        "varlen attention; triton: kernels of this package; auto: sdpa, as long as no GPU has run the others.",
    )
    regression: str = setting(
        "auto",
        choices=("auto", *REGRESSION_BACKENDS),
        doc="Backend of the metaquery regression loss. auto: reference, as long as no GPU has run triton.",
    )
    norm_rope: str = setting(
        "auto",
        choices=("auto", *NORM_ROPE_BACKENDS),
        doc="Backend of QK-norm and rotary embedding. auto: reference, as long as no GPU has run triton.",
    )
    cross_entropy: str = setting(
        "auto",
        choices=("auto", *CROSS_ENTROPY_BACKENDS),
        doc="Backend of the language head with its cross entropy. reference: all logits at once; chunked: some rows at a "
        "time; liger: likewise, with liger-kernel within them; auto: liger on a GPU that has it, else chunked.",
    )
    pointwise: str = setting(
        "auto",
        choices=("auto", *POINTWISE_BACKENDS),
        doc="Backend of RMSNorm and SwiGLU. auto: liger on a GPU that has it, else reference.",
    )

    def resolved(self) -> "KernelSettings":
        """The same settings with every `auto` replaced by the backend that will run on this machine.

        Raises SettingsError if a backend was asked for that cannot."""
        chosen = {}
        for name, given in vars(self).items():
            on_gpu, elsewhere = _AUTO[name]
            usable = torch.cuda.is_available() and hindrance(on_gpu, name) is None
            chosen[name] = given if given != "auto" else on_gpu if usable else elsewhere
        for name, backend in chosen.items():
            reason = hindrance(backend, name)
            if reason is not None:
                raise SettingsError(f"kernels.{name}", f"'{backend}' cannot run here: {reason}.")
        return KernelSettings(**chosen)

    def check_heads(self, *dims: int) -> None:
        """Raises SettingsError if a backend that is resolved cannot compute heads of so many values: those of the language model, then
        others, which only attention sees."""
        if self.norm_rope == "triton" and dims[0] not in NORM_ROPE_HEAD_DIMS:
            raise SettingsError(
                "kernels.norm_rope",
                f"'triton' takes heads of {', '.join(map(str, NORM_ROPE_HEAD_DIMS))} values, but the model has "
                f"heads of {dims[0]}; set it to reference.",
            )
        allowed = sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))
        for dim in dims:
            if self.attention == "triton" and dim not in allowed:
                raise SettingsError(
                    "kernels.attention",
                    f"'triton' takes heads of {', '.join(map(str, allowed))} values, but the model has heads of {dim}; "
                    "set it to sdpa.",
                )


# What `auto` means: the backend on a GPU that can run it, and that everywhere else. Our own kernels are right under the
# interpreter and compile for Hopper, but none has run on a GPU: until its GPU tests have passed on one, a run asks for them by name.
_AUTO = {
    "attention": ("sdpa", "sdpa"),
    "regression": ("reference", "reference"),
    "norm_rope": ("reference", "reference"),
    "cross_entropy": ("liger", "chunked"),
    "pointwise": ("liger", "reference"),
}


def hindrance(backend: str, kernel: str = "attention") -> str | None:
    """Why this machine cannot train with a backend of a kernel, or None."""
    if backend in ("reference", "sdpa", "chunked"):
        return None
    if backend in ("triton", "liger"):
        for package in ("triton", "liger_kernel") if backend == "liger" else ("triton",):
            if importlib.util.find_spec(package) is None:
                return f"the package {package.replace('_', '-')} is not installed, which the extra uno_ds[cuda] brings"
        if torch.cuda.is_available():
            return None
        if kernel == "pointwise":
            return "it needs a CUDA device"
        return (
            None
            if os.environ.get("TRITON_INTERPRET") == "1"
            else "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"
        )
    if torch.cuda.is_available():
        return None
    return (
        "FlexAttention has no backward on a CPU"
        if backend == "flex"
        else "flash attention needs a CUDA device"
    )
