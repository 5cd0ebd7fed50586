"""Segment-masked attention as calls of a flash attention library for sequences of any length.

Every segment of queries becomes a sequence of its own whose keys are copies of all rows that it
sees. Segments that see fully form one call. Segments that are causal inside form another, where the
keys end with the segment itself, so that the library's causal mask, aligned to the last query and
key, is exact. With the context rows, which run separately, a layer has three to four calls. The
cost is the copies of K and V and the gradients of constants.

Shape suffixes: docs/notation.md.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from uno_ds.kernels.conditioning_attention.reference import (
    constant_keys,
    constant_queries,
    prepare_needs,
)
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


def compose(plan: AttentionPlan) -> tuple[tuple[Call, ...], torch.Tensor]:
    """(calls, int64 [Q]: index of each query among the queries of all calls; their number for rows
    that see nothing), on the host.

    Raises ValueError for a plan that is no composition of such calls: causal visibility between
    segments, or a causal segment whose queries are not consecutive positions."""
    start, stop = plan.query_rows
    full: list[Sequence] = []
    causal: list[Sequence] = []
    segment_T = plan.segment_T.numpy()
    rows_of = _rows_by_segment(segment_T, len(plan.relation_SS))
    for number, rows in enumerate(rows_of):
        queries = rows[(rows >= start) & (rows < stop)]
        if not len(queries):
            continue
        is_causal, sequence = _sequence(plan, number, queries, rows_of)
        if len(sequence.keys):
            (causal if is_causal else full).append(sequence)

    calls = []
    if full:
        calls.append(_call(full, start, causal=False))
    if causal:
        calls.append(_call(causal, start, causal=True))
    none = np.zeros(0, dtype=np.int64)
    seeing = np.concatenate([none, *(sequence.queries for sequence in full + causal)]) - start
    place = np.full(stop - start, len(seeing), dtype=np.int64)
    place[seeing] = np.arange(len(seeing))
    return tuple(calls), torch.from_numpy(place)


class Sequence(NamedTuple):
    """Rows of the queries of a segment, and of all keys that they see."""

    queries: np.ndarray
    keys: np.ndarray


def _rows_by_segment(segment_T: np.ndarray, segments: int) -> list[np.ndarray]:
    if not segments:
        return []
    lengths = np.bincount(segment_T, minlength=segments)
    return np.split(np.argsort(segment_T, kind="stable"), np.cumsum(lengths)[:-1])


def _sequence(
    plan: AttentionPlan, number: int, queries: np.ndarray, rows_of: list[np.ndarray]
) -> tuple[bool, Sequence]:
    """(whether segment `number` is causal inside, its sequence)."""
    related_S = plan.relation_SS.numpy()[number]
    if (np.delete(related_S, number) == CAUSAL).any():
        raise ValueError(
            "Flash attention cannot be composed of calls where one segment sees another causally."
        )
    keys = [np.zeros(0, dtype=np.int64)]
    keys += [rows_of[other] for other in np.flatnonzero(related_S == FULL)]
    if related_S[number] != CAUSAL:
        return False, Sequence(queries, np.concatenate(keys))

    position_T = plan.position_T.numpy()
    queries = queries[np.argsort(position_T[queries], kind="stable")]
    own = rows_of[number]
    own = own[np.argsort(position_T[own], kind="stable")]
    own = own[position_T[own] <= position_T[queries[-1]]]
    if not np.array_equal(own[-len(queries) :], queries):
        raise ValueError(
            "Flash attention cannot be composed of calls where the queries of a causal segment are "
            "not consecutive positions."
        )
    return True, Sequence(queries, np.concatenate([*keys, own]))


def _call(sequences: list[Sequence], first_query: int, causal: bool) -> Call:
    queries = [sequence.queries for sequence in sequences]
    keys = [sequence.keys for sequence in sequences]
    return Call(
        query=torch.from_numpy(np.concatenate(queries) - first_query),
        key=torch.from_numpy(np.concatenate(keys)),
        query_starts=torch.from_numpy(_starts(queries)),
        key_starts=torch.from_numpy(_starts(keys)),
        longest_query=max(map(len, queries)),
        longest_key=max(map(len, keys)),
        causal=causal,
    )


def prepare(plan: AttentionPlan, on_gpu: bool = False) -> None:
    """Derives from a plan on the host what forward reads, so that its upload takes it along."""
    plan.derived("flash", lambda: compose(plan))
    prepare_needs(plan)


def conditioning_attention(
    q_QND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    plan: AttentionPlan,
    varlen: Varlen | None = None,
) -> torch.Tensor:
    """Same result as the reference, shapes as there. `varlen`: a function to call instead of the
    library's."""
    calls, place = plan.derived("flash", lambda: compose(plan))
    varlen = varlen or library().varlen
    k_TKD = constant_keys(k_TKD, plan)
    v_TKD = constant_keys(v_TKD, plan)
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
    # Rows that see nothing read a row of zeros.
    if calls:
        zeros_1ND = torch.zeros_like(q_QND[:1])
    else:
        # Still a function of q, k and v: they stay in the graph.
        zeros_1ND = (q_QND.sum(dim=0, keepdim=True) + k_TKD.sum() + v_TKD.sum()) * 0
    out_QND = torch.cat([*outputs, zeros_1ND]).index_select(0, place)
    return constant_queries(out_QND, plan)


