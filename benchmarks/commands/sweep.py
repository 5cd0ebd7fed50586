"""How UNO's overhead moves with metaqueries, caption length, image size, supervised share, noise window, and the task.

    python -m benchmarks sweep [--recipe tiny] [--rounds 6] [--seconds 60] [--json FILE]

Measured: forward and backward of flow and uno on drawn packs of the recipe's model with random weights. Modelled: the ratio of
operations of the same, and of BAGEL-7B around scenario A.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commands.overhead import CPU_RATIOS
from benchmarks.suite.measure import Comparison, GraphStage, run_rounds
from benchmarks.suite.models import DTYPES, build_objective
from benchmarks.suite.packs import SCENARIOS, as_mode, drawn_samples, settled
from benchmarks.suite.results import new_result, write_result
from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import one_line_errors
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.model.architecture import Architecture
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.sequence.segments import Sample
from uno_ds.settings import to_plain

SMALL = Scenario(prompt=20, latents=49, caption=20, metaqueries=9, samples=6)
TASKS = ("text to image", "editing")


def points(around: Scenario, small: bool) -> Iterator[tuple[str, float | str, Scenario]]:
    """(knob, value, scenario); the share of supervised samples and the window change no scenario."""
    values: dict[str, Sequence[int]] = {
        "metaqueries": (1, 4, 9, 16, 36) if small else (16, 64, 256, 576, 1024),
        "caption tokens": (5, 10, 20, 40, 80) if small else (50, 100, 200, 300, 400),
        "latent tokens": (16, 25, 36, 49, 64) if small else (256, 576, 1024, 2304, 4096),
    }
    fields = {"metaqueries": "metaqueries", "caption tokens": "caption", "latent tokens": "latents"}
    for knob, numbers in values.items():
        for number in numbers:
            yield knob, number, dataclasses.replace(around, **{fields[knob]: number})
    for knob in ("supervised share", "window of t up to"):
        for value in (0.25, 0.5, 0.75, 1.0):
            yield knob, value, around
    condition = 9 if small else 4096
    yield "task", TASKS[0], around
    yield (
        "task",
        TASKS[1],
        dataclasses.replace(
            around, vit=condition, clean=around.latents, samples=max(1, around.samples // 2)
        ),
    )


def supervised_share(recipe: Recipe, knob: str, value: float | str) -> float:
    """Expected share of samples with supervision: t is the shifted logistic of a standard normal."""
    if knob == "supervised share":
        return float(value)
    if knob != "window of t up to" or value >= 1:
        return 1.0
    shift = recipe.sequence.timestep_shift
    s = value / (shift - (shift - 1) * value)
    return statistics.NormalDist().cdf(float(np.log(s / (1 - s))))


def predicted_ratio(recipe: Recipe, shape: Architecture, scenario: Scenario, share: float) -> float:
    """Operations of UNO over those of flow matching, of samples that are supervised in this share."""
    target = min(
        shape.vit_side**2,
        round(scenario.latents * (shape.geometry.latent_stride / shape.geometry.vit_stride) ** 2),
    )
    flow = dataclasses.replace(scenario, caption=0, metaqueries=0, target=0)
    costs = [
        total(step_flops(shape, work_of(shape, pack), plan_of(recipe, read_answers=False))).total
        for pack in (dataclasses.replace(scenario, target=target), flow)
    ]
    return share * costs[0] / costs[1] + 1 - share


def partly_supervised(
    samples: list[Sample], share: float, rng: np.random.Generator
) -> list[Sample]:
    """The nearest number of samples keeps its supervision, so that a point does not depend on luck."""
    kept = set(rng.permutation(len(samples))[: round(share * len(samples))].tolist())
    return [
        sample if number in kept else as_mode([sample], "flow")[0]
        for number, sample in enumerate(samples)
    ]


def measure_point(
    recipe: Recipe,
    objective: Any,
    device: torch.device,
    scenario: Scenario,
    share: float,
    rounds: int,
    deadline: float,
) -> dict[str, Any]:
    recipe, rng = settled(recipe, scenario), np.random.default_rng(0)
    packs = [
        partly_supervised(drawn_samples(recipe, scenario, seed), share, rng) for seed in range(2)
    ]
    collate = recipe.collator(recipe.layout(None).tokens)
    comparison = Comparison(
        GraphStage(recipe, objective, device),
        ["flow", "uno"],
        itertools.cycle(packs),
        1,
        collate,
        False,
    )
    comparison.prepare(warmup=2, watch=False)
    run_rounds(comparison, rounds, 0, deadline, lambda: None)
    found = comparison.plain()
    return {
        "ratio": found["ratios"]["uno / flow"],
        "clock": found["clock"],
        "step_seconds": {mode: numbers["step_seconds"] for mode, numbers in found["modes"].items()},
    }


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    return run(options)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe, bagel = load_recipe(options.recipe, absent=[]), load_recipe("bagel_7b_uno", absent=[])
    recipe = dataclasses.replace(
        recipe, sequence=dataclasses.replace(recipe.sequence, metaquery_grid=6)
    )
    plain = to_plain(recipe)
    plain.pop("architecture")
    result = new_result("sweep", plain)
    result["unknown"] += [CPU_RATIOS] if device.type == "cpu" else []
    result["unknown"].append("The modelled ratios of BAGEL-7B are of operations, not of time.")
    for knob, value, scenario in points(SCENARIOS["A"], small=False):
        share = supervised_share(bagel, knob, value)
        result["measurements"].append(
            {
                "name": knob,
                "value": value,
                "model": "bagel_7b",
                "measured": False,
                "share": share,
                "skipped": None,
                "predicted": predicted_ratio(bagel, bagel.architecture, scenario, share),
            }
        )
    objective = build_objective(
        recipe, device, DTYPES[recipe.engine.resolved_precision()], random=True
    )
    small = list(points(SMALL, small=True))
    for number, (knob, value, scenario) in enumerate(small):
        share = supervised_share(recipe, knob, value)
        deadline = (
            started + options.seconds * (number + 1) / len(small)
            if options.seconds
            else float("inf")
        )
        samples = round(share * scenario.samples) / scenario.samples
        entry = {
            "name": knob,
            "value": value,
            "model": recipe.name,
            "measured": True,
            "share": samples,
            "scenario": dataclasses.asdict(scenario),
            "skipped": None,
            "predicted": predicted_ratio(recipe, recipe.architecture, scenario, samples),
            **measure_point(recipe, objective, device, scenario, samples, options.rounds, deadline),
        }
        result["measurements"].append(entry)
        interval = (
            ""
            if entry["ratio"]["low"] is None
            else f" [{entry['ratio']['low']:.3f}, {entry['ratio']['high']:.3f}]"
        )
        print(
            f"{knob:<20}{value!s:>16}   uno / flow {entry['ratio']['median']:.3f}{interval}, by operations {entry['predicted']:.3f}",
            flush=True,
        )
        if options.json:
            write_result(options.json, result)
    if options.json:
        write_result(options.json, result, complete=True)
        print(f"written: {options.json}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="sweep.py",
        description="Measures how UNO's overhead moves with what a recipe can choose.",
    )
    parser.add_argument(
        "--recipe",
        default="tiny",
        metavar="NAME_OR_FILE",
        help="whose model is measured, with random weights (default tiny)",
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="timed steps of each mode at each point (default 6)"
    )
    parser.add_argument(
        "--seconds", type=float, help="stop starting rounds after this time, shared by all points"
    )
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result to this file, after every point"
    )
    return parser.parse_args(arguments)
