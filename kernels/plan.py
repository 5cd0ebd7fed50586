"""The attention plan: which rows see which, as ranges of rows, built once per batch on the host and
read by every backend.

A RUN is a stretch of neighbouring rows of one segment that are alike in what they see, in who sees
them and in their need of a gradient. Rows of a batch lie in slabs, so one segment may be several
runs. What a run of queries sees is a handful of key RANGES, whatever the number of tokens; TILES
cut the runs into the pieces that one program works on. Nothing here has the size tokens x tokens.

Shape suffixes: docs/notation.md.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

NONE, FULL, CAUSAL = 0, 1, 2
TILES = (32, 64, 128)
# The `reach` of a range without a diagonal: every query reaches every key of it.
UNLIMITED = 2**30
# Row numbers plus a reach have to fit into 32 bits.
MOST_ROWS = 2**29
LISTS = ("keys", "constant_keys", "queries")
TILED = ("query_tiles", "live_query_tiles", "mixed_query_tiles", "live_key_tiles")
TABLES = (
    *(name for ranges in LISTS for name in (ranges, f"{ranges}_of_run")),
    *(f"{name}_{size}" for name in TILED for size in TILES),
)
# Tables begin at multiples of 16 bytes, so that a kernel is not compiled again because a pointer's
# alignment differs.
ALIGNMENT = 4


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Visibility of a range of query rows over all key rows, and who of them needs a gradient.

    A query sees a key if `relation_SS` of their segments is FULL, or if it is CAUSAL and the key's
    position within the segment is not after the query's. Segments of different groups (samples)
    never see each other. A query without need is a constant: it adds to no gradient. A key without
    need gets a gradient of 0.

    query_rows            first and past-the-end row of the queries among the key rows
    segment_T, position_T int32 [K]: segment of each row, and its place within the segment; these
    four stay on the host
    relation_SS           int8 [S, S]
    group_S               int64 [S]: sample of each segment
    need_T                bool [K]: rows that need a gradient
    pairs                 visible (query, key) pairs by the number of matrix products that backward
                          spends on them
    tables                int32: all tables behind each other, on the plan's device:
        keys, constant_keys    [n, 3] ranges of rows that a run of queries with need sees (`keys`:
                               any run): all, and those without need
        queries                [n, 3] ranges of queries with need that see a run of keys with need
        *_of_run               [R + 1] first range of each run, and the number of ranges
        query_tiles_N          [n, 3] tiles of at most N queries, longest work first; live: of
                               queries with need; mixed: of those that
                               see a key without need; live_key_tiles_N: of keys with need that such
                               a query sees
    places                int64 [tables, 2], on the host: first and past-the-end number of each
                          table, in the order of TABLES

    A range is (start, stop, reach): the keys start <= key < stop, or the queries start <= query <
    stop, between which key <= query + reach holds; reach is UNLIMITED without a diagonal. A tile is
    (start, stop, run). Queries are counted from the first one, keys from row 0."""

    query_rows: tuple[int, int]
    segment_T: torch.Tensor
    position_T: torch.Tensor
    relation_SS: torch.Tensor
    group_S: torch.Tensor
    need_T: torch.Tensor
    pairs: tuple[tuple[int, int], ...]
    tables: torch.Tensor
    places: torch.Tensor

    @property
    def queries(self) -> int:
        return self.query_rows[1] - self.query_rows[0]

    @property
    def keys(self) -> int:
        return len(self.segment_T)

    @cached_property
    def cache(self) -> dict[str, Any]:
        """What a backend derives from the plan, kept as long as the plan."""
        return {}

    @property
    def visible_pairs(self) -> int:
        return sum(count for _, count in self.pairs)

    def flops(self, heads: int, dim: int) -> tuple[int, int]:
        """Floating-point operations (forward, backward) of one layer; a multiply-add is 2. Forward:
        2 products a pair."""
        each = 2 * heads * dim
        return 2 * each * self.visible_pairs, each * sum(
            products * count for products, count in self.pairs
        )

    def table(self, name: str) -> np.ndarray:
        """int32 [n, 3] (*_of_run: [R + 1]) on the host: the table of that name."""
        start, stop = self.places[TABLES.index(name)].tolist()
        table = self.tables[start:stop].cpu().numpy()
        return table if name.endswith("_of_run") else table.reshape(-1, 3)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """The plan on another device: one copy of one tensor, asynchronous to a GPU."""
        if self.tables.device == torch.device(device):
            return self
        tables = (
            self.tables.pin_memory()
            if torch.device(device).type == "cuda" and not self.tables.is_pinned()
            else self.tables
        )
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return AttentionPlan(**fields | {"tables": tables.to(device, non_blocking=True)})

    def visible(self) -> torch.Tensor:
        """bool [Q, K]: the dense mask, on the plan's device; for the reference and for tests."""
        start, stop = self.query_rows
        segment, position, relation_SS = (
            x.to(self.tables.device)
            for x in (self.segment_T.long(), self.position_T, self.relation_SS)
        )
        relation = relation_SS[segment[start:stop]][:, segment]
        return (relation == FULL) | (
            (relation == CAUSAL) & (position[start:stop, None] >= position[None, :])
        )