class Library(NamedTuple):
    """name: with the reasons why others that are installed are not used; varlen: its function."""

    name: str
    varlen: Varlen


@functools.cache
def library() -> Library:
    """The first that is installed and can be imported: flash-attn 3, 4 or 2, else torch's own
    varlen attention."""
    passed = []
    for name, module, adapter in LIBRARIES:
        if not _is_installed(module):
            continue
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
        # Whatever a library raises here, most often a build for another torch.
        except Exception as error:
            passed.append(f"{name} cannot be imported: {' '.join(str(error).split())}")
            continue
        return Library("; ".join([name, *passed]), adapter(function))
    return Library("; ".join(["torch varlen_attn", *passed]), _torch_varlen)


def describe() -> str:
    """What the backend computes with, for logs."""
    return library().name


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    # The package around it is imported here. Where it is missing, so is the module; where it is
    # flash-attn 2 and cannot be imported, the module cannot either, and the package is named.
    except Exception:
        return False
    # flash-attn 4 alone makes a folder flash_attn without a module, which is not flash-attn 2.
    return spec is not None and spec.origin is not None


def _flash_attn_2(function: Callable[..., Any]) -> Varlen:
    """flash-attn 2.8: returns the output alone."""

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
        out: torch.Tensor = function(
            q,
            k,
            v,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            causal=causal,
        )
        return out

    return varlen


def _flash_attn_3(function: Callable[..., Any]) -> Varlen:
    """flash-attn 3.0.0: the same arguments, and the output alone; a build that returns the lse too
    is understood as well."""
    plain: Callable[..., Any] = _flash_attn_2(function)

    def varlen(*arguments: Any) -> torch.Tensor:
        return _output(plain(*arguments))

    return varlen


def _flash_attn_4(function: Callable[..., Any]) -> Varlen:
    """flash-attn 4, a beta: it returns the lse too, and older ones do not take the longest
    lengths. By name, since the order of its arguments has changed: in 4.0.0b36 `qv` precedes
    them."""
    accepted = inspect.signature(function).parameters
    takes_longest = "max_seqlen_q" in accepted

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
        longest = {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k} if takes_longest else {}
        given = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "causal": causal}
        return _output(function(q, k, v, **given, **longest))

    return varlen


def _output(returned: Any) -> torch.Tensor:
    out: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return out


# (name, module, adapter), the preferred one first.
LIBRARIES: tuple[tuple[str, str, Callable[[Callable[..., Any]], Varlen]], ...] = (
    ("flash-attn 3", "flash_attn_interface", _flash_attn_3),
    ("flash-attn 4", "flash_attn.cute", _flash_attn_4),
    ("flash-attn 2", "flash_attn", _flash_attn_2),
)


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

    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    group = q.shape[1] // k.shape[1]
    if group > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
    out = varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)
    assert isinstance(out, torch.Tensor), "returned alone unless the lse is asked for"
    return out


def _starts(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
