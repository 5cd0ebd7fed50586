"""A measurement of every mode on a small model, for the tests of the benchmarks."""

import copy
import functools
import itertools
import math
from typing import Any

import torch
from tiny import SPECIAL, recipe

from benchmarks.suite.limits import CPU_RATIOS
from benchmarks.suite.measure import Comparison, GraphStage, run_rounds
from benchmarks.suite.models import build_objective
from benchmarks.suite.packs import DEFAULT_MODES, drawn_samples, settled
from benchmarks.suite.results import new_result
from uno_ds.cost.scenario import Scenario

PACK = Scenario(prompt=12, latents=36, caption=14, metaqueries=4, samples=4)


def compared(modes: list[str], rounds: int, splits: int = 0) -> Comparison:
    settings = settled(recipe(), PACK)
    device = torch.device("cpu")
    objective = build_objective(settings, device, torch.float32, random=True)
    stage = GraphStage(settings, objective, device)
    packs = itertools.cycle([drawn_samples(settings, PACK, seed) for seed in range(2)])
    comparison = Comparison(stage, modes, packs, 1, settings.collator(SPECIAL), read_answers=False)
    comparison.prepare(warmup=1)
    run_rounds(comparison, rounds, splits, math.inf, lambda: None)
    return comparison


@functools.cache
def measured() -> dict[str, Any]:
    """The measurement, made once for all tests; not to be changed."""
    return {
        "name": "small",
        "stage": "graph",
        "skipped": None,
        "device": "cpu",
        "precision": "fp32",
        "ranks": 1,
        "layers": 2,
        "weights": "random",
        **compared(list(DEFAULT_MODES), rounds=4, splits=2).plain(),
    }


def overhead_result() -> dict[str, Any]:
    """A result with the measurement, as a copy of its own."""
    result = new_result("overhead", {"name": "small"})
    result["measurements"] = [copy.deepcopy(measured())]
    result["unknown"] = [CPU_RATIOS]
    return result