def build_plan(
    segment_T: np.ndarray,
    position_T: np.ndarray,
    relation_SS: np.ndarray,
    group_S: np.ndarray,
    query_rows: tuple[int, int],
    need_T: np.ndarray | None = None,
) -> AttentionPlan:
    """Builds the plan on the host. `need_T` defaults to every row needing a gradient; see
    AttentionPlan for the rest."""
    start, stop = query_rows
    rows = len(segment_T)
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"query_rows {query_rows} do not lie within the {rows} key rows.")
    if rows > MOST_ROWS:
        raise ValueError(f"A plan holds at most {MOST_ROWS} rows, got {rows}.")
    if (relation_SS[group_S[:, None] != group_S[None, :]] != NONE).any():
        raise ValueError(
            "relation_SS shows segments of one group to another; samples never see each other."
        )
    need_T = np.ones(rows, dtype=bool) if need_T is None else need_T
    runs = _Runs.of(segment_T, position_T, relation_SS, query_rows, need_T)
    pairs = _Pairs.of(runs, relation_SS)
    query_needs, key_needs = runs.need[pairs.query], runs.need[pairs.key]
    counts = [
        (products, int(pairs.visible[chosen].sum()))
        for products, chosen in (
            (5, query_needs & key_needs),
            (3, query_needs & ~key_needs),
            (0, ~query_needs),
        )
    ]

    queries, first, last = runs.is_query, runs.start - start, runs.stop - start
    tables = _ranges(
        "keys",
        pairs.query,
        runs.start[pairs.key],
        runs.stop[pairs.key],
        pairs.reach,
        len(runs.start),
    )
    constant = pairs.only(query_needs & ~key_needs)
    tables |= _ranges(
        "constant_keys",
        constant.query,
        runs.start[constant.key],
        runs.stop[constant.key],
        constant.reach,
        len(runs.start),
    )
    live = pairs.only(query_needs & key_needs).transposed()
    tables |= _ranges(
        "queries", live.key, first[live.query], last[live.query], live.reach, len(runs.start)
    )

    work = [np.bincount(part.query, part.visible, len(runs.start)) for part in (pairs, constant)]
    work_of_key = np.bincount(live.key, live.visible, len(runs.start))
    tables |= _tiles("query_tiles", first, last, queries, work[0])
    tables |= _tiles("live_query_tiles", first, last, queries & runs.need, work[0])
    tables |= _tiles("mixed_query_tiles", first, last, queries & (work[1] > 0), work[1])
    tables |= _tiles("live_key_tiles", runs.start, runs.stop, work_of_key > 0, work_of_key)
    flat, places = _flatten(tables)
    columns = (
        segment_T.astype(np.int32),
        position_T.astype(np.int32),
        relation_SS,
        group_S.astype(np.int64),
        need_T,
    )
    return AttentionPlan(
        tuple(query_rows),
        *(torch.from_numpy(np.ascontiguousarray(column)) for column in columns),
        tuple(counts),
        torch.from_numpy(flat),
        torch.from_numpy(places),
    )


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs in the order of their rows: first and past-the-end row, segment, position of the first
    row, need, whether they query."""

    start: np.ndarray
    stop: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    need: np.ndarray
    is_query: np.ndarray

    @classmethod
    def of(
        cls,
        segment_T: np.ndarray,
        position_T: np.ndarray,
        relation_SS: np.ndarray,
        query_rows: tuple[int, int],
        need_T: np.ndarray,
    ) -> "_Runs":
        rows = len(segment_T)
        ordered_S = (relation_SS == CAUSAL).any(axis=0) | (relation_SS == CAUSAL).any(axis=1)
        begins = np.ones(rows + 1, dtype=bool)
        if rows > 1:
            jump = (np.diff(position_T) != 1) & ordered_S[segment_T[1:]]
            begins[1:-1] = (segment_T[1:] != segment_T[:-1]) | (need_T[1:] != need_T[:-1]) | jump
        begins[list(query_rows)] = True
        edges = np.flatnonzero(begins)
        start, stop = edges[:-1], edges[1:]
        is_query = (start >= query_rows[0]) & (stop <= query_rows[1])
        return cls(start, stop, segment_T[start], position_T[start], need_T[start], is_query)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of a run of queries and a run of keys that it sees: the reach (see AttentionPlan) and
    the number of visible pairs of rows."""

    query: np.ndarray
    key: np.ndarray
    reach: np.ndarray
    visible: np.ndarray

    @classmethod
    def of(cls, runs: _Runs, relation_SS: np.ndarray) -> "_Pairs":
        query_runs = np.flatnonzero(runs.is_query)
        relation = relation_SS[runs.segment[query_runs][:, None], runs.segment[None, :]]
        query, key = np.nonzero(relation)
        causal, query = relation[query, key] == CAUSAL, query_runs[query]
        rows, keys = (runs.stop - runs.start)[query], (runs.stop - runs.start)[key]
        lead = runs.position[query] - runs.position[key]
        visible = rows * keys
        visible[causal] = _staircase(lead[causal], rows[causal], keys[causal])
        # A run of keys that lies wholly before a run of queries has no diagonal.
        causal &= lead < keys - 1
        first_query = runs.start[query_runs[0]] if len(query_runs) else 0
        reach = np.where(
            causal, lead - (runs.start[query] - first_query) + runs.start[key], UNLIMITED
        )
        return cls(query, key, reach, visible).only(visible > 0)

    def only(self, chosen: np.ndarray) -> "_Pairs":
        return _Pairs(
            self.query[chosen], self.key[chosen], self.reach[chosen], self.visible[chosen]
        )

    def transposed(self) -> "_Pairs":
        """The same pairs, sorted by key."""
        return self.only(np.argsort(self.key, kind="stable"))


