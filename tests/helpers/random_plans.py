"""Random packed batches for the tests of attention.

Apart from the other helpers: tests on a GPU run where hypothesis may not be installed."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan, build_plan

LENGTHS = (0, 1, 2, 3, 5, 13, 31, 37, 64, 67, 127, 128, 129)


@st.composite
def packed_plans(
    draw: Callable, most_rows: int = 200, lengths: tuple[int, ...] = LENGTHS
) -> AttentionPlan:
    """Samples of segments in slab order. A segment may lie in two slabs, each part with or without
    need; relations are those of packed samples, or wholly arbitrary; queries are all rows, a slab,
    or any stretch of rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    length, sample = [], []
    for number in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 4))):
            part = draw(st.sampled_from(lengths))
            if sum(length) + part <= most_rows:
                length.append(part)
                sample.append(number)
    length, sample = np.array(length, dtype=np.int64), np.array(sample, dtype=np.int64)
    segments = len(length)
    causal = rng.random(segments) < 0.5
    if draw(st.booleans()):
        relation = np.where(rng.random((segments, segments)) < 0.7, FULL, NONE) * np.tri(
            segments, k=-1, dtype=np.int64
        )
        relation[np.arange(segments), np.arange(segments)] = np.where(causal, CAUSAL, FULL)
    else:
        relation = rng.choice([NONE, FULL, CAUSAL], size=(segments, segments))
    relation = np.where(sample[:, None] == sample, relation, NONE).astype(np.int8)
    segment = np.repeat(np.arange(segments), length)
    position = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, length)])
    inner = ~causal[segment] & (position > 0) & (position < length[segment] - 1)
    slab = np.where(inner, 2, rng.integers(0, 2, segments)[segment])
    order = np.argsort(slab, kind="stable")
    need = (rng.random((segments, 3)) < rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.6, 0.3]))[
        segment, slab
    ][order]
    rows = len(segment)
    kind = draw(st.sampled_from(["all", "slab", "any"]))
    query_rows = (
        (0, rows)
        if kind == "all"
        else (int((slab == 0).sum()), rows)
        if kind == "slab"
        else tuple(sorted(rng.integers(0, rows + 1, 2).tolist()))
    )
    return build_plan(segment[order], position[order], relation, sample, query_rows, need)
