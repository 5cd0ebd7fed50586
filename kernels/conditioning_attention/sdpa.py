"""Segment-masked attention by torch's scaled_dot_product_attention on one padded row per sample.

Samples never see each other, so a pack of many small samples costs the sum of squares instead of
the square of the sum: 20 to 40 times less than a dense mask for the tiny recipes. Padding costs
little as long as samples are alike.

Shape suffixes: docs/notation.md."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uno_ds.kernels.conditioning_attention.reference import constant_keys, constant_queries
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan


@dataclass(frozen=True, eq=False)
class Padded:
    """query_BQ, key_BT: int64, rows of each of the B samples, short samples padded with row 0;
    visible_BQT: bool [B, 1, Q, T], the mask of each sample with padded rows seeing nothing;
    restore_Q: int64, where each query row lies in the flattened [B * Q]."""

    query_BQ: torch.Tensor
    key_BT: torch.Tensor
    visible_BQT: torch.Tensor
    restore_Q: torch.Tensor

    @classmethod
    def of(cls, plan: AttentionPlan) -> "Padded":
        """Built on the host when a batch first needs it, moved to the plan's device, and kept with
        the plan."""
        start, stop = plan.query_rows
        segment_T = plan.segment_T.numpy()
        position_T = plan.position_T.numpy()
        relation_SS = plan.relation_SS.numpy()
        group_T = plan.group_S.numpy()[segment_T]
        groups = np.unique(group_T[start:stop])
        query_BQ, restore_Q = _pad_groups(group_T[start:stop], groups)
        key_BT, key_place = _pad_groups(group_T, groups)
        key_valid_BT = np.zeros(key_BT.shape, dtype=bool)
        key_valid_BT.reshape(-1)[key_place[key_place >= 0]] = True
        query_valid_BQ = np.zeros(query_BQ.shape, dtype=bool)
        query_valid_BQ.reshape(-1)[restore_Q] = True

        row_BQ = query_BQ + start
        relation_BQT = relation_SS[segment_T[row_BQ][:, :, None], segment_T[key_BT][:, None, :]]
        visible_BQT = relation_BQT == FULL
        if (relation_SS == CAUSAL).any():
            not_after = position_T[row_BQ][:, :, None] >= position_T[key_BT][:, None, :]
            visible_BQT |= (relation_BQT == CAUSAL) & not_after
        visible_BQT &= query_valid_BQ[:, :, None] & key_valid_BT[:, None, :]

        device = plan.tables.device
        return cls(
            query_BQ=torch.from_numpy(query_BQ).to(device),
            key_BT=torch.from_numpy(key_BT).to(device),
            visible_BQT=torch.from_numpy(visible_BQT[:, None]).to(device),
            restore_Q=torch.from_numpy(restore_Q).to(device),
        )


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Same result as the reference, shapes as there."""
    if plan.queries == 0:
        # Empty, but still a function of q, k and v: under ZeRO-3 backward has to reach every weight
        # on every rank.
        return q_QND + 0 * (k_TKD.sum() + v_TKD.sum())
    if "sdpa" not in plan.cache:
        plan.cache["sdpa"] = Padded.of(plan)
    padded = plan.cache["sdpa"]
    group = q_QND.shape[1] // k_TKD.shape[1]
    q = _pad(q_QND, padded.query_BQ)
    k = _pad(constant_keys(k_TKD, plan), padded.key_BT).repeat_interleave(group, dim=1)
    v = _pad(constant_keys(v_TKD, plan), padded.key_BT).repeat_interleave(group, dim=1)
    # A row that sees nothing would be NaN: it sees everything here and is cleared afterwards.
    empty = ~padded.visible_BQT.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=padded.visible_BQT | empty)
    out = out.masked_fill(empty, 0.0)
    rows_QND = out.transpose(1, 2).flatten(0, 1).index_select(0, padded.restore_Q)
    return constant_queries(rows_QND, plan)


def _pad(rows_TND: torch.Tensor, index_BT: torch.Tensor) -> torch.Tensor:
    """[B, N, T, D]: the rows of each group. index_select, because the backward of plain indexing is
    ten times slower on a CPU."""
    return rows_TND.index_select(0, index_BT.flatten()).unflatten(0, index_BT.shape).transpose(1, 2)


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
