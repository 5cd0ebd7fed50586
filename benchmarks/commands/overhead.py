"""What UNO costs over plain flow matching, measured.

    python benchmarks/overhead.py --recipe tiny [--rounds 12] [--json FILE]
    deepspeed --num_gpus 2 benchmarks/overhead.py --recipe tiny --stages step
    python benchmarks/overhead.py --recipe bagel_7b_uno --random-weights --scenarios A,F

All modes run on the same samples, in turn: flow, flow+caption, flow+regression, uno; in the stage
`graph` naive flow and naive uno too; flow-lora and uno-lora if asked for. `step` is DeepSpeed's
whole step, `graph` forward and backward without it. The file is rewritten after every round."""

import argparse
import dataclasses
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.command_line import Parser, names_of
from benchmarks.suite.limits import CPU_RATIOS, DENSE, NO_AUTOENCODER, ONE_RANK, SHARED_CORES
from benchmarks.suite.measure import Comparison, GraphStage, Stage, StepStage, run_rounds
from benchmarks.suite.models import (
    DTYPES,
    build_objective,
    codec_runs,
    layers_that_fit,
    random_weights,
    with_adapters,
    with_layers,
)
from benchmarks.suite.packs import (
    DEFAULT_MODES,
    SUPERVISION,
    drawn_samples,
    is_adapted,
    is_naive,
    packs_of_data,
    settled,
)
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import read_scenarios
from uno_ds.cost.scenario import Scenario
from uno_ds.data.files import one_line
from uno_ds.generation.inference import special_tokens
from uno_ds.model.adapters import adapted_modules
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.run import Run, prepare
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError

STAGES = ("step", "graph")


