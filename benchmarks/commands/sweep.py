"""UNO's overhead over metaqueries, caption length, image size, supervised share, window of noise
levels, and task.

    python -m benchmarks sweep [--recipe tiny] [--rounds 6] [--seconds 60] [--json FILE]

Measured: forward and backward of flow and uno on drawn packs, with the recipe's model and random
weights. Modelled: the ratio of operations of the same, and of BAGEL-7B around scenario A.
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

from benchmarks.suite.command_line import Parser
from benchmarks.suite.limits import CPU_RATIOS
from benchmarks.suite.measure import Comparison, GraphStage, run_rounds
from benchmarks.suite.models import DTYPES, build_objective
from benchmarks.suite.packs import as_mode, drawn_samples, settled
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import SCENARIOS, TINY_SCENARIO
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.model.architecture import Architecture
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.sequence.segments import Sample

SHARE = "supervised share"
WINDOW = "window of t up to"
TASK = "task"
# Field of the scenario that a choice sets, and its values for the tiny model and for BAGEL-7B.
TOKEN_CHOICES = {
    "metaqueries": ("metaqueries", (1, 4, 9, 16, 36), (16, 64, 256, 576, 1024)),
    "caption tokens": ("caption", (5, 10, 20, 40, 80), (50, 100, 200, 300, 400)),
    "latent tokens": ("latents", (16, 25, 36, 49, 64), (256, 576, 1024, 2304, 4096)),
}


def points(around: Scenario, small: bool) -> Iterator[tuple[str, float | str, Scenario]]:
    """(choice, value, scenario). The supervised share and the window change no scenario."""
    for choice, (field, small_values, large_values) in TOKEN_CHOICES.items():
        for number in small_values if small else large_values:
            yield choice, number, dataclasses.replace(around, **{field: number})
    for choice in (SHARE, WINDOW):
        for share in (0.25, 0.5, 0.75, 1.0):
            yield choice, share, around
    editing = dataclasses.replace(
        around,
        vit=9 if small else 4096,
        clean=around.latents,
        samples=max(1, around.samples // 2),
    )
    yield TASK, "text to image", around
    yield TASK, "editing", editing


def supervised_share(recipe: Recipe, choice: str, value: float | str) -> float:
    """Expected share of samples with supervision. t is the shifted logistic of a standard
    normal."""
    if choice == SHARE:
        return float(value)
    if choice != WINDOW or float(value) >= 1:
        return 1.0
    shift = recipe.sequence.timestep_shift
    s = float(value) / (shift - (shift - 1) * float(value))
    return statistics.NormalDist().cdf(float(np.log(s / (1 - s))))


def predicted_ratio(recipe: Recipe, shape: Architecture, scenario: Scenario, share: float) -> float:
    """Operations of UNO over those of flow matching, if this share of the samples is supervised."""
    geometry = shape.geometry
    scale = geometry.latent_stride / geometry.vit_stride
    target = min(shape.vit_side**2, round(scenario.latents * scale**2))
    plan = plan_of(recipe, read_answers=False)

    def operations(pack: Scenario) -> float:
        return total(step_flops(shape, work_of(shape, pack), plan)).total

    uno = operations(dataclasses.replace(scenario, target=target))
    flow = operations(dataclasses.replace(scenario, caption=0, metaqueries=0, target=0))
    return share * uno / flow + 1 - share


def partly_supervised(
    samples: list[Sample], share: float, rng: np.random.Generator
) -> list[Sample]:
    """Exactly the rounded share of the samples keeps its supervision, so that chance plays no part
    in a point."""
    count = round(share * len(samples))
    kept = set(rng.permutation(len(samples))[:count].tolist())
    unsupervised = as_mode(samples, "flow")
    return [
        sample if number in kept else unsupervised[number] for number, sample in enumerate(samples)
    ]


def measure_point(
    recipe: Recipe,
    stage: GraphStage,
    scenario: Scenario,
    share: float,
    rounds: int,
    deadline: float,
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    samples = [drawn_samples(recipe, scenario, seed) for seed in range(2)]
    packs = [partly_supervised(pack, share, rng) for pack in samples]
    collate = recipe.collator(recipe.composer(None).tokens)
    modes = ["flow", "uno"]
    comparison = Comparison(stage, modes, itertools.cycle(packs), 1, collate, read_answers=False)
    comparison.prepare(warmup=2, watch=False)
    run_rounds(comparison, rounds, 0, deadline, lambda: None)
    found = comparison.plain()
    step_seconds = {mode: numbers["step_seconds"] for mode, numbers in found["modes"].items()}
    return {
        "ratio": found["ratios"]["uno / flow"],
        "clock": found["clock"],
        "step_seconds": step_seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    started = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, absent=[])
    sequence = dataclasses.replace(recipe.sequence, metaquery_grid=6)
    recipe = dataclasses.replace(recipe, sequence=sequence)
    result = ResultFile(options.json, "sweep", recipe)
    if device.type == "cpu":
        result.unknown.append(CPU_RATIOS)
    result.unknown.append("The modelled ratios of BAGEL-7B are of operations, not of time.")
    add_modelled(result)

    precision = DTYPES[recipe.engine.resolved_precision()]
    objective = build_objective(recipe, device, precision, random=True)
    small = list(points(TINY_SCENARIO, small=True))
    for number, (choice, value, scenario) in enumerate(small):
        deadline = float("inf")
        if options.seconds:
            deadline = started + options.seconds * (number + 1) / len(small)
        expected = supervised_share(recipe, choice, value)
        share = round(expected * scenario.samples) / scenario.samples
        stage = GraphStage(settled(recipe, scenario), objective, device)
        entry = {
            "name": choice,
            "value": value,
            "model": recipe.name,
            "measured": True,
            "share": share,
            "scenario": dataclasses.asdict(scenario),
            "skipped": None,
            "predicted": predicted_ratio(recipe, recipe.architecture, scenario, share),
            **measure_point(stage.recipe, stage, scenario, share, options.rounds, deadline),
        }
        print_measurement(entry)
        result.add(entry)
    result.finish()
    return 0


def add_modelled(result: ResultFile) -> None:
    """The ratios of operations of BAGEL-7B."""
    bagel = load_recipe("bagel_7b_uno", absent=[])
    for choice, value, scenario in points(SCENARIOS["A"], small=False):
        share = supervised_share(bagel, choice, value)
        entry = {
            "name": choice,
            "value": value,
            "model": "bagel_7b",
            "measured": False,
            "share": share,
            "skipped": None,
            "predicted": predicted_ratio(bagel, bagel.architecture, scenario, share),
        }
        result.measurements.append(entry)


def print_measurement(entry: dict[str, Any]) -> None:
    ratio = entry["ratio"]
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    print(
        f"{entry['name']:<20}{entry['value']!s:>16}   uno / flow {ratio['median']:.3f}{interval}, "
        f"by operations {entry['predicted']:.3f}",
        flush=True,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="sweep",
        description="Measures UNO's overhead over the choices of a recipe.",
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
