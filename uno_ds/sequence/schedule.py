"""When understanding losses count: until which step of a run, and how much at which noise level."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uno_ds.settings import SettingsError, printable

# [t, weight] pairs; none: the weight is 1 at every t.
WeightByT = Sequence[Sequence[float]]


@dataclass(frozen=True)
class SupervisionSchedule:
    """Steps count from 1. `last_step`: the last one whose samples have captions and metaqueries.
    `cosine`: the weight of their losses falls from 1 at the first step to 0 at the step after the
    last one, and is 1 throughout otherwise."""

    last_step: int
    cosine: bool = False

    def weight(self, step: int) -> float:
        """Factor of the weights of the understanding losses; 0 after the last step."""
        if step > self.last_step:
            return 0.0
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - 1) / self.last_step))


def weight_at(pairs: WeightByT, t: float) -> float:
    """Piecewise linear between the pairs, constant before the first and after the last of them."""
    if not pairs:
        return 1.0
    times, weights = zip(*pairs, strict=True)
    return float(np.interp(t, times, weights))


def largest_weight(pairs: WeightByT, low: float, high: float) -> float:
    """The largest weight at a t in [low, high]."""
    corners = [t for t, _ in pairs if low < t < high]
    return max(weight_at(pairs, t) for t in (low, *corners, high))


def check_weight_by_t(key: str, pairs: WeightByT) -> None:
    """Raises SettingsError unless the pairs are [t, weight] with rising t in [0, 1] and weights of
    at least 0, one of them above 0."""
    for pair in pairs:
        if len(pair) != 2:
            raise SettingsError(key, f"must be a list of [t, weight], got {printable(list(pair))}.")
        t, weight = pair
        if not 0 <= t <= 1:
            raise SettingsError(key, f"has t = {t:g}; noise levels are 0 (clean) to 1 (noise).")
        if not 0 <= weight <= 1e6:
            raise SettingsError(
                key, f"has the weight {weight:g} at t = {t:g}; weights are 0 to 1e+06."
            )
    for (before, _), (after, _) in zip(pairs, pairs[1:], strict=False):
        if before >= after:
            raise SettingsError(
                key,
                f"has t = {after:g} after t = {before:g}; each t must be above the one before it.",
            )
    if pairs and not any(weight for _, weight in pairs):
        raise SettingsError(key, "is 0 at every t; set the weight of the loss to 0 instead.")
