"""The visible part of the mask as rectangles of queries and keys, from which backends build what
they need on the host."""

import numpy as np

from uno_ds.kernels.plan import TILES, UNLIMITED, AttentionPlan


def rectangles(plan: AttentionPlan) -> np.ndarray:
    """int64 [n, 5]: first and past-the-end query, first and past-the-end key, and reach of every
    range of keys that a run of queries sees. Rectangles do not overlap."""
    tiles = plan.table(f"query_tiles_{TILES[-1]}")
    ranges_of_run = plan.table("keys_of_run")
    ranges = plan.table("keys")
    runs = len(ranges_of_run) - 1
    first = np.full(runs, UNLIMITED, dtype=np.int64)
    end = np.zeros(runs, dtype=np.int64)
    np.minimum.at(first, tiles[:, 2], tiles[:, 0])
    np.maximum.at(end, tiles[:, 2], tiles[:, 1])
    run = np.repeat(np.arange(runs), np.diff(ranges_of_run))
    return np.column_stack([first[run], end[run], ranges])[end[run] > 0]
