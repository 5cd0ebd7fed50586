"""The backends of every kernel: which module computes each, and what it needs to run.

The one place to add a backend: a row of KERNELS loads a module that defines the kernel's function.
Everything else (settings, `auto`, dispatch, messages, benchmarks) reads this table, and a name
that is not in it raises. A recipe's choice is resolved once at start-up and never switched later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from uno_ds.kernels.requirements import (
    needs_cuda,
    needs_flash,
    needs_grouped_mm,
    needs_launch_table,
    needs_liger,
    needs_liger_on_cuda,
    needs_megablocks,
)

if TYPE_CHECKING:
    from uno_ds.kernels.plan import AttentionPlan


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
    `head_dims`: the values per head that it can compute; None: any. `precisions`: of the tensors
    that it can compute ("fp32", "bf16"); None: any. `row_bytes`: of which the rows of its matrices
    have to be multiples. `memory`: of attention backends only; the cost model refuses an attention
    backend without it. `copies_weights`: of both experts for every product, which the cost model
    counts; such a backend needs the weights themselves."""

    load: Callable[[], ModuleType]
    unavailable_reason: Callable[[], str | None] = lambda: None
    head_dims: Sequence[int] | None = None
    precisions: tuple[str, ...] | None = None
    row_bytes: int = 1
    memory: AttentionMemory | None = None
    copies_weights: bool = False


@dataclass(frozen=True)
class Kernel:
    """`auto`: default backend on any machine. `on_gpu`: on a CUDA device the first of these that
    can run is the default, where nothing was measured. `candidates`: those that a check on the
    device compares and times, the quickest to compile first. `chosen_by_check`: whether `auto` is
    then the fastest right one. `reference`: the specification of the others."""

    backends: dict[str, Backend]
    auto: str
    on_gpu: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    chosen_by_check: bool = True
    reference: str = "reference"


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


def _conditioning_attention_triton_ahead() -> ModuleType:
    from uno_ds.kernels.conditioning_attention import triton_ahead

    return triton_ahead


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


def _expert_products_separate() -> ModuleType:
    from uno_ds.kernels.expert_products import separate

    return separate


def _expert_products_grouped() -> ModuleType:
    from uno_ds.kernels.expert_products import grouped

    return grouped


def _expert_products_megablocks() -> ModuleType:
    from uno_ds.kernels.expert_products import megablocks

    return megablocks


# Values per head that the triton attention computes, and those that it pads with zeros: the 72 of
# SigLIP so400m fit no tile.
HEAD_DIMS = (16, 32, 64, 128)
PADDED_HEAD_DIMS = {72: 128}
# Of flash-attn 2, 3 and 4 and torch's varlen attention, and of FlexAttention, whose products take
# no fewer. The second has no known upper end.
FLASH_HEAD_DIMS = range(8, 257, 8)
FLEX_HEAD_DIMS = range(16, 2**16 + 1)
# Values per head that the triton QK-norm computes.
NORM_ROPE_HEAD_DIMS = (4, 8, 16, 32, 64, 128, 256)

# Our own kernels pass their tests under the interpreter and compile for Hopper, but none has run on
# a GPU: `auto` chooses them only where a check on the device found them right and fastest.
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
                needs_cuda("FlexAttention has no backward on a CPU"),
                head_dims=FLEX_HEAD_DIMS,
                memory=AttentionMemory(),
            ),
            "flash": Backend(
                _conditioning_attention_flash,
                needs_flash,
                head_dims=FLASH_HEAD_DIMS,
                precisions=("bf16",),
                memory=AttentionMemory(),
            ),
            "triton": Backend(
                _conditioning_attention_triton,
                needs_launch_table("conditioning_attention"),
                head_dims=tuple(sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))),
                memory=AttentionMemory(),
            ),
            "triton_ahead": Backend(
                _conditioning_attention_triton_ahead,
                needs_launch_table("conditioning_attention"),
                head_dims=tuple(sorted((*HEAD_DIMS, *PADDED_HEAD_DIMS))),
                precisions=("bf16",),
                memory=AttentionMemory(),
            ),
        },
        auto="sdpa",
        on_gpu=("flash", "flex", "sdpa"),
        candidates=("flash", "sdpa", "triton", "triton_ahead", "flex"),
    ),
    "regression": Kernel(
        backends={
            "reference": Backend(_metaquery_regression_reference),
            "triton": Backend(
                _metaquery_regression_triton, needs_launch_table("metaquery_regression")
            ),
        },
        auto="reference",
        on_gpu=("reference",),
        candidates=("reference", "triton"),
    ),
    "norm_rope": Kernel(
        backends={
            "reference": Backend(_qk_norm_rope_reference),
            "triton": Backend(
                _qk_norm_rope_triton,
                needs_launch_table("qk_norm_rope"),
                head_dims=NORM_ROPE_HEAD_DIMS,
            ),
        },
        auto="reference",
        on_gpu=("reference",),
        candidates=("reference", "triton"),
    ),
    "cross_entropy": Kernel(
        backends={
            "reference": Backend(_cross_entropy_reference),
            "chunked": Backend(_cross_entropy_chunked),
            "liger": Backend(_cross_entropy_liger, needs_liger),
        },
        auto="chunked",
        on_gpu=("liger", "chunked"),
        candidates=("chunked", "liger"),
    ),
    "pointwise": Kernel(
        backends={
            "reference": Backend(_pointwise_reference),
            "liger": Backend(_pointwise_liger, needs_liger_on_cuda),
        },
        auto="reference",
        on_gpu=("liger", "reference"),
        candidates=("reference", "liger"),
    ),
    # Timed by a check and not chosen by it: with two experts plain products are expected to be
    # faster, and under ZeRO-3 a layer's time depends on more than its products.
    "experts": Kernel(
        backends={
            "separate": Backend(_expert_products_separate),
            "grouped": Backend(
                _expert_products_grouped,
                needs_grouped_mm,
                precisions=("bf16", "fp32"),
                row_bytes=16,
                copies_weights=True,
            ),
            "megablocks": Backend(
                _expert_products_megablocks,
                needs_megablocks,
                precisions=("bf16",),
                row_bytes=16,
                copies_weights=True,
            ),
        },
        auto="separate",
        on_gpu=("separate",),
        candidates=("separate", "grouped", "megablocks"),
        chosen_by_check=False,
        reference="separate",
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


def description(kernel: str, name: str) -> str:
    """The backend's name for a log, with the library that it calls where it may be one of
    several."""
    describe = getattr(implementation(kernel, name), "describe", None)
    return f"{name} ({describe()})" if describe is not None else name


def prepare_plan(attention: str, plan: "AttentionPlan", on_gpu: bool) -> None:
    """Derives from a plan on the host what the attention backend reads, where it reads more than
    the plan itself. `on_gpu`: the device that will compute it is one."""
    prepare = getattr(implementation("attention", attention), "prepare", None)
    if prepare is not None:
        prepare(plan, on_gpu)


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
