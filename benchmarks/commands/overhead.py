"""What UNO costs over plain flow matching, measured.

    python benchmarks/overhead.py --recipe tiny [--rounds 12] [--json FILE]
    deepspeed --num_gpus 2 benchmarks/overhead.py --recipe tiny --stages step
    python benchmarks/overhead.py --recipe bagel_7b_uno --random-weights --stages graph --scenarios A,D,F

The modes flow, flow+caption, flow+regression and uno, and in the stage `graph` naive flow and naive uno too, run on the same
samples, one step after the other in turn. Stages: `step` is DeepSpeed's whole optimizer step, `graph` forward and backward
without it. Packs come from the recipe's data, or with --scenarios are drawn. The file is rewritten after every round.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.measure import Comparison, GraphStage, StepStage, run_rounds
from benchmarks.suite.models import (
    DTYPES,
    build_objective,
    codec_runs,
    layers_that_fit,
    random_weights,
)
from benchmarks.suite.packs import (
    SCENARIOS,
    SUPERVISION,
    drawn_samples,
    is_naive,
    packs_of_data,
    settled,
)
from benchmarks.suite.results import new_result, write_result
from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import one_line_errors
from uno_ds.cost.scenario import Scenario, read_scenario
from uno_ds.generation.inference import special_tokens
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.run import Run, prepare
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError, to_plain

STAGES = ("step", "graph")
CPU_RATIOS = "A ratio measured on a CPU does not transfer to a GPU: other rates of products, attention and memory."
DENSE = "On a CPU the naive modes attend with a dense mask over the whole pack, not with FlexAttention: their times there are not those of a GPU."
ONE_RANK = "One rank sends nothing, so the time of ZeRO's communication was not measured; the cost model gives its volume."
SHARED_CORES = (
    "CPU ranks share the cores of one machine: their times say nothing about more devices."
)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run(options)


def run(options: argparse.Namespace) -> int:
    started, world = time.monotonic(), int(os.environ.get("WORLD_SIZE", "1"))
    recipe, opened = open_recipe(options)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if "step" in options.stages:
        from uno_ds.training.process_group import start_process_group

        device = start_process_group()
    if options.threads:
        torch.set_num_threads(options.threads)
    speaks = os.environ.get("RANK", "0") == "0"
    plain = to_plain(recipe)
    plain.pop("architecture")
    result = new_result("overhead", plain)
    if device.type == "cpu":
        result["unknown"].append(CPU_RATIOS)
        result["unknown"] += [SHARED_CORES] if world > 1 else []
        result["unknown"] += (
            [DENSE] if "graph" in options.stages and any(map(is_naive, options.modes)) else []
        )
    if world == 1:
        result["unknown"].append(ONE_RANK)
    if options.random_weights and not codec_runs(recipe):
        options.encoded_latents = True
        result["unknown"].append(
            "diffusers is not installed here, so latents were given and the autoencoder, in all modes alike, was not timed."
        )
    scenarios: list[tuple[str, Scenario | None]] = list(options.scenarios.items()) or [
        ("data", None)
    ]
    jobs = [(stage, name, scenario) for stage in options.stages for name, scenario in scenarios]
    objective, failed = None, False
    for number, (stage_name, name, scenario) in enumerate(jobs):
        share = options.seconds and started + (number + 1) * options.seconds / len(jobs)
        entry: dict[str, Any] = {
            "name": f"{recipe.name}, {name}",
            "stage": stage_name,
            "skipped": None,
            "device": _device_name(device),
            "precision": recipe.engine.resolved_precision(),
            "ranks": world,
            "layers": recipe.architecture.layers,
            "weights": "random"
            if options.random_weights
            else str(recipe.model.base or "from nothing"),
            "scenario": None if scenario is None else dataclasses.asdict(scenario),
        }
        result["measurements"].append(entry)
        written = _writer(options.json if speaks else None, result, entry)
        try:
            objective = _measure(
                entry,
                recipe,
                opened,
                objective,
                device,
                options,
                scenario,
                share or float("inf"),
                written,
            )
        except SettingsError:
            raise
        except Exception as error:  # one measurement that fails does not take the others with it
            traceback.print_exc()
            entry["skipped"] = (
                f"failed, {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            )
            objective, failed = None, True
            if world > 1:
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if speaks:
            print_measurement(entry)
        written()
    if speaks and options.json:
        write_result(options.json, result, complete=True)
        print(f"written: {options.json}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return int(failed)


def _measure(
    entry: dict[str, Any],
    recipe: Recipe,
    opened: Run | None,
    objective: Any,
    device: torch.device,
    options: argparse.Namespace,
    scenario: Scenario | None,
    deadline: float,
    written: Callable[..., None],
) -> Any:
    """Fills the entry; returns the objective of the graph stage for the next one."""
    answers = opened.read_answers if opened is not None and scenario is None else False
    modes = [mode for mode in options.modes if entry["stage"] == "graph" or not is_naive(mode)]
    if entry["stage"] == "graph" and entry["ranks"] > 1:
        entry["skipped"] = "forward and backward alone are measured on one rank"
        return objective
    if scenario is not None:
        recipe = settled(recipe, scenario)
    if entry["stage"] == "step":
        stage: Any = StepStage(recipe, device, answers, options.random_weights)
    else:
        if objective is None or objective.settings != recipe.objective:
            objective = build_objective(
                recipe,
                device,
                DTYPES[recipe.engine.resolved_precision()],
                options.random_weights,
                answers,
            )
        stage = GraphStage(recipe, objective, device)
    rank = int(os.environ.get("RANK", "0"))
    each = max(1, recipe.engine.packs_per_step // entry["ranks"]) if scenario is None else 1
    packs = (
        packs_of_data(opened, rank, entry["ranks"])
        if scenario is None
        else _drawn(recipe, scenario, rank, options.encoded_latents)
    )
    tokens = special_tokens(opened.tokenizer) if scenario is None else recipe.layout(None).tokens
    comparison = Comparison(stage, modes, packs, each, recipe.collator(tokens), answers)
    comparison.prepare(options.warmup)
    run_rounds(comparison, options.rounds, options.splits, deadline, lambda: written(comparison))
    entry |= comparison.plain()
    if entry["stage"] == "step":
        stage.engine.engine.destroy()
    return objective


def _drawn(recipe: Recipe, scenario: Scenario, rank: int, encoded: bool) -> Iterator[list[Sample]]:
    """Two packs in turn, drawn once: random pictures of a megapixel take longer to draw than a step takes to run."""
    return itertools.cycle(
        [
            drawn_samples(recipe, scenario, seed=100 * rank + number, encoded=encoded)
            for number in range(2)
        ]
    )


def _writer(
    path: Path | None, result: dict[str, Any], entry: dict[str, Any]
) -> Callable[..., None]:
    def written(comparison: Comparison | None = None) -> None:
        if path is not None:
            if comparison is not None:
                entry.update(comparison.plain())
            write_result(path, result)

    return written


def open_recipe(options: argparse.Namespace) -> tuple[Recipe, Run | None]:
    """The recipe, and where its data is measured the checked run. Raises SettingsError."""
    if options.scenarios:
        recipe = load_recipe(options.recipe, options.set or [], absent=[])
        world = int(os.environ.get("WORLD_SIZE", "1"))
        recipe = dataclasses.replace(
            recipe, engine=dataclasses.replace(recipe.engine, packs_per_step=world)
        )
        if reason := None if options.random_weights else random_weights(recipe):
            raise SettingsError("--random-weights", f"is needed: {reason}.")
        if options.random_weights:
            shape = recipe.architecture
            if options.layers == "fit":
                layers = min(
                    layers_that_fit(recipe, scenario, torch.device("cuda", 0))
                    for scenario in options.scenarios.values()
                )
            else:
                layers = int(options.layers or shape.layers)
            shape = dataclasses.replace(shape, layers=layers)
            model = dataclasses.replace(
                recipe.model,
                base=None,
                published_shape=None,
                tokenizer="tiny_base",
                architecture=shape,
            )
            recipe = dataclasses.replace(recipe, model=model)
        return recipe, None
    if options.random_weights or options.layers:
        raise SettingsError(
            "--random-weights", "goes with --scenarios, which need no data and no tokenizer."
        )
    run = prepare(options.recipe, options.set or [])
    return run.recipe, run


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def print_measurement(entry: dict[str, Any]) -> None:
    print(
        f"\n{entry['name']}, stage {entry['stage']}, {entry['ranks']} rank(s), {entry['precision']} on {entry['device']}, weights {entry['weights']}"
    )
    if entry["skipped"]:
        print(f"  skipped: {entry['skipped']}", flush=True)
        return
    for mode, numbers in entry["modes"].items():
        times = torch.tensor(numbers["step_seconds"])
        used = (
            ""
            if numbers["mfu"] is None
            else f", MFU {numbers['mfu']:.1%}, HFU {numbers['hfu']:.1%}"
        )
        gap = (
            ""
            if numbers["flops"]["unexplained"] is None
            else f", counted {numbers['flops']['unexplained']:+.2%} of predicted FLOP"
        )
        print(
            f"  {mode:<16} {times.median():9.4f} s ({times.quantile(0.2):.4f} to {times.quantile(0.8):.4f}, n {len(times)}), "
            f"{numbers['tokens_per_second']:10,.0f} tokens/s, {numbers['images_per_second']:8.2f} images/s, "
            f"peak {numbers['peak_memory_bytes'] / 2**20:,.0f} MiB{used}{gap}"
        )
    for mode, reason in entry["failed_modes"].items():
        print(f"  {mode:<16} failed: {reason}")
    for name, found in entry["ratios"].items():
        interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
        print(
            f"  {name:<28} {found['median']:.3f}{interval}, by FLOP {found['predicted']:.3f}, unexplained {found['unexplained']:+.1%}"
        )
    sys.stdout.flush()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="overhead.py", description="Measures what UNO costs over plain flow matching."
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME_OR_FILE",
        help="a recipe that ships with uno_ds or a YAML file",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="overrides one key of the recipe; may be repeated",
    )
    parser.add_argument(
        "--stages",
        default="step,graph",
        help="step: DeepSpeed's whole step; graph: forward and backward (default: both)",
    )
    parser.add_argument(
        "--modes",
        default=",".join(SUPERVISION),
        help=f"modes, separated by commas (default: {', '.join(SUPERVISION)})",
    )
    parser.add_argument(
        "--scenarios",
        default="",
        metavar="A,D,F",
        help="letters, or one scenario as estimate.py takes it: draw packs instead of reading data",
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="with --scenarios: do not read the base"
    )
    parser.add_argument(
        "--encoded-latents",
        action="store_true",
        help="with --scenarios: latents are given, no autoencoder runs",
    )
    parser.add_argument(
        "--layers",
        metavar="N|fit",
        help="with --random-weights: decoder layers instead of the recipe's; fit: as many as a GPU's memory takes",
    )
    parser.add_argument(
        "--rounds", type=int, default=12, help="timed steps of each mode (default 12)"
    )
    parser.add_argument(
        "--splits",
        type=int,
        default=4,
        help="further steps of each mode that are split into phases (default 4)",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="untimed steps of each mode, beside three that are counted and watched (default 2)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop starting rounds after this time, shared by all measurements",
    )
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result to this file, after every round"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages, options.modes = options.stages.split(","), options.modes.split(",")
    for flag, given, allowed in (
        ("--stages", options.stages, STAGES),
        ("--modes", options.modes, tuple(SUPERVISION)),
    ):
        if unknown := [name for name in given if name not in allowed]:
            parser.error(
                f"{flag}: {', '.join(unknown)} is unknown; allowed are {', '.join(allowed)}"
            )
    if options.layers not in (None, "fit") and not (
        options.layers.isascii() and options.layers.isdigit() and int(options.layers)
    ):
        parser.error("--layers is a number or fit")
    if options.layers == "fit" and not torch.cuda.is_available():
        parser.error("--layers fit needs a GPU")
    options.scenarios = _scenarios(options.scenarios)
    return options


def _scenarios(text: str) -> dict[str, Scenario]:
    if "=" in text:
        return {"given": read_scenario(text)}
    letters = text.split(",") if text else []
    if unknown := [letter for letter in letters if letter not in SCENARIOS]:
        raise SettingsError(
            "--scenarios",
            f"{', '.join(unknown)} is unknown; allowed are {', '.join(SCENARIOS)}, or prompt=...,latents=... as in estimate.py.",
        )
    return {letter: SCENARIOS[letter] for letter in letters}
