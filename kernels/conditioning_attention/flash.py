"""Segment-masked attention as calls of a flash attention library for sequences of any length.

Every segment of queries becomes a sequence of its own whose keys are all rows that it sees, copied
behind each other: the segments that see fully in one call, those that are causal inside in another,
where the keys end with the segment itself, so that the library's causal mask, aligned to the last
query and key, is the exact one. With the context rows, which run apart, that makes three to four
calls a layer. The copies of K and V and the gradients of constants are the price.

Shape suffixes: docs/notation.md.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from uno_ds.kernels.conditioning_attention.reference import constant_keys, constant_queries
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan

# function(q, k, v, cu_seqlens_q, cu_seqlens_k, longest q, longest k, causal) -> out
Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, bool],
    torch.Tensor,
]


@dataclass(frozen=True, eq=False)
class Call:
    """One call: the rows of its queries and keys, int64, and where each sequence begins among them,
    int32 [sequences + 1]."""

    query: torch.Tensor
    key: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool


def compose(plan: AttentionPlan) -> tuple[list[Call], torch.Tensor]:
    """(calls, [Q] the place of each query among the queries of all calls; past the last for rows
    that see nothing).

    Raises ValueError for a plan that is no composition of such calls: causal visibility between
    segments, or a causal segment whose queries are not consecutive positions."""
    start, stop = plan.query_rows
    segment, position, relation = (
        x.numpy() for x in (plan.segment_T, plan.position_T, plan.relation_SS)
    )
    rows_of = (
        np.split(
            np.argsort(segment, kind="stable"),
            np.cumsum(np.bincount(segment, minlength=len(relation)))[:-1],
        )
        if len(relation)
        else []
    )
    sequences: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {False: [], True: []}
    for number, rows in enumerate(rows_of):
        queries = rows[(rows >= start) & (rows < stop)]
        if not len(queries):
            continue
        related = relation[number]
        if (np.delete(related, number) == CAUSAL).any():
            raise ValueError(
                "Flash attention cannot be composed of calls where one segment sees another "
                "causally."
            )
        keys = [rows_of[other] for other in np.flatnonzero(related == FULL)]
        causal = related[number] == CAUSAL
        if causal:
            queries = queries[np.argsort(position[queries], kind="stable")]
            own = rows[np.argsort(position[rows], kind="stable")]
            own = own[position[own] <= position[queries[-1]]]
            if not np.array_equal(own[-len(queries) :], queries):
                raise ValueError(
                    "Flash attention cannot be composed of calls where the queries of a causal "
                    "segment are not consecutive positions."
                )
            keys.append(own)
        if keys and sum(map(len, keys)):
            sequences[causal].append((queries, np.concatenate(keys)))
    device, calls, order = plan.tables.device, [], []
    for causal, members in sequences.items():
        if members:
            queries, keys = ([member[part] for member in members] for part in (0, 1))
            order += queries
            columns = (
                np.concatenate(queries) - start,
                np.concatenate(keys),
                _starts(queries),
                _starts(keys),
            )
            calls.append(
                Call(
                    *(torch.from_numpy(column).to(device) for column in columns),
                    max(map(len, queries)),
                    max(map(len, keys)),
                    causal,
                )
            )
    seeing = np.concatenate([np.zeros(0, dtype=np.int64), *order]) - start
    place = np.full(stop - start, len(seeing), dtype=np.int64)
    place[seeing] = np.arange(len(seeing))
    return calls, torch.from_numpy(place).to(device)


def conditioning_attention(
    q_QND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    plan: AttentionPlan,
    varlen: Varlen | None = None,
) -> torch.Tensor:
    """Same result as the reference, shapes as there. `varlen`: stands in for the library."""
    if "flash" not in plan.cache:
        plan.cache["flash"] = compose(plan)
    (calls, place), varlen = plan.cache["flash"], varlen or library()[1]
    k_TKD, v_TKD = constant_keys(k_TKD, plan), constant_keys(v_TKD, plan)
    outputs = [
        varlen(
            q_QND.index_select(0, call.query),
            k_TKD.index_select(0, call.key),
            v_TKD.index_select(0, call.key),
            call.query_starts,
            call.key_starts,
            call.longest_query,
            call.longest_key,
            call.causal,
        )
        for call in calls
    ]
    # Rows that see nothing read a row of zeros; it keeps q, k and v in the graph where there is no
    # call.
    blind = (
        (q_QND.sum(dim=0, keepdim=True) + k_TKD.sum() + v_TKD.sum()) * 0
        if not calls
        else torch.zeros_like(q_QND[:1])
    )
    return constant_queries(torch.cat([*outputs, blind]).index_select(0, place), plan)


@functools.cache
def library() -> tuple[str, Varlen]:
    """(name, function) of the first library that is installed: flash-attn 3, 4 or 2, else torch's
    own varlen attention."""
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func

        return "flash-attn 3", _flash_attn(flash_attn_varlen_func)
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_varlen_func

        return "flash-attn 4", _flash_attn(flash_attn_varlen_func)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        return "flash-attn 2", _flash_attn(flash_attn_varlen_func)
    return "torch varlen_attn", _torch_varlen


def _flash_attn(function: Callable) -> Varlen:
    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts_q: torch.Tensor,
        starts_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        causal: bool,
    ) -> torch.Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            causal=causal,
        )
        return out[0] if isinstance(out, tuple) else out

    return varlen


def _torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1, 0)} if causal else {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)


def _starts(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
