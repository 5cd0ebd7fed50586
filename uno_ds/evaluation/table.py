"""Scores of prompts, their means, and how sure the means are.

A column of a table is a ratio of sums: over prompts, of what was reached, divided by how much was
counted. A headline is the mean of one or more columns, as most benchmarks define their overall
score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

RESAMPLES = 2000
SEED = 20_260_501
LEVEL = 0.95
# Resamples that are held at once are as many weights of prompts.
LARGEST_BLOCK = 4_000_000


@dataclass
class Row:
    """Scores of one prompt. `values`: {column: (sum, count)}. `stratum`: prompts of one stratum are
    resampled among themselves."""

    key: str
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    stratum: str = ""
    prompt: str = ""
    group: str = ""
    images: list[str] = field(default_factory=list)

    def add(self, column: str, value: float) -> None:
        """Counts one more value of a column."""
        total, count = self.values.get(column, (0.0, 0.0))
        self.values[column] = (total + value, count + 1)

    def score(self, columns: Sequence[str]) -> float | None:
        """The prompt's own mean over those of `columns` that it has."""
        pairs = [self.values[name] for name in columns if name in self.values]
        total = sum(pair[0] for pair in pairs)
        count = sum(pair[1] for pair in pairs)
        return total / count if count else None

    def plain(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "values": {name: list(pair) for name, pair in self.values.items()},
            "stratum": self.stratum,
            "prompt": self.prompt,
            "group": self.group,
            "images": self.images,
        }


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval of 95 %; without an interval where there are fewer than two
    prompts."""

    value: float
    low: float | None = None
    high: float | None = None

    def plain(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


class Table:
    """Rows as arrays. `headlines`: {name: columns whose means are averaged}; the first is the
    overall score."""

    def __init__(self, rows: Sequence[Row], headlines: Mapping[str, Sequence[str]]):
        self.rows = list(rows)
        self.keys = [row.key for row in rows]
        self.strata = [row.stratum for row in rows]
        self.columns = list(dict.fromkeys(chain.from_iterable(row.values for row in rows)))
        self.headlines = {name: list(columns) for name, columns in headlines.items()}
        place = {name: index for index, name in enumerate(self.columns)}
        # [prompts, columns]
        self.sums = np.zeros((len(rows), len(self.columns)))
        self.counts = np.zeros_like(self.sums)
        for number, row in enumerate(rows):
            for name, (total, count) in row.values.items():
                self.sums[number, place[name]] = total
                self.counts[number, place[name]] = count

    @property
    def overall_columns(self) -> list[str]:
        return next(iter(self.headlines.values()))

    def names(self) -> list[str]:
        """Headlines, then the columns that are not themselves one."""
        return [*self.headlines, *(name for name in self.columns if name not in self.headlines)]

    def means(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[resamples, names]: every headline and column. `weights` [resamples, prompts]: how often
        each prompt counts; None: once. NaN where nothing was counted."""
        if weights is None:
            weights = np.ones((1, len(self.rows)))
        counts = weights @ self.counts
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (weights @ self.sums) / counts
        means[counts == 0] = np.nan
        place = {name: index for index, name in enumerate(self.columns)}
        parts = []
        for name in self.names():
            members = [place[column] for column in self.headlines.get(name, [name])]
            parts.append(means[:, members].mean(axis=1))
        return np.stack(parts, axis=1)

    def estimates(self) -> dict[str, Estimate]:
        """Every headline and column with its bootstrap interval over prompts."""
        values = self.means()[0]
        if len(self.rows) < 2:
            return {
                name: Estimate(float(value))
                for name, value in zip(self.names(), values, strict=True)
                if np.isfinite(value)
            }
        sampled = self.resampled(np.random.default_rng(SEED))
        return _estimates(self.names(), values, sampled)

    def resampled(self, rng: np.random.Generator, strata: Sequence[str] | None = None):
        """[RESAMPLES, names]: means over prompts drawn with replacement within their stratum."""
        blocks = []
        step = max(1, LARGEST_BLOCK // max(1, len(self.rows)))
        for start in range(0, RESAMPLES, step):
            count = min(step, RESAMPLES - start)
            weights = _weights(rng, strata or self.strata, count)
            blocks.append(self.means(weights))
        return np.concatenate(blocks)

    def only(self, keys: Sequence[str]) -> "Table":
        """The rows of these keys, in their order."""
        by_key = {row.key: row for row in self.rows}
        return Table([by_key[key] for key in keys], self.headlines)


def differences(first: Table, second: Table) -> dict[str, Estimate]:
    """second - first, over the prompts that both have, with intervals from the same resamples of
    prompts. Equal tables give 0 with the interval [0, 0]."""
    keys = [key for key in first.keys if key in set(second.keys)]
    ours, theirs = first.only(keys), second.only(keys)
    names = [name for name in ours.names() if name in theirs.names()]
    if len(keys) < 2 or not names:
        return {}
    columns = [[table.names().index(name) for name in names] for table in (ours, theirs)]
    values = theirs.means()[0][columns[1]] - ours.means()[0][columns[0]]
    sampled = [
        table.resampled(np.random.default_rng(SEED), ours.strata) for table in (ours, theirs)
    ]
    gaps = sampled[1][:, columns[1]] - sampled[0][:, columns[0]]
    return _estimates(names, values, gaps)


def _estimates(
    names: Sequence[str], values: np.ndarray, sampled: np.ndarray
) -> dict[str, Estimate]:
    found = {}
    for number, name in enumerate(names):
        draws = sampled[:, number]
        draws = draws[np.isfinite(draws)]
        if not np.isfinite(values[number]) or not len(draws):
            continue
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = Estimate(float(values[number]), float(low), float(high))
    return found


def _weights(rng: np.random.Generator, strata: Sequence[str], count: int) -> np.ndarray:
    """[count, prompts]: how often each prompt is in each resample."""
    weights = np.zeros((count, len(strata)))
    members: dict[str, list[int]] = {}
    for number, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(number)
    for numbers in members.values():
        size = len(numbers)
        weights[:, numbers] = rng.multinomial(size, np.full(size, 1 / size), size=count)
    return weights
