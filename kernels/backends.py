"""The backends of every kernel: which module computes each, and what it needs to run.

The one place to add a backend: a row of KERNELS loads a module that defines the kernel's function.
Everything else (settings, `auto`, dispatch, messages, benchmarks) reads this table, and a name
that is not in it raises. A recipe's choice is resolved once at start-up and never switched later.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from uno_ds.settings import SettingsError, setting


@dataclass(frozen=True)
class AttentionMemory:
    """What autograd keeps of one call of an attention backend in addition to q, k, v and the
    output; the cost model counts it.

    `expands_keys`: a key and a value for each query head instead of each key head, and copies of
    the context's keys and values. `keeps_masks`: a padded mask for each sample. `keeps_scores`: the
    dense mask over the pack and two score matrices for each query head."""

    expands_keys: bool = False
    keeps_masks: bool = False
    keeps_scores: bool = False


@dataclass(frozen=True)
class Backend:
    """`load` imports the module that computes it, when it is first used: not every machine has what
    every backend needs. `unavailable_reason`: why this machine cannot train with it, or None.
    `head_dims`: the values per head that it can compute; None: any. `memory`: of attention backends
    only; the cost model refuses an attention backend without it."""

    load: Callable[[], ModuleType]
    unavailable_reason: Callable[[], str | None] = lambda: None
    head_dims: tuple[int, ...] | None = None
    memory: AttentionMemory | None = None


@dataclass(frozen=True)
class Kernel:
    """`auto`: default backend on any machine; `auto_on_gpu`: default on a CUDA device where it can
    run."""

    backends: dict[str, Backend]
    auto: str
    auto_on_gpu: str


def _needs_cuda(why: str) -> Callable[[], str | None]:
    return lambda: None if torch.cuda.is_available() else why


def _needs_triton() -> str | None:
    if missing := _missing_package("triton"):
        return missing
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"


def _needs_liger() -> str | None:
    return _missing_package("liger_kernel") or _needs_triton()


def _needs_liger_on_cuda() -> str | None:
    if reason := _needs_liger():
        return reason
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def _missing_package(package: str) -> str | None:
    if importlib.util.find_spec(package) is not None:
        return None
    name = package.replace("_", "-")
    return f"the package {name} is not installed, which the extra uno_ds[cuda] brings"


# Each import is a function of its own because torch.compile can trace import statements.
def _conditioning_attention_reference() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import reference

    return reference


def _conditioning_attention_sdpa() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import sdpa

    return sdpa


def _conditioning_attention_flex() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import flex

    return flex


def _conditioning_attention_flash() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import flash

    return flash


def _conditioning_attention_triton() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import triton_operator

    return triton_operator


def _metaquery_regression_reference() -> ModuleType:
    from uno_ds.kernels.metaquery_regression import reference

    return reference


def _metaquery_regression_triton() -> ModuleType:
    from uno_ds.kernels.metaquery_regression import triton_operator

    return triton_operator


def _qk_norm_rope_reference() -> ModuleType:
    from uno_ds.kernels.qk_norm_rope import reference

    return reference


def _qk_norm_rope_triton() -> ModuleType:
    from uno_ds.kernels.qk_norm_rope import triton_operator

    return triton_operator


def _cross_entropy_reference() -> ModuleType:
    from uno_ds.kernels.cross_entropy import reference

    return reference


def _cross_entropy_chunked() -> ModuleType:
    from uno_ds.kernels.cross_entropy import chunked

    return chunked


def _cross_entropy_liger() -> ModuleType:
    from uno_ds.kernels.cross_entropy import liger

    return liger


def _pointwise_reference() -> ModuleType:
    from uno_ds.kernels.pointwise import reference

    return reference


def _pointwise_liger() -> ModuleType:
    from uno_ds.kernels.pointwise import liger

    return liger


# Values per head that the triton attention computes, and those that it pads with zeros: the 72 of
# SigLIP so400m fit no tile.
HEAD_DIMS = (16, 32, 64, 128)
PADDED_HEAD_DIMS = {72: 128}
# Values per head that the triton QK-norm computes.
NORM_ROPE_HEAD_DIMS = (4, 8, 16, 32, 64, 128, 256)

# Our own kernels pass their tests under the interpreter and compile for Hopper, but none has run on
# a GPU: until its GPU tests have passed on one, `auto` does not choose it.
KERNELS = {
    "attention": Kernel(
        backends={
            "reference": Backend(
                _conditioning_attention_reference,
                memory=AttentionMemory(expands_keys=True, keeps_scores=True),
            ),
            "sdpa": Backend(
                _conditioning_attention_sdpa,
                memory=AttentionMemory(expands_keys=True, keeps_masks=True),
            ),
            "flex": Backend(
                _conditioning_attention_flex,
                _needs_cuda("FlexAttention has no backward on a CPU"),
                memory=AttentionMemory(),
            ),
            "flash": Backend(
                _conditioning_attention_flash,
                _needs_cuda("flash attention needs a CUDA device"),
                memory=AttentionMemory(),
            ),
            "triton": Backend(
                _conditioning_attention_triton,
                _needs_triton,
                head_dims=tuple(sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))),
                memory=AttentionMemory(),
            ),
        },
        auto="sdpa",
        auto_on_gpu="sdpa",
    ),
    "regression": Kernel(
        backends={
            "reference": Backend(_metaquery_regression_reference),
            "triton": Backend(_metaquery_regression_triton, _needs_triton),
        },
        auto="reference",
        auto_on_gpu="reference",
    ),
    "norm_rope": Kernel(
        backends={
            "reference": Backend(_qk_norm_rope_reference),
            "triton": Backend(_qk_norm_rope_triton, _needs_triton, head_dims=NORM_ROPE_HEAD_DIMS),
        },
        auto="reference",
        auto_on_gpu="reference",
    ),
    "cross_entropy": Kernel(
        backends={
            "reference": Backend(_cross_entropy_reference),
            "chunked": Backend(_cross_entropy_chunked),
            "liger": Backend(_cross_entropy_liger, _needs_liger),
        },
        auto="chunked",
        auto_on_gpu="liger",
    ),
    "pointwise": Kernel(
        backends={
            "reference": Backend(_pointwise_reference),
            "liger": Backend(_pointwise_liger, _needs_liger_on_cuda),
        },
        auto="reference",
        auto_on_gpu="liger",
    ),
}


def backend_names(kernel: str) -> tuple[str, ...]:
    return tuple(KERNELS[kernel].backends)


def backend_of(kernel: str, name: str) -> Backend:
    """Raises ValueError for a name that the kernel has no backend of."""
    backends = KERNELS[kernel].backends
    if name not in backends:
        raise ValueError(f"Unknown {kernel} backend '{name}'; allowed are {', '.join(backends)}.")
    return backends[name]


def implementation(kernel: str, name: str) -> ModuleType:
    """The module that computes a kernel. Raises ValueError for an unknown name."""
    return backend_of(kernel, name).load()


def attention_memory(name: str) -> AttentionMemory:
    """Raises ValueError for an unknown backend and for one that does not state it."""
    memory = backend_of("attention", name).memory
    if memory is None:
        raise ValueError(
            f"The attention backend '{name}' does not state what autograd keeps of it, which the "
            "memory estimate needs: give its row in kernels/backends.py an AttentionMemory."
        )
    return memory


def unavailable_reason(kernel: str, name: str) -> str | None:
    """Why this machine cannot train with a backend of a kernel, or None."""
    return backend_of(kernel, name).unavailable_reason()


@dataclass(frozen=True)
class KernelSettings:
    attention: str = setting(
        "auto",
        choices=("auto", *backend_names("attention")),
        doc="Backend of the segment-masked attention. reference: dense mask; sdpa: torch's "
        "scaled_dot_product_attention, one padded row per sample; flex: FlexAttention; flash: "
        "flash-attn, or torch's varlen attention; triton: kernels of this package; auto: sdpa, as "
        "long as no GPU has run the others.",
    )
    regression: str = setting(
        "auto",
        choices=("auto", *backend_names("regression")),
        doc="Backend of the metaquery regression loss. auto: reference, as long as no GPU has run "
        "triton.",
    )
    norm_rope: str = setting(
        "auto",
        choices=("auto", *backend_names("norm_rope")),
        doc="Backend of QK-norm and rotary embedding. auto: reference, as long as no GPU has run "
        "triton.",
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

    def resolved(self) -> "KernelSettings":
        """The same settings with every `auto` replaced by the backend that will run on this
        machine.

        Raises SettingsError if a backend is given that cannot run."""
        chosen = {name: _resolved(name, given) for name, given in vars(self).items()}
        return KernelSettings(**chosen)

    def check_heads(self, head_dim: int, *others: int) -> None:
        """Raises SettingsError if a resolved backend cannot compute heads of so many values.
        `head_dim` is the language model's; `others` are of encoders, which have attention only."""
        self._check_heads("norm_rope", [head_dim])
        self._check_heads("attention", [head_dim, *others])

    def _check_heads(self, kernel: str, head_dims: list[int]) -> None:
        name = getattr(self, kernel)
        allowed = backend_of(kernel, name).head_dims
        if allowed is None:
            return
        for head_dim in head_dims:
            if head_dim not in allowed:
                raise SettingsError(
                    f"kernels.{kernel}",
                    f"'{name}' takes heads of {', '.join(map(str, allowed))} values, but the model "
                    f"has heads of {head_dim}; set it to {KERNELS[kernel].auto}.",
                )


def _resolved(kernel: str, given: str) -> str:
    """The backend that runs on this machine; raises SettingsError if `given` cannot."""
    choice = KERNELS[kernel]
    if given == "auto":
        on_gpu = torch.cuda.is_available() and not unavailable_reason(kernel, choice.auto_on_gpu)
        return choice.auto_on_gpu if on_gpu else choice.auto
    if reason := unavailable_reason(kernel, given):
        raise SettingsError(f"kernels.{kernel}", f"'{given}' cannot run here: {reason}.")
    return given
