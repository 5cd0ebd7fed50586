"""The attention plan: visibility as ranges of rows, built once per batch on the host and read by
every backend.

A RUN is a sequence of neighbouring rows of one segment that see the same rows, are seen by the same
rows and all need a gradient or all need none. A batch is sorted into slabs, so that one segment may
be several runs. A run of queries sees a few RANGES of keys, whatever the number of tokens; TILES
are the pieces of a run that one program computes. Nothing here has the size tokens x tokens.

Shape suffixes: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import Any, TypeVar

import numpy as np
import torch

from uno_ds.kernels.transfer import OnTensor, map_tensors, upload, with_index

T = TypeVar("T")

NONE, FULL, CAUSAL = 0, 1, 2
# Matrix products of backward for a pair of a live query and a live key, or a constant key.
LIVE_PRODUCTS, CONSTANT_KEY_PRODUCTS = 5, 3
TILES = (32, 64, 128)
# The `reach` of a range without a diagonal: every query reaches every key of it.
UNLIMITED = 2**30
# Row numbers plus a reach have to fit into 32 bits.
MOST_ROWS = 2**29
LISTS = ("keys", "constant_keys", "queries")
TILED = ("query_tiles", "live_query_tiles", "mixed_query_tiles", "live_key_tiles")
TABLES = (
    *chain.from_iterable((ranges, f"{ranges}_of_run") for ranges in LISTS),
    *(f"{name}_{size}" for name, size in product(TILED, TILES)),
)
# Tables begin at multiples of 16 bytes, so that a kernel is not compiled again because a pointer's
# alignment differs.
ALIGNMENT = 4


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Visibility of a range of query rows over all key rows, and which rows need a gradient.

    A query sees a key if `relation_SS` of their segments is FULL, or if it is CAUSAL and the key's
    position within the segment is not after the query's. Segments of different groups (samples)
    never see each other. A query without need is a constant: it adds to no gradient. A key without
    need gets a gradient of 0.

    query_rows            first and past-the-end row of the queries among the key rows
    segment_T, position_T int32 [T]: segment of each row, and its place within the segment; these
                          and the next three stay on the host
    relation_SS           int8 [S, S]
    group_S               int64 [S]: sample of each segment
    need_T                bool [T]: rows that need a gradient
    pairs                 (matrix products that backward computes for a pair, visible (query, key)
                          pairs with that number)
    tables                int32: all tables, concatenated, on the plan's device:
        keys, constant_keys    [n, 3] ranges of rows that a run of queries with need sees (`keys`:
                               any run): all, and those without need
        queries                [n, 3] ranges of queries with need that see a run of keys with need
        *_of_run               [runs + 1] first range of each run, and the number of ranges
        query_tiles_N          [n, 3] tiles of at most N queries, most pairs first; live_: of
                               queries with need; mixed_: of those that see a key without need
        live_key_tiles_N       of keys with need that a query with need sees
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
        """Data that a backend derives from the plan; lives as long as the plan."""
        return {}

    def derived(self, name: str, build: Callable[[], T]) -> T:
        """What a backend derives from the plan (tensors, tuples and dataclasses of them): built on
        the host when it is first asked for, kept on the plan's device, and copied with the plan."""
        if name not in self.cache:
            device = self.tables.device
            self.cache[name] = map_tensors(build(), lambda tensor: upload(tensor, device))
        found: T = self.cache[name]
        return found

    @property
    def visible_pairs(self) -> int:
        return sum(count for _, count in self.pairs)

    def flops(self, heads: int, dim: int) -> tuple[int, int]:
        """Floating-point operations (forward, backward) of one layer; a multiply-add is 2. Forward:
        2 products a pair."""
        flops_of_product = 2 * heads * dim
        backward_products = sum(products * count for products, count in self.pairs)
        return flops_of_product * 2 * self.visible_pairs, flops_of_product * backward_products

    def table(self, name: str) -> np.ndarray:
        """int32 [n, 3] (*_of_run: [runs + 1]) on the host: the table of that name."""
        start, stop = self.places.numpy()[TABLES.index(name)]
        table = self.tables[start:stop].cpu().numpy()
        return table if name.endswith("_of_run") else table.reshape(-1, 3)

    def map_tensors(self, function: OnTensor) -> "AttentionPlan":
        """The plan with `function` of its tables, and of what backends derived from it."""
        tables = function(self.tables)
        derived = {
            name: map_tensors(value, function)
            for name, value in self.cache.items()
            if value is None or isinstance(value, (torch.Tensor, tuple)) or is_dataclass(value)
        }
        if tables is self.tables:
            return self
        moved = replace(self, tables=tables)
        moved.cache.update(derived)
        return moved

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """The plan on another device, with what backends derived from it: asynchronous copies from
        page-locked memory to a GPU."""
        place = with_index(device)
        return self.map_tensors(lambda tensor: upload(tensor, place))

    def visible(self) -> torch.Tensor:
        """bool [Q, T]: the dense mask, on the plan's device; for the reference and for tests."""
        columns = self.derived("columns", lambda: Columns.of(self))
        relation_QT = columns.relation_SS[columns.segment_Q][:, columns.segment_T]
        not_after_QT = columns.position_Q[:, None] >= columns.position_T[None, :]
        return (relation_QT == FULL) | ((relation_QT == CAUSAL) & not_after_QT)


