"""Segment-masked attention by FlexAttention: the competitor in the benchmarks, with a block mask
built from the plan's ranges.

Which blocks of 128 x 128 are full, partial or empty follows from the ranges on the host; the mask
function is only evaluated inside partial blocks. FlexAttention computes gradients of constants like
any other; they are cleared afterwards. On a CPU it has no backward and runs uncompiled, which
serves tests of the mask.

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
# Candidates of a benchmark that tunes; None: what the compiler takes by itself for the
# architecture.
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
    q, k, v = (
        x.transpose(0, 1)[None]
        for x in (q_QND, constant_keys(k_TKD, plan), constant_keys(v_TKD, plan))
    )
    with warnings.catch_warnings():
        # Uncompiled it warns that it is slow; it runs so on a CPU only, in tests.
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
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def block_mask(plan: AttentionPlan) -> BlockMask:
    """The blocks of the plan and the function that tells within a partial one, on the plan's
    device."""
    device, first = plan.tables.device, plan.query_rows[0]
    segment, position, relation = (
        x.to(device) for x in (plan.segment_T.long(), plan.position_T, plan.relation_SS)
    )

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        related = relation[segment[query + first], segment[key]]
        return (related == FULL) | (
            (related == CAUSAL) & (position[query + first] >= position[key])
        )

    full_IJ, partial_IJ = blocks(plan)
    return BlockMask.from_kv_blocks(
        *_listed(partial_IJ, device),
        *_listed(full_IJ, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(plan.queries, plan.keys),
    )


def blocks(plan: AttentionPlan) -> tuple[np.ndarray, np.ndarray]:
    """(bool [I, J], bool [I, J]): blocks that are wholly and that are partly visible. A full one is
    not partial."""
    tiles, of_run, ranges = (
        plan.table(f"query_tiles_{BLOCK}"),
        plan.table("keys_of_run"),
        plan.table("keys"),
    )
    first, stop = np.full(len(of_run) - 1, UNLIMITED), np.zeros(len(of_run) - 1, dtype=np.int64)
    np.minimum.at(first, tiles[:, 2], tiles[:, 0])
    np.maximum.at(stop, tiles[:, 2], tiles[:, 1])
    run = np.repeat(np.arange(len(of_run) - 1), np.diff(of_run))
    low_I, high_I = _cut(first[run], stop[run], plan.queries)
    low_J, high_J = _cut(ranges[:, 0], ranges[:, 1], plan.keys)
    rows, keys = np.maximum(high_I - low_I, 0), np.maximum(high_J - low_J, 0)
    free = ranges[:, 2] == UNLIMITED
    # Visible pairs of each block; below 2^24, so exact in fp32.
    count_IJ = rows[free].T.astype(np.float32) @ keys[free].astype(np.float32)
    touched_IJ = count_IJ > 0
    for number in np.flatnonzero(~free):
        reached = low_J[number][None, :] < (high_I[number] + ranges[number, 2])[:, None]
        touched_IJ |= reached & (rows[number] > 0)[:, None] & (keys[number] > 0)[None, :]
    full_IJ = count_IJ == BLOCK * BLOCK
    return full_IJ, touched_IJ & ~full_IJ


def _cut(start: np.ndarray, stop: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [n, blocks], int [n, blocks]): the part of each stretch of rows that lies in each block,
    as first and past-the-end row."""
    edge = np.arange(0, rows, BLOCK)[None, :]
    return np.maximum(start[:, None], edge), np.minimum(stop[:, None], edge + BLOCK)


def _listed(chosen_IJ: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a block matrix: how many in each row, and their columns first."""
    count, order = (
        chosen_IJ.sum(axis=1, dtype=np.int32),
        np.argsort(~chosen_IJ, axis=1, kind="stable").astype(np.int32),
    )
    return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(
        device
    )