@dataclass
class Setting:
    """What all measurements of this process share. `opened`: the checked run whose data is
    measured, None if packs are drawn. `objective`: of the last measurement of the graph stage,
    which the next one can use again."""

    options: argparse.Namespace
    recipe: Recipe
    opened: Run | None
    device: torch.device
    rank: int
    ranks: int
    objective: UnoObjective | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = parse(arguments)
    recipe, opened = open_recipe(options)
    device = _device()
    if "step" in options.stages:
        from uno_ds.training.process_group import start_process_group

        device = start_process_group()
    if options.threads:
        torch.set_num_threads(options.threads)
    rank = int(os.environ.get("RANK", "0"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if options.random_weights and not codec_runs(recipe):
        options.encoded_latents = True
    setting = Setting(options, recipe, opened, device, rank, ranks)
    result = ResultFile(options.json if rank == 0 else None, "overhead", recipe)
    result.unknown.extend(limits_of(setting))

    scenarios = list(options.scenarios.items()) or [("data", None)]
    jobs = [(stage, *scenario) for stage, scenario in itertools.product(options.stages, scenarios)]
    failed = False
    for number, (stage, name, scenario) in enumerate(jobs):
        deadline = float("inf")
        if options.seconds:
            deadline = started + (number + 1) * options.seconds / len(jobs)
        entry = new_entry(setting, stage, name, scenario)
        result.measurements.append(entry)
        try:
            measure(setting, entry, scenario, deadline, result.save)
        except SettingsError:
            raise
        except Exception as error:  # one measurement that fails does not end the others
            traceback.print_exc()
            entry["skipped"] = f"failed, {one_line(error)}"
            setting.objective = None
            failed = True
            if ranks > 1:
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if rank == 0:
            print_measurement(entry)
        result.save()
    if rank == 0:
        result.finish()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return int(failed)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def limits_of(setting: Setting) -> Iterator[str]:
    """Sentences about what this run cannot show."""
    options = setting.options
    if setting.device.type == "cpu":
        yield CPU_RATIOS
        if setting.ranks > 1:
            yield SHARED_CORES
        if "graph" in options.stages and any(map(is_naive, options.modes)):
            yield DENSE
    if setting.ranks == 1:
        yield ONE_RANK
    if options.random_weights and not codec_runs(setting.recipe):
        yield NO_AUTOENCODER


def new_entry(setting: Setting, stage: str, name: str, scenario: Scenario | None) -> dict[str, Any]:
    recipe = setting.recipe
    weights = str(recipe.model.base or "from nothing")
    on_gpu = setting.device.type == "cuda"
    return {
        "name": f"{recipe.name}, {name}",
        "stage": stage,
        "skipped": None,
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
        "precision": recipe.engine.resolved_precision(),
        "ranks": setting.ranks,
        "layers": recipe.architecture.layers,
        "weights": "random" if setting.options.random_weights else weights,
        "scenario": None if scenario is None else dataclasses.asdict(scenario),
    }


def measure(
    setting: Setting,
    entry: dict[str, Any],
    scenario: Scenario | None,
    deadline: float,
    save: Callable[[], None],
) -> None:
    """Fills the entry, and calls `save` after every round."""
    options = setting.options
    in_graph = entry["stage"] == "graph"
    if in_graph and setting.ranks > 1:
        entry["skipped"] = "forward and backward alone are measured on one rank"
        return
    read_answers = False
    if scenario is None:
        assert setting.opened is not None
        recipe = setting.recipe
        read_answers = setting.opened.read_answers
        packs = packs_of_data(setting.opened, setting.rank, setting.ranks)
        packs_per_step, tokenizer = recipe.engine.packs_per_step, setting.opened.tokenizer
        assert packs_per_step is not None and tokenizer is not None, "set when a run is opened"
        packs_of_step = max(1, packs_per_step // setting.ranks)
        tokens = special_tokens(tokenizer)
    else:
        recipe = settled(setting.recipe, scenario)
        packs = drawn_packs(recipe, scenario, setting.rank, options.encoded_latents)
        packs_of_step = 1
        tokens = recipe.composer(None).tokens

    modes = [mode for mode in options.modes if in_graph or not is_naive(mode)]
    stages: list[Stage] = []
    for adapters in sorted(set(map(is_adapted, modes))):
        of_stage = with_adapters(recipe) if adapters else recipe
        if in_graph:
            stages.append(_graph_stage(setting, of_stage, read_answers))
        else:
            random = options.random_weights
            stages.append(StepStage(of_stage, setting.device, read_answers, random))
    collate = recipe.collator(tokens)
    comparison = Comparison(
        stages[0], modes, packs, packs_of_step, collate, read_answers, adapted=stages[-1]
    )

    def after_round() -> None:
        entry.update(comparison.plain())
        save()

    comparison.prepare(options.warmup, count=not options.no_count, after_mode=after_round)
    run_rounds(comparison, options.rounds, options.splits, deadline, after_round)
    entry.update(comparison.plain())
    for stage in stages:
        if isinstance(stage, StepStage):
            stage.engine.engine.destroy()


def _graph_stage(setting: Setting, recipe: Recipe, read_answers: bool) -> GraphStage:
    objective = setting.objective
    has_adapters = objective is not None and bool(adapted_modules(objective))
    wants_adapters = recipe.model.train == "lora"
    unlike = has_adapters != wants_adapters
    if objective is None or objective.settings != recipe.objective or unlike:
        dtype = DTYPES[recipe.engine.resolved_precision()]
        random = setting.options.random_weights
        objective = build_objective(recipe, setting.device, dtype, random, read_answers)
        setting.objective = objective
    return GraphStage(recipe, objective, setting.device)


def drawn_packs(
    recipe: Recipe, scenario: Scenario, rank: int, encoded: bool
) -> Iterator[list[Sample]]:
    """Two packs in turn, drawn once: random images of a megapixel take longer to draw than a step
    takes to run."""
    seeds = [100 * rank + number for number in range(2)]
    return itertools.cycle([drawn_samples(recipe, scenario, seed, encoded) for seed in seeds])


def open_recipe(options: argparse.Namespace) -> tuple[Recipe, Run | None]:
    """The recipe, and if its data is measured the checked run. Raises SettingsError."""
    overrides = options.set or []
    if options.scenarios:
        return _recipe_of_drawn_packs(options, overrides), None
    if options.random_weights or options.layers:
        message = "goes with --scenarios, which need no data and no tokenizer."
        raise SettingsError("--random-weights", message)
    run = prepare(options.recipe, overrides, reads_only=True)
    return run.recipe, run


def _recipe_of_drawn_packs(options: argparse.Namespace, overrides: list[str]) -> Recipe:
    """With one pack per rank, and with --random-weights without a base."""
    recipe = load_recipe(options.recipe, overrides, absent=[])
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    engine = dataclasses.replace(recipe.engine, packs_per_step=ranks)
    recipe = dataclasses.replace(recipe, engine=engine)
    if not options.random_weights:
        reason = random_weights(recipe)
        if reason:
            raise SettingsError("--random-weights", f"is needed: {reason}.")
        return recipe
    if options.layers == "fit":
        gpu = torch.device("cuda", 0)
        scenarios = options.scenarios.values()
        layers = min(layers_that_fit(recipe, scenario, gpu) for scenario in scenarios)
    else:
        layers = int(options.layers or recipe.architecture.layers)
    return with_layers(recipe, layers)


def print_measurement(entry: dict[str, Any]) -> None:
    print(
        f"\n{entry['name']}, stage {entry['stage']}, {entry['ranks']} rank(s), "
        f"{entry['precision']} on {entry['device']}, weights {entry['weights']}"
    )
    if entry["skipped"]:
        print(f"  skipped: {entry['skipped']}", flush=True)
        return
    for mode, numbers in entry["modes"].items():
        print(f"  {mode:<16} {_speed(numbers)}")
    for mode, reason in entry["failed_modes"].items():
        print(f"  {mode:<16} failed: {reason}")
    for name, found in entry["ratios"].items():
        interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
        print(
            f"  {name:<28} {found['median']:.3f}{interval}, by FLOP {found['predicted']:.3f}, "
            f"unexplained {found['unexplained']:+.1%}"
        )
    sys.stdout.flush()


def _speed(numbers: dict[str, Any]) -> str:
    times = torch.tensor(numbers["step_seconds"])
    low, high = times.quantile(0.2), times.quantile(0.8)
    parts = [
        f"{times.median():9.4f} s ({low:.4f} to {high:.4f}, n {len(times)})",
        f"{numbers['tokens_per_second']:10,.0f} tokens/s",
        f"{numbers['images_per_second']:8.2f} images/s",
        f"peak {numbers['peak_memory_bytes'] / 2**20:,.0f} MiB",
    ]
    if numbers["mfu"] is not None:
        parts.append(f"MFU {numbers['mfu']:.1%}, HFU {numbers['hfu']:.1%}")
    unexplained = numbers["flops"]["unexplained"]
    if unexplained is not None:
        parts.append(f"counted {unexplained:+.2%} of predicted FLOP")
    return ", ".join(parts)


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
        default=",".join(DEFAULT_MODES),
        help=f"modes, separated by commas, of {', '.join(SUPERVISION)}; the lora modes train the "
        "adapters of the recipe's `lora` (default: all others)",
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
        help="with --random-weights: decoder layers instead of the recipe's; fit: as many as a "
        "GPU's memory takes",
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
        help="untimed steps of each mode, after three whose FLOP and memory are measured (default "
        "2)",
    )
    parser.add_argument(
        "--no-count",
        action="store_true",
        help="do not let torch count operations on the device; the predicted ones are used",
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
    options.stages = names_of("--stages", options.stages, STAGES)
    options.modes = names_of("--modes", options.modes, SUPERVISION)
    layers = options.layers
    if layers == "fit" and not torch.cuda.is_available():
        parser.error("--layers fit needs a GPU")
    if layers not in (None, "fit") and not (layers.isascii() and layers.isdigit() and int(layers)):
        parser.error("--layers is a number or fit")
    options.scenarios = read_scenarios(options.scenarios)
    return options
