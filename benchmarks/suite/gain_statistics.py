"""Is one arm better than another: intervals over prompts and over seeds, and the verdict in words.

An interval over prompts resamples the contents of the prompts, in pairs, so that what all arms find
hard cancels; it says nothing of other runs. An interval over seeds is Student's t over the
differences of runs with the same seed, which share data, order and noise; it needs two of them. A
difference counts as shown where both exclude 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from uno_ds.evaluation.table import LEVEL, Estimate, Row, Table, differences

HEADLINES = {"all": ["all"]}
Rows = Sequence[Mapping[str, Any]]


def t_probability(value: float, degrees: int) -> float:
    """P(|T| <= value) of Student's t with a whole number of degrees of freedom (Abramowitz and
    Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine_2 = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for number in range(1 + odd, degrees, 2):
        total += term
        term *= cosine_2 * number / (number + 1)
    partial = math.sin(angle) * total
    return 2 / math.pi * (angle + partial) if odd else partial


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The value that |T| stays below with probability `level`."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean with its interval; without an interval for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


def table_of(runs: Sequence[Rows]) -> Table:
    """A table with a row for each content that was asked for, over all its pictures of all runs, by
    kind of scene as stratum, and columns of each kind where there are several. `runs`: the rows of
    one measurement each."""
    found: dict[str, Row] = {}
    kinds = {plain["kind"] for plain in chain.from_iterable(runs)}
    for rows in runs:
        for plain in rows:
            row = found.setdefault(
                plain["content"], Row(plain["content"], stratum=plain["kind"], group=plain["kind"])
            )
            for column, value in plain["right"].items():
                row.add(column, 100.0 * value)
                if len(kinds) > 1:
                    row.add(f"{column}, {plain['kind']}", 100.0 * value)
    return Table(list(found.values()), HEADLINES)


@dataclass(frozen=True)
class Comparison:
    """Of an arm with the baseline, in percentage points: over_prompts and over_seeds by column;
    by_seed: the difference of `all` in each pair of runs."""

    arm: str
    at: str
    seeds: list[int]
    over_prompts: dict[str, Estimate]
    over_seeds: dict[str, Estimate]
    by_seed: list[float]
    verdict: str

    def plain(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "at": self.at,
            "seeds": self.seeds,
            "over_prompts": {name: value.plain() for name, value in self.over_prompts.items()},
            "over_seeds": {name: value.plain() for name, value in self.over_seeds.items()},
            "by_seed": self.by_seed,
            "verdict": self.verdict,
        }


def compare(
    arm: str, baseline: str, at: str, runs: Mapping[int, Rows], base_runs: Mapping[int, Rows]
) -> Comparison | None:
    """Over the seeds that both have; None without one. `at`: words for where, such as "at equal
    steps"."""
    seeds = sorted(set(runs) & set(base_runs))
    if not seeds:
        return None
    ours = table_of([runs[seed] for seed in seeds])
    theirs = table_of([base_runs[seed] for seed in seeds])
    over_prompts = differences(theirs, ours)
    gaps: dict[str, list[float]] = {}
    for seed in seeds:
        first, second = table_of([base_runs[seed]]), table_of([runs[seed]])
        names = [name for name in first.names() if name in second.names()]
        for name in names:
            gap = _value(second, name) - _value(first, name)
            gaps.setdefault(name, []).append(gap)
    over_seeds = {name: t_interval(values) for name, values in gaps.items()}
    return Comparison(
        arm,
        at,
        seeds,
        over_prompts,
        over_seeds,
        gaps["all"],
        verdict(arm, baseline, at, over_prompts["all"], over_seeds["all"], len(seeds)),
    )


def verdict(
    arm: str, baseline: str, at: str, prompts: Estimate, seeds: Estimate, count: int
) -> str:
    """One or two sentences."""
    if seeds.low is None:
        shown = f"{_points(prompts)} over prompts"
        return (
            f"{arm} against {baseline} {at}: {shown}, in one run each. One run shows no difference "
            "between methods, however narrow this interval is."
        )
    intervals = f"{_points(seeds)} over {count} seeds, {_interval(prompts)} over prompts"
    directions = {_direction(prompts), _direction(seeds)}
    if directions == {1}:
        return f"{arm} is better than {baseline} {at}: {intervals}."
    if directions == {-1}:
        return f"{arm} is worse than {baseline} {at}: {intervals}."
    return f"No difference shown between {arm} and {baseline} {at}: {intervals}."


def _value(table: Table, name: str) -> float:
    return float(table.means()[0][table.names().index(name)])


def _direction(estimate: Estimate) -> int:
    """1 or -1 where the interval lies on one side of 0, else 0."""
    assert estimate.low is not None and estimate.high is not None, "both have an interval"
    if estimate.low > 0:
        return 1
    return -1 if estimate.high < 0 else 0


def _points(estimate: Estimate) -> str:
    text = f"{estimate.value:+.1f} points"
    return text if estimate.low is None else f"{text} {_interval(estimate)}"


def _interval(estimate: Estimate) -> str:
    return f"[{estimate.low:+.1f}, {estimate.high:+.1f}]"
