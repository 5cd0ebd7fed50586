"""The recipe's choice of backends, and what `auto` means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from uno_ds.kernels.backends import KERNELS, backend_names, backend_of, unavailable_reason
from uno_ds.settings import SettingsError, setting

VALUE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Demands:
    """What a model asks of its kernels: "fp32" or "bf16"; the values of a head of the language
    model, None where they are not known, and those of encoders, which have attention only; whether
    it runs on the CPU of a machine with a GPU; the values of a row before and after the experts'
    projections."""

    precision: str
    head_dim: int | None = None
    encoder_head_dims: tuple[int, ...] = ()
    on_cpu: bool = False
    widths: tuple[int, ...] = ()

    def head_dims(self, kernel: str) -> tuple[int, ...]:
        """The values per head that a kernel has to compute; those without heads: none."""
        own = () if self.head_dim is None else (self.head_dim,)
        if kernel == "norm_rope":
            return own
        return (*own, *self.encoder_head_dims) if kernel == "attention" else ()

    def row_multiple(self, row_bytes: int) -> int:
        """`row_bytes` in values."""
        return max(1, row_bytes // VALUE_BYTES[self.precision])

    def misaligned(self, kernel: str, row_bytes: int) -> int | None:
        """A width of the experts' projections that is no multiple of so many bytes, if there is
        one; other kernels have none."""
        multiple = self.row_multiple(row_bytes)
        widths = self.widths if kernel == "experts" else ()
        return next((width for width in widths if width % multiple), None)


def unsuitable_reason(kernel: str, name: str, demands: Demands) -> str | None:
    """Why a backend cannot compute this model on this machine, or None."""
    if reason := unavailable_reason(kernel, name):
        return reason
    backend = backend_of(kernel, name)
    if backend.precisions is not None and demands.precision not in backend.precisions:
        return f"it computes in {' or '.join(backend.precisions)}, not in {demands.precision}"
    allowed = backend.head_dims
    wrong = [dim for dim in demands.head_dims(kernel) if allowed and dim not in allowed]
    if allowed and wrong:
        return f"it takes heads of {_listed(allowed)} values, not of {wrong[0]}"
    width = demands.misaligned(kernel, backend.row_bytes)
    if width is not None:
        multiple = demands.row_multiple(backend.row_bytes)
        return f"it takes rows of a multiple of {multiple} values, not of {width}"
    return None


def _listed(numbers: Sequence[int]) -> str:
    if not isinstance(numbers, range):
        return ", ".join(map(str, numbers))
    steps = "" if numbers.step == 1 else f" in steps of {numbers.step}"
    return f"{numbers[0]} to {numbers[-1]}{steps}"


@dataclass(frozen=True)
class KernelSettings:
    attention: str = setting(
        "auto",
        choices=("auto", *backend_names("attention")),
        doc="Backend of the segment-masked attention. reference: dense mask; sdpa: torch's "
        "scaled_dot_product_attention, one padded row per sample; flex: FlexAttention; flash: "
        "flash-attn, or torch's varlen attention; triton: kernels of this package; triton_ahead: "
        "those with another order of work in forward; auto: on a CPU "
        "sdpa, on a GPU the fastest that computes rightly there (self_check), or without a check "
        "the first that can run of flash, flex, sdpa.",
    )
    regression: str = setting(
        "auto",
        choices=("auto", *backend_names("regression")),
        doc="Backend of the metaquery regression loss. auto: reference, and triton on a GPU "
        "whose self-check found it right and faster.",
    )
    norm_rope: str = setting(
        "auto",
        choices=("auto", *backend_names("norm_rope")),
        doc="Backend of QK-norm and rotary embedding. auto: reference, and triton on a GPU "
        "whose self-check found it right and faster.",
    )
    cross_entropy: str = setting(
        "auto",
        choices=("auto", *backend_names("cross_entropy")),
        doc="Backend of the language head with its cross entropy. reference: all logits at once; "
        "chunked: some rows at a time; liger: likewise, with liger-kernel within them; auto: liger "
        "on a GPU that has it, else chunked.",
    )
    pointwise: str = setting(
        "auto",
        choices=("auto", *backend_names("pointwise")),
        doc="Backend of RMSNorm and SwiGLU. auto: liger on a GPU that has it, else reference.",
    )
    experts: str = setting(
        "auto",
        choices=("auto", *backend_names("experts")),
        doc="Backend of the projections of both experts. separate: a product for each; grouped: "
        "torch's grouped_mm, one product for both, which copies their weights; megablocks: "
        "likewise by its grouped GEMM; auto: separate, since no other one was measured yet.",
    )

    self_check: bool = setting(
        True,
        doc="At the first start on a GPU `auto` compares every backend with fp64 and times the "
        "right ones, at most 30 s; false: a fixed order.",
    )
    cache: str | None = setting(
        "~/.cache/uno_ds",
        doc="Folder in which the results of the self-check are kept for later starts; null: none.",
    )

    @property
    def backends(self) -> dict[str, str]:
        """The name given for each kernel."""
        return {kernel: getattr(self, kernel) for kernel in KERNELS}

    def resolved(self, demands: Demands | None = None) -> "KernelSettings":
        """The same settings with every `auto` replaced by the backend that runs on this machine, by
        the fixed order. `demands`: of the model, None where they are not known.

        Raises SettingsError if a backend is given that cannot run."""
        return self.with_backends(
            {kernel: _resolved(kernel, name, demands) for kernel, name in self.backends.items()}
        )

    def with_backends(self, names: dict[str, str]) -> "KernelSettings":
        """The same settings with other backends."""
        changes: dict[str, Any] = dict(names)
        return replace(self, **changes)

    def check(self, demands: Demands) -> None:
        """Raises SettingsError if a backend that is given cannot compute such a model."""
        for kernel, name in self.backends.items():
            if name != "auto":
                self._check_heads(kernel, name, demands)
                self._check_precision(kernel, name, demands)
                self._check_widths(kernel, name, demands)

    def _check_heads(self, kernel: str, name: str, demands: Demands) -> None:
        allowed = backend_of(kernel, name).head_dims
        if allowed is None:
            return
        for head_dim in demands.head_dims(kernel):
            if head_dim not in allowed:
                raise SettingsError(
                    f"kernels.{kernel}",
                    f"'{name}' takes heads of {_listed(allowed)} values, but the model "
                    f"has heads of {head_dim}; set it to {KERNELS[kernel].auto}.",
                )

    def _check_precision(self, kernel: str, name: str, demands: Demands) -> None:
        allowed = backend_of(kernel, name).precisions
        if allowed is not None and demands.precision not in allowed:
            raise SettingsError(
                f"kernels.{kernel}",
                f"'{name}' computes in {' or '.join(allowed)}, but the model is in "
                f"{demands.precision}; set it to {KERNELS[kernel].auto}, or engine.precision to "
                f"{allowed[0]}.",
            )

    def _check_widths(self, kernel: str, name: str, demands: Demands) -> None:
        row_bytes = backend_of(kernel, name).row_bytes
        width = demands.misaligned(kernel, row_bytes)
        if width is not None:
            raise SettingsError(
                f"kernels.{kernel}",
                f"'{name}' takes rows of a multiple of {demands.row_multiple(row_bytes)} values in "
                f"{demands.precision}, but a projection of the model has {width}; set it to "
                f"{KERNELS[kernel].auto}.",
            )


def _resolved(kernel: str, given: str, demands: Demands | None = None) -> str:
    """The backend that runs on this machine; raises SettingsError if `given` cannot."""
    if given != "auto":
        if reason := unavailable_reason(kernel, given):
            raise SettingsError(f"kernels.{kernel}", f"'{given}' cannot run here: {reason}.")
        return given
    choice = KERNELS[kernel]
    on_cpu = not torch.cuda.is_available() or (demands is not None and demands.on_cpu)
    for name in () if on_cpu else choice.on_gpu:
        reason = (
            unavailable_reason(kernel, name)
            if demands is None
            else unsuitable_reason(kernel, name, demands)
        )
        if reason is None:
            return name
    return choice.auto
