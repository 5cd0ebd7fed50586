"""Segment-masked attention by FlexAttention, the baseline of the benchmarks, with a block mask
built from the plan's ranges.

Blocks of 128 x 128 are classified as full, partial or empty on the host; the mask function is
evaluated inside partial blocks only. FlexAttention computes gradients of constants like any other;
they are cleared afterwards. On a CPU it has no backward and runs uncompiled, which is enough for
tests of the mask.

Shape suffixes: docs/notation.md."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from uno_ds.kernels.conditioning_attention.reference import constant_keys, constant_queries
from uno_ds.kernels.plan import CAUSAL, FULL, UNLIMITED, AttentionPlan

BLOCK = 128
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
    if "flex" not in plan.cache:
        plan.cache["flex"] = block_mask(plan)
    q = q_QND.transpose(0, 1)[None]
    k = constant_keys(k_TKD, plan).transpose(0, 1)[None]
    v = constant_keys(v_TKD, plan).transpose(0, 1)[None]
    with warnings.catch_warnings():
        # Uncompiled it warns that it is slow; it runs uncompiled on a CPU only, in tests.
        warnings.simplefilter("ignore")
        out = _function(q.device.type)(
            q,
            k,
            v,
            block_mask=plan.cache["flex"],
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options,
        )
    return constant_queries(out[0].transpose(0, 1).contiguous(), plan)


@functools.cache
def _function(device: str) -> Callable[..., Any]:
    function: Callable[..., Any] = flex_attention
    return torch.compile(function) if device == "cuda" else function


def block_mask(plan: AttentionPlan) -> BlockMask:
    """The blocks of the plan, and the mask function of partial ones, on the plan's device."""
    device = plan.tables.device
    first = plan.query_rows[0]
    segment = plan.segment_T.long().to(device)
    position = plan.position_T.to(device)
    relation = plan.relation_SS.to(device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        related = relation[segment[query + first], segment[key]]
        not_after = position[query + first] >= position[key]
        return (related == FULL) | ((related == CAUSAL) & not_after)

    full_IJ, partial_IJ = blocks(plan)
    return BlockMask.from_kv_blocks(
        *_counts_and_columns(partial_IJ, device),
        *_counts_and_columns(full_IJ, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(plan.queries, plan.keys),
    )


def blocks(plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """(bool [I, J], bool [I, J]): blocks that are fully and that are partly visible; none is
    both."""
    tiles = plan.table(f"query_tiles_{BLOCK}")
    ranges_of_run = plan.table("keys_of_run")
    ranges = plan.table("keys")
    start, stop, reach = ranges[:, 0], ranges[:, 1], ranges[:, 2]
    runs = len(ranges_of_run) - 1
    first_query = np.full(runs, UNLIMITED)
    end_of_queries = np.zeros(runs, dtype=np.int64)
    np.minimum.at(first_query, tiles[:, 2], tiles[:, 0])
    np.maximum.at(end_of_queries, tiles[:, 2], tiles[:, 1])

    # For each range: its first and past-the-end row in every block, for its queries and its keys.
    run = np.repeat(np.arange(runs), np.diff(ranges_of_run))
    low_I, high_I = _cut(first_query[run], end_of_queries[run], plan.queries)
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


def _counts_and_columns(
    chosen_IJ: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a block matrix: the chosen blocks of each row, as their number
    [1, 1, I] and as columns [1, 1, I, J] with the chosen ones first."""
    count_I = chosen_IJ.sum(axis=1, dtype=np.int32)
    columns_IJ = np.argsort(~chosen_IJ, axis=1, kind="stable").astype(np.int32)
    count = torch.from_numpy(count_I)[None, None].to(device)
    columns = torch.from_numpy(columns_IJ)[None, None].to(device)
    return count, columns
