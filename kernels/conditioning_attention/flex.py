"""Segment-masked attention by FlexAttention, the baseline of the benchmarks, with a block mask
built from the plan's ranges.

Blocks of 128 x 128 are classified as full, partial or empty on the host; the mask function is
evaluated inside partial blocks only. FlexAttention computes gradients of constants like any other;
they are cleared afterwards. On a CPU it has no backward and runs uncompiled, which is enough for
tests of the mask.

Shape suffixes: docs/notation.md."""

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from uno_ds.kernels.conditioning_attention.rectangles import rectangles
from uno_ds.kernels.conditioning_attention.reference import (
    constant_keys,
    constant_queries,
    prepare_needs,
)
from uno_ds.kernels.plan import CAUSAL, FULL, UNLIMITED, AttentionPlan, Columns

BLOCK = 128
# Recompilations of one kind of call: shapes of size 0 and 1, alignments, sequence lengths.
RECOMPILE_LIMIT = 64
_KINDS: list["CallKind"] = []
# Candidates for a benchmark that tunes; None: the compiler's defaults for the architecture.
OPTIONS: tuple[dict[str, int] | None, ...] = (
    None,
    {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 128,
        "fwd_num_stages": 2,
        "fwd_num_warps": 8,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 128,
        "bwd_BLOCK_M2": 128,
        "bwd_BLOCK_N2": 64,
        "bwd_num_stages": 2,
        "bwd_num_warps": 8,
    },
    {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 64,
        "fwd_num_stages": 3,
        "fwd_num_warps": 8,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_stages": 3,
        "bwd_num_warps": 4,
    },
    {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 64,
        "fwd_num_stages": 4,
        "fwd_num_warps": 8,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 128,
        "bwd_BLOCK_M2": 128,
        "bwd_BLOCK_N2": 32,
        "bwd_num_stages": 3,
        "bwd_num_warps": 4,
    },
)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The chosen blocks of each block of queries, partial and full ones, as FlexAttention takes
    them: their number [1, 1, I], and as columns [1, 1, I, J] with the chosen ones first."""

    partial_count: torch.Tensor
    partial_columns: torch.Tensor
    full_count: torch.Tensor
    full_columns: torch.Tensor
    columns: Columns

    @classmethod
    def of(cls, plan: AttentionPlan) -> "Blocks":
        """On the host."""
        full_IJ, partial_IJ = blocks(plan)
        return cls(
            *_counts_and_columns(partial_IJ), *_counts_and_columns(full_IJ), Columns.of(plan)
        )


class CallKind(NamedTuple):
    """Calls that one compiled function computes: with gradients or without, with the number of
    heads and values, and the options."""

    with_gradients: bool
    heads: int
    key_heads: int
    dim: int
    options: tuple[tuple[str, int], ...]


def prepare(plan: AttentionPlan, on_gpu: bool = False) -> None:
    """Derives from a plan on the host what forward reads, so that its upload takes it along."""
    if plan.queries:
        plan.derived("flex", lambda: Blocks.of(plan))
        prepare_needs(plan)


def conditioning_attention(
    q_QND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    plan: AttentionPlan,
    options: dict[str, int] | None = None,
) -> torch.Tensor:
    """Same result as the reference, shapes as there. `options`: FlexAttention's kernel_options."""
    if plan.queries == 0:
        return q_QND + 0 * (k_TKD.sum() + v_TKD.sum())
    q = q_QND.transpose(0, 1)[None]
    k = constant_keys(k_TKD, plan).transpose(0, 1)[None]
    v = constant_keys(v_TKD, plan).transpose(0, 1)[None]
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    shape = q.shape[1], k.shape[1], q.shape[3]
    kind = CallKind(needs, *shape, tuple((options or {}).items()))
    function = compiled(kind) if q.is_cuda else attend
    with warnings.catch_warnings():
        # Uncompiled it warns that it is slow; it runs uncompiled on a CPU only, in tests.
        warnings.simplefilter("ignore")
        out = function(q, k, v, block_mask(plan), options)
    return constant_queries(out[0].transpose(0, 1).contiguous(), plan)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, options: Any
) -> torch.Tensor:
    out = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )
    assert isinstance(out, torch.Tensor), "returned alone unless the lse is asked for"
    return out


