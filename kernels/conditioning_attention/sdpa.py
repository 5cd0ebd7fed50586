"""Segment-masked attention by torch's scaled_dot_product_attention on one padded row per sample.

Samples never see each other, so a pack of many small samples costs the sum of squares instead of
the square of the sum: 20 to 40 times less than a dense mask for the tiny recipes. Padding costs
little as long as samples are alike.

Shape suffixes: docs/notation.md."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uno_ds.kernels.conditioning_attention.rectangles import rectangles
from uno_ds.kernels.conditioning_attention.reference import (
    constant_keys,
    constant_queries,
    prepare_needs,
)
from uno_ds.kernels.plan import UNLIMITED, AttentionPlan


@dataclass(frozen=True, eq=False)
class Padded:
    """One call: samples as rows of a batch.

    query_BQ, key_BT  int64, rows of each of the B samples, short samples padded with row 0
    visible_BQT       bool [B, 1, Q, T], the mask of each sample; rows that see nothing, as those of
                      the padding, see everything here and are cleared afterwards
    empty_BQ1         bool [B, 1, Q, 1], these rows

    The two masks are None where every row of every sample sees all of its keys."""

    query_BQ: torch.Tensor
    key_BT: torch.Tensor
    visible_BQT: torch.Tensor | None
    empty_BQ1: torch.Tensor | None


# The calls of a plan, and for each query row its place among the rows of all calls, int64 [Q].
Calls = tuple[tuple[Padded, ...], torch.Tensor]


def prepare(plan: AttentionPlan, on_gpu: bool = False) -> None:
    """Derives from a plan on the host what forward reads, so that its upload takes it along.
    `on_gpu`: for a plan that will be computed on one."""
    plan.derived("sdpa", lambda: calls_of(plan, on_gpu))
    prepare_needs(plan)


def calls_of(plan: AttentionPlan, by_shape: bool) -> Calls:
    """The calls, on the host. `by_shape`: samples of one shape in which everything is visible are
    calls of their own without a mask, which on a GPU a faster kernel computes; otherwise all
    samples are one call with a mask."""
    start, stop = plan.query_rows
    if start == stop:
        return (), torch.zeros(0, dtype=torch.int64)
    group_T = plan.group_S.numpy()[plan.segment_T.numpy()]
    groups = np.unique(group_T[start:stop])
    visible = rectangles(plan)
    parts = _by_shape(group_T, groups, (start, stop), visible) if by_shape else [(groups, True)]
    calls = []
    restore_Q = np.zeros(stop - start, dtype=np.int64)
    rows = 0
    for chosen, has_mask in parts:
        query_BQ, query_place = _pad_groups(group_T[start:stop], chosen)
        key_BT, key_place = _pad_groups(group_T, chosen)
        masks: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if has_mask:
            masks = _masks(visible, query_BQ.shape, key_BT.shape[1], query_place, key_place)
        calls.append(Padded(torch.from_numpy(query_BQ), torch.from_numpy(key_BT), *masks))
        here = query_place >= 0
        restore_Q[here] = query_place[here] + rows
        rows += query_BQ.size
    return tuple(calls), torch.from_numpy(restore_Q)


def _by_shape(
    group_T: np.ndarray, groups: np.ndarray, query_rows: tuple[int, int], visible: np.ndarray
) -> list[tuple[np.ndarray, bool]]:
    """(groups, whether they need a mask) of each call."""
    number_T = np.searchsorted(groups, group_T)
    is_here_T = np.isin(group_T, groups)
    queries = np.bincount(number_T[slice(*query_rows)], minlength=len(groups))
    keys = np.bincount(number_T[is_here_T], minlength=len(groups))
    first_query, end_of_queries, first_key, end_of_keys, reach = visible.T
    sees = (end_of_queries - first_query) * (end_of_keys - first_key) * (reach == UNLIMITED)
    group_of_rectangle = number_T[first_query + query_rows[0]]
    pairs = np.bincount(group_of_rectangle, sees, minlength=len(groups))
    whole = pairs == queries * keys
    shapes = sorted(set(zip(queries[whole].tolist(), keys[whole].tolist())))
    parts = [
        (groups[whole & (queries == shape[0]) & (keys == shape[1])], False) for shape in shapes
    ]
    return [*parts, (groups[~whole], True)] if not whole.all() else parts


def _masks(
    visible: np.ndarray,
    shape_BQ: tuple[int, ...],
    keys: int,
    query_place: np.ndarray,
    key_place: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(visible_BQT, empty_BQ1) of samples whose rows lie at these places of the padded [B * Q] and
    [B * keys]; -1: in no sample of this call."""
    visible_BQT = np.zeros((*shape_BQ, keys), dtype=bool)
    seeing_BQ = np.zeros(shape_BQ, dtype=bool)
    for first_query, end_of_queries, first_key, end_of_keys, reach in visible.tolist():
        place = int(query_place[first_query])
        if place < 0:
            continue
        sample, query = divmod(place, shape_BQ[1])
        key = int(key_place[first_key]) - sample * keys
        queries = slice(query, query + end_of_queries - first_query)
        columns = slice(key, key + end_of_keys - first_key)
        block_QT = visible_BQT[sample, queries, columns]
        if reach == UNLIMITED:
            block_QT[:] = True
            seeing_BQ[sample, queries] = True
            continue
        # A query sees the keys up to itself plus the reach.
        diagonal = first_query + reach - first_key
        block_QT[:] = np.tri(block_QT.shape[0], block_QT.shape[1], k=diagonal, dtype=bool)
        seeing_BQ[sample, query + max(0, -diagonal) : queries.stop] = True
    visible_BQT[~seeing_BQ] = True
    empty_BQ1 = torch.from_numpy(~seeing_BQ)[:, None, :, None]
    return torch.from_numpy(visible_BQT)[:, None], empty_BQ1


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Same result as the reference, shapes as there."""
    if plan.queries == 0:
        # Empty, but still a function of q, k and v: under ZeRO-3 backward has to reach every weight
        # on every rank.
        return q_QND + 0 * (k_TKD.sum() + v_TKD.sum())
    calls, restore_Q = plan.derived("sdpa", lambda: calls_of(plan, by_shape=q_QND.is_cuda))
    k_TKD = constant_keys(k_TKD, plan)
    v_TKD = constant_keys(v_TKD, plan)
    outputs = [_attend(q_QND, k_TKD, v_TKD, call) for call in calls]
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return constant_queries(rows.index_select(0, restore_Q), plan)


def _attend(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, call: Padded
) -> torch.Tensor:
    """[B * Q, N, D]"""
    group = q_QND.shape[1] // k_TKD.shape[1]
    q = _pad(q_QND, call.query_BQ)
    k = _pad(k_TKD, call.key_BT).repeat_interleave(group, dim=1)
    v = _pad(v_TKD, call.key_BT).repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=call.visible_BQT)
    if call.empty_BQ1 is not None:
        out = out.masked_fill(call.empty_BQ1, 0.0)
    return out.transpose(1, 2).flatten(0, 1)


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