def _staircase(lead: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Visible pairs of a causal block whose query i = 0 .. rows - 1 sees min(keys, max(0, lead + i
    + 1)) keys."""
    rising = np.clip(np.minimum(rows, keys - lead - 1), 0, None)
    skipped = np.clip(-lead, 0, rising)
    steps = rising - skipped
    return steps * (2 * lead + rising + skipped + 1) // 2 + (rows - rising) * keys


def _ranges(
    name: str, run: np.ndarray, start: np.ndarray, stop: np.ndarray, reach: np.ndarray, runs: int
) -> dict[str, np.ndarray]:
    """The two tables of a list of ranges, given by the run that they belong to, sorted by it and
    then by start.

    Neighbours that are seen alike become one range."""
    follows = np.zeros(len(run), dtype=bool)
    follows[1:] = (run[1:] == run[:-1]) & (start[1:] == stop[:-1]) & (reach[1:] == reach[:-1])
    first = np.flatnonzero(~follows)
    run, start, reach = run[first], start[first], reach[first]
    stop = stop[np.append(first[1:], len(follows)) - 1] if len(first) else stop
    return {
        name: np.stack([start, stop, reach], axis=1),
        f"{name}_of_run": np.append(0, np.cumsum(np.bincount(run, minlength=runs))),
    }


def _tiles(
    name: str, first: np.ndarray, last: np.ndarray, chosen: np.ndarray, work: np.ndarray
) -> dict[str, np.ndarray]:
    """Tiles of the chosen runs for each size, most visible pairs first. `work` counts the pairs of
    a whole run."""
    run = np.flatnonzero(chosen)
    length = last[run] - first[run]
    density = work[run] / length
    tables = {}
    for size in TILES:
        count = -(-length // size)
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        start = np.repeat(first[run], count) + number * size
        stop = np.minimum(start + size, np.repeat(last[run], count))
        order = np.argsort(-(stop - start) * np.repeat(density, count), kind="stable")
        tables[f"{name}_{size}"] = np.stack([start, stop, np.repeat(run, count)], axis=1)[order]
    return tables


def _flatten(tables: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All tables behind each other as int32, and their places. A kernel may read one range past the
    last."""
    places, offset = np.zeros((len(TABLES), 2), dtype=np.int64), 0
    for number, name in enumerate(TABLES):
        places[number] = offset, offset + tables[name].size
        offset += -(-tables[name].size // ALIGNMENT) * ALIGNMENT
    flat = np.zeros(offset + ALIGNMENT, dtype=np.int32)
    for name, (start, stop) in zip(TABLES, places):
        flat[start:stop] = tables[name].reshape(-1)
    return flat, places