@functools.cache
def compiled(kind: CallKind, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """`attend` compiled for one kind of call, with any number of rows.

    A function that torch.compile has compiled too often runs uncompiled from then on, which for
    FlexAttention means all scores at once. It counts by code object: each kind gets its own, the
    limit is raised, and fullgraph makes reaching it an error."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    code = attend.__code__.replace(co_name=f"attend_{len(_KINDS)}")
    _KINDS.append(kind)
    function = types.FunctionType(code, globals(), code.co_name)
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)


def forget_compiled() -> None:
    """Drops all compiled functions: a benchmark compares option sets and shapes beyond what one
    training run has."""
    compiled.cache_clear()
    torch._dynamo.reset()


def block_mask(plan: AttentionPlan) -> BlockMask:
    """The blocks of the plan, and the mask function of partial ones, on the plan's device."""
    if "flex mask" in plan.cache:
        return plan.cache["flex mask"]
    found = plan.derived("flex", lambda: Blocks.of(plan))
    columns = found.columns
    segment_Q, position_Q = columns.segment_Q, columns.position_Q
    segment_T, position_T = columns.segment_T, columns.position_T
    relation_SS = columns.relation_SS

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        related = relation_SS[segment_Q[query], segment_T[key]]
        not_after = position_Q[query] >= position_T[key]
        return (related == FULL) | ((related == CAUSAL) & not_after)

    mask = BlockMask.from_kv_blocks(
        found.partial_count,
        found.partial_columns,
        found.full_count,
        found.full_columns,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(plan.queries, plan.keys),
    )
    plan.cache["flex mask"] = mask
    return mask


def blocks(plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """(bool [I, J], bool [I, J]): blocks that are fully and that are partly visible; none is
    both."""
    first_query, end_of_queries, start, stop, reach = rectangles(plan).T
    # The first and past-the-end row of each rectangle in every block, of its queries and keys.
    low_I, high_I = _cut(first_query, end_of_queries, plan.queries)
    low_J, high_J = _cut(start, stop, plan.keys)
    rows_I = np.maximum(high_I - low_I, 0)
    keys_J = np.maximum(high_J - low_J, 0)

    free = reach == UNLIMITED
    # Visible pairs of each block by ranges without a diagonal; below 2^24, so exact in fp32.
    pairs_IJ = rows_I[free].T.astype(np.float32) @ keys_J[free].astype(np.float32)
    visible_IJ = pairs_IJ > 0
    for number in np.flatnonzero(~free):
        last_seen_I = high_I[number] + reach[number]
        reached_IJ = low_J[number][None, :] < last_seen_I[:, None]
        in_range_IJ = (rows_I[number] > 0)[:, None] & (keys_J[number] > 0)[None, :]
        visible_IJ |= reached_IJ & in_range_IJ
    full_IJ = pairs_IJ == BLOCK * BLOCK
    return full_IJ, visible_IJ & ~full_IJ


def _cut(start: np.ndarray, stop: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [n, blocks], int [n, blocks]): the part of each range of rows that lies in each block,
    as first and past-the-end row."""
    edge = np.arange(0, rows, BLOCK)[None, :]
    return np.maximum(start[:, None], edge), np.minimum(stop[:, None], edge + BLOCK)


def _counts_and_columns(chosen_IJ: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    count_I = chosen_IJ.sum(axis=1, dtype=np.int32)
    columns_IJ = np.argsort(~chosen_IJ, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(count_I)[None, None], torch.from_numpy(columns_IJ)[None, None]
