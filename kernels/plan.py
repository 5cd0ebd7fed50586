"""The attention plan: which rows see which, as a table over segments, never as a [T, T] object on the host.

Legend of shape suffixes: S segments, G groups, L rows of the longest group, Q query rows, K key rows.
"""
from dataclasses import dataclass

import numpy as np
import torch

NONE, FULL, CAUSAL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Visibility of a range of query rows over all key rows.

    A query sees a key if `relation_SS` of their segments is FULL, or if it is CAUSAL and the key's position within the
    segment is not after the query's. Segments of different groups (samples) never see each other.

    query_rows            first and past-the-end row of the queries among the key rows
    segment_K, position_K int32 [K]: segment of each row, and its place within the segment
    relation_SS           int8 [S, S]
    query_index_GL        int64 [G, Lq], key_index_GL int64 [G, Lk]: rows of each group, short groups padded with row 0
    visible_GLL           bool [G, 1, Lq, Lk]: the mask of each group; padded rows see nothing
    restore_Q             int64 [Q]: where each query row lies in the flattened [G * Lq]
    """

    query_rows: tuple[int, int]
    segment_K: torch.Tensor
    position_K: torch.Tensor
    relation_SS: torch.Tensor
    query_index_GL: torch.Tensor
    key_index_GL: torch.Tensor
    visible_GLL: torch.Tensor
    restore_Q: torch.Tensor

    @property
    def queries(self) -> int:
        return self.query_rows[1] - self.query_rows[0]

    @property
    def keys(self) -> int:
        return len(self.segment_K)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return AttentionPlan(query_rows=self.query_rows, **moved)

    def visible(self) -> torch.Tensor:
        """bool [Q, K]: the dense mask, on the plan's device; for the reference and for tests."""
        start, stop = self.query_rows
        segment, position = self.segment_K.long(), self.position_K
        relation = self.relation_SS[segment[start:stop]][:, segment]
        return (relation == FULL) | ((relation == CAUSAL) & (position[start:stop, None] >= position[None, :]))


def build_plan(segment_K: np.ndarray, position_K: np.ndarray, relation_SS: np.ndarray, group_S: np.ndarray,
               query_rows: tuple[int, int]) -> AttentionPlan:
    """Builds the plan on the host. `group_S` [S] names the sample of each segment; see AttentionPlan for the rest."""
    start, stop = query_rows
    if not 0 <= start <= stop <= len(segment_K):
        raise ValueError(f"query_rows {query_rows} do not lie within the {len(segment_K)} key rows.")
    if (relation_SS[group_S[:, None] != group_S[None, :]] != NONE).any():
        raise ValueError("relation_SS shows segments of one group to another; samples never see each other.")
    group_K = group_S[segment_K] if len(segment_K) else np.zeros(0, dtype=np.int64)
    groups = np.unique(group_K[start:stop])
    query_index, restore = _pad_groups(group_K[start:stop], groups)
    key_index, key_place = _pad_groups(group_K, groups)
    key_valid = np.zeros(key_index.shape, dtype=bool)
    key_valid.reshape(-1)[key_place[key_place >= 0]] = True
    query_valid = np.zeros(query_index.shape, dtype=bool)
    query_valid.reshape(-1)[restore] = True
    if len(groups):
        query_row = query_index + start
        relation = relation_SS[segment_K[query_row][:, :, None], segment_K[key_index][:, None, :]]
        earlier = position_K[query_row][:, :, None] >= position_K[key_index][:, None, :]
        visible = ((relation == FULL) | ((relation == CAUSAL) & earlier)) & query_valid[:, :, None] & key_valid[:, None, :]
    else:
        visible = np.zeros((0, 0, 0), dtype=bool)
    tensors = (segment_K.astype(np.int32), position_K.astype(np.int32), relation_SS, query_index, key_index, visible[:, None], restore)
    return AttentionPlan(query_rows, *(torch.from_numpy(np.ascontiguousarray(array)) for array in tensors))


def _pad_groups(group: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([G, L] rows of each group padded with 0, [rows] flat place of each row, -1 for rows of other groups)."""
    number = np.searchsorted(groups, group) if len(groups) else np.zeros(len(group), dtype=np.int64)
    number = np.where(number < len(groups), number, 0)
    member = np.isin(group, groups)
    rows = np.flatnonzero(member)
    rows = rows[np.argsort(number[rows], kind="stable")]
    counts = np.bincount(number[rows], minlength=len(groups)) if len(groups) else np.zeros(0, dtype=np.int64)
    longest = int(counts.max()) if len(counts) else 0
    first = np.cumsum(counts) - counts
    place = number[rows] * longest + (np.arange(len(rows)) - first[number[rows]])
    index = np.zeros(len(groups) * longest, dtype=np.int64)
    index[place] = rows
    flat = np.full(len(group), -1, dtype=np.int64)
    flat[rows] = place
    return index.reshape(len(groups), longest), flat