@dataclass(frozen=True, eq=False)
class Columns:
    """Segment (int64) and position of the queries and of the keys, and the relation of segments."""

    segment_Q: torch.Tensor
    position_Q: torch.Tensor
    segment_T: torch.Tensor
    position_T: torch.Tensor
    relation_SS: torch.Tensor

    @classmethod
    def of(cls, plan: AttentionPlan) -> "Columns":
        queries = slice(*plan.query_rows)
        segment_T = plan.segment_T.long()
        return cls(
            segment_Q=segment_T[queries],
            position_Q=plan.position_T[queries],
            segment_T=segment_T,
            position_T=plan.position_T,
            relation_SS=plan.relation_SS,
        )


def build_plan(
    segment_T: np.ndarray,
    position_T: np.ndarray,
    relation_SS: np.ndarray,
    group_S: np.ndarray,
    query_rows: tuple[int, int],
    need_T: np.ndarray | None = None,
) -> AttentionPlan:
    """Builds the plan on the host. `need_T`: by default every row needs a gradient; see
    AttentionPlan for the rest. Raises ValueError for arguments that do not fit each other."""
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
    query_needs = runs.need[pairs.query]
    key_needs = runs.need[pairs.key]
    live = pairs.only(query_needs & key_needs)
    of_constant_keys = pairs.only(query_needs & ~key_needs)
    of_constant_queries = pairs.only(~query_needs)
    pairs_by_products = (
        (LIVE_PRODUCTS, live.count),
        (CONSTANT_KEY_PRODUCTS, of_constant_keys.count),
        (0, of_constant_queries.count),
    )
    flat, places = _flatten(_tables(runs, pairs, of_constant_keys, live.transposed(), start))
    return AttentionPlan(
        query_rows=(start, stop),
        segment_T=_tensor(segment_T.astype(np.int32)),
        position_T=_tensor(position_T.astype(np.int32)),
        relation_SS=_tensor(relation_SS),
        group_S=_tensor(group_S.astype(np.int64)),
        need_T=_tensor(need_T),
        pairs=pairs_by_products,
        tables=torch.from_numpy(flat),
        places=torch.from_numpy(places),
    )


def _tensor(column: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))


