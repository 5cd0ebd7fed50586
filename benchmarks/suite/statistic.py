"""Ratios of step times that were measured in pairs, with their interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL, RESAMPLES = 0.95, 4000


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """{median, low, high, level, of_totals, pairs} of above / below, which were measured in the
    same rounds.

    median: of the ratios of each round, so that neither drift nor one slow step moves it. low,
    high: percentile bootstrap of that median over rounds, widened for few rounds by sqrt(n / (n -
    1)); null below three. of_totals: of the sums."""
    count = min(len(above), len(below))
    pairs = np.array(above[:count]) / np.array(below[:count])
    low = high = None
    if count >= 3:
        drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
        medians = np.median(pairs[drawn], axis=1)
        middle, widened = np.median(pairs), (count / (count - 1)) ** 0.5
        low, high = (
            float(middle + widened * (edge - middle))
            for edge in np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        )
    return {
        "median": float(np.median(pairs)),
        "low": low,
        "high": high,
        "level": LEVEL,
        "of_totals": float(np.sum(above[:count]) / np.sum(below[:count])),
        "pairs": count,
    }
