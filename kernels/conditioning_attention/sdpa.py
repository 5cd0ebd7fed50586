"""Segment-masked attention by torch's scaled_dot_product_attention on one padded row per sample.

Samples never see each other, so a pack of many small samples costs the sum of squares instead of
the square of the sum: 20 to 40 times less than a dense mask for the tiny recipes. Padding costs
little as long as samples are alike.

Legend of shape suffixes: G samples, L rows of the longest sample (queries or keys), T rows, N query
heads, D head dim."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uno_ds.kernels.conditioning_attention.reference import constant_keys, constant_queries
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan


@dataclass(frozen=True, eq=False)
class Padded:
    """query_GL, key_GL: int64, rows of each sample, short samples padded with row 0; visible_GLL:
    bool [G, 1, Lq, Lk], the mask of each sample with padded rows seeing nothing; restore_Q: int64,
    where each query row lies in the flattened [G * Lq]."""

    query_GL: torch.Tensor
    key_GL: torch.Tensor
    visible_GLL: torch.Tensor
    restore_Q: torch.Tensor

    @classmethod
    def of(cls, plan: AttentionPlan) -> "Padded":
        """Built on the host when a batch first needs it, moved to the plan's device, and kept with
        the plan."""
        start, stop = plan.query_rows
        segment_K, position_K, relation_SS, group_S = (
            x.numpy() for x in (plan.segment_K, plan.position_K, plan.relation_SS, plan.group_S)
        )
        group_K = group_S[segment_K]
        groups = np.unique(group_K[start:stop])
        query_GL, restore_Q = _pad_groups(group_K[start:stop], groups)
        key_GL, key_place = _pad_groups(group_K, groups)
        key_valid, query_valid = (
            np.zeros(key_GL.shape, dtype=bool),
            np.zeros(query_GL.shape, dtype=bool),
        )
        key_valid.reshape(-1)[key_place[key_place >= 0]] = True
        query_valid.reshape(-1)[restore_Q] = True
        relation = relation_SS[
            segment_K[query_GL + start][:, :, None], segment_K[key_GL][:, None, :]
        ]
        visible = relation == FULL
        if (relation_SS == CAUSAL).any():
            visible |= (relation == CAUSAL) & (
                position_K[query_GL + start][:, :, None] >= position_K[key_GL][:, None, :]
            )
        visible &= query_valid[:, :, None] & key_valid[:, None, :]
        return cls(
            *(
                torch.from_numpy(array).to(plan.tables.device)
                for array in (query_GL, key_GL, visible[:, None], restore_Q)
            )
        )


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Same result as the reference, shapes as there."""
    if plan.queries == 0:
        # Empty, but still a function of q, k and v: under ZeRO-3 every rank has to reach every
        # weight in backward.
        return q_QND + 0 * (k_TKD.sum() + v_TKD.sum())
    if "sdpa" not in plan.cache:
        plan.cache["sdpa"] = Padded.of(plan)
    padded, groups = plan.cache["sdpa"], q_QND.shape[1] // k_TKD.shape[1]
    q = _pad(q_QND, padded.query_GL)
    k, v = (
        _pad(constant_keys(x, plan), padded.key_GL).repeat_interleave(groups, dim=1)
        for x in (k_TKD, v_TKD)
    )
    empty = ~padded.visible_GLL.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=padded.visible_GLL | empty).masked_fill(
        empty, 0.0
    )
    return constant_queries(
        out.transpose(1, 2).flatten(0, 1).index_select(0, padded.restore_Q), plan
    )


def _pad(rows_TND: torch.Tensor, index_GL: torch.Tensor) -> torch.Tensor:
    """[G, N, L, D]: the rows of each group. index_select, because the backward of plain indexing is
    ten times slower on a CPU."""
    return rows_TND.index_select(0, index_GL.flatten()).unflatten(0, index_GL.shape).transpose(1, 2)


def _pad_groups(group: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([G, L] rows of each group padded with 0, [rows] flat place of each row, -1 for rows of other
    groups)."""
    number = np.searchsorted(groups, group)
    number = np.where(number < len(groups), number, 0)
    member = np.isin(group, groups)
    rows = np.flatnonzero(member)
    rows = rows[np.argsort(number[rows], kind="stable")]
    counts = np.bincount(number[rows], minlength=len(groups))
    longest = int(counts.max())
    first = np.cumsum(counts) - counts
    place = number[rows] * longest + (np.arange(len(rows)) - first[number[rows]])
    index = np.zeros(len(groups) * longest, dtype=np.int64)
    index[place] = rows
    flat = np.full(len(group), -1, dtype=np.int64)
    flat[rows] = place
    return index.reshape(len(groups), longest), flat