def _tables(
    runs: "_Runs",
    pairs: "_Pairs",
    of_constant_keys: "_Pairs",
    live_by_key: "_Pairs",
    first_query: int,
) -> dict[str, np.ndarray]:
    """All tables of a plan by name, see AttentionPlan."""
    count = len(runs.start)
    tables: dict[str, np.ndarray] = {}
    for name, part in (("keys", pairs), ("constant_keys", of_constant_keys)):
        start, stop = runs.start[part.key], runs.stop[part.key]
        tables |= _ranges(name, part.query, start, stop, part.reach, count)
    # Queries are counted from the first one.
    first, last = runs.start - first_query, runs.stop - first_query
    start, stop = first[live_by_key.query], last[live_by_key.query]
    tables |= _ranges("queries", live_by_key.key, start, stop, live_by_key.reach, count)

    work = np.bincount(pairs.query, pairs.visible, count)
    constant_work = np.bincount(of_constant_keys.query, of_constant_keys.visible, count)
    work_of_keys = np.bincount(live_by_key.key, live_by_key.visible, count)
    mixed = runs.is_query & (constant_work > 0)
    tables |= _tiles("query_tiles", first, last, runs.is_query, work)
    tables |= _tiles("live_query_tiles", first, last, runs.is_query & runs.need, work)
    tables |= _tiles("mixed_query_tiles", first, last, mixed, constant_work)
    tables |= _tiles("live_key_tiles", runs.start, runs.stop, work_of_keys > 0, work_of_keys)
    return tables


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs in the order of their rows: first and past-the-end row, segment, position of the first
    row, need of a gradient, whether they are queries."""

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
        causal_SS = relation_SS == CAUSAL
        ordered_S = causal_SS.any(axis=0) | causal_SS.any(axis=1)
        begins = np.ones(rows + 1, dtype=bool)
        if rows > 1:
            other_segment = segment_T[1:] != segment_T[:-1]
            other_need = need_T[1:] != need_T[:-1]
            position_jumps = (np.diff(position_T) != 1) & ordered_S[segment_T[1:]]
            begins[1:-1] = other_segment | other_need | position_jumps
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
        number, key = np.nonzero(relation)
        causal = relation[number, key] == CAUSAL
        query = query_runs[number]
        lengths = runs.stop - runs.start
        rows, keys = lengths[query], lengths[key]
        lead = runs.position[query] - runs.position[key]
        visible = rows * keys
        visible[causal] = _staircase(lead[causal], rows[causal], keys[causal])
        # A run of keys that lies wholly before a run of queries has no diagonal.
        causal &= lead < keys - 1
        first_query = runs.start[query_runs[0]] if len(query_runs) else 0
        diagonal = lead - (runs.start[query] - first_query) + runs.start[key]
        reach = np.where(causal, diagonal, UNLIMITED)
        return cls(query, key, reach, visible).only(visible > 0)

    @property
    def count(self) -> int:
        """Visible pairs of rows."""
        return int(self.visible.sum())

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
    """The two tables of a list of ranges, given with the run that each belongs to and sorted by it,
    then by start.

    Adjacent ranges of one run and reach become one range."""
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
    """Tiles of the chosen runs for each size, most visible pairs first. `work`: pairs of each
    run."""
    run = np.flatnonzero(chosen)
    length = last[run] - first[run]
    density = work[run] / length
    tables = {}
    for size in TILES:
        count = -(-length // size)
        tile_in_run = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        start = np.repeat(first[run], count) + tile_in_run * size
        stop = np.minimum(start + size, np.repeat(last[run], count))
        pairs = (stop - start) * np.repeat(density, count)
        order = np.argsort(-pairs, kind="stable")
        tiles = np.stack([start, stop, np.repeat(run, count)], axis=1)
        tables[f"{name}_{size}"] = tiles[order]
    return tables


def _flatten(tables: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All tables concatenated as int32, and their places. A kernel may read one range past the
    last."""
    places = np.zeros((len(TABLES), 2), dtype=np.int64)
    offset = 0
    for number, name in enumerate(TABLES):
        size = tables[name].size
        places[number] = offset, offset + size
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    flat = np.zeros(offset + ALIGNMENT, dtype=np.int32)
    for name, (start, stop) in zip(TABLES, places):
        flat[start:stop] = tables[name].reshape(-1)
    return flat, places
