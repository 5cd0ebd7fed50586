"""`estimate.py`: operations, memory and traffic of one rank, from the numbers of a recipe alone."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from uno_ds.commands.dry_run import (
    Estimate,
    bytes_of,
    estimate,
    print_bytes,
    print_supervised_steps,
)
from uno_ds.commands.flags import Parser, check_ranks
from uno_ds.commands.json_output import write_json
from uno_ds.commands.runner import one_line_errors
from uno_ds.commands.train import overrides_of
from uno_ds.cost.adapters import adapters_of
from uno_ds.cost.flops import Flops, flops
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.scenario import UNSUPERVISED, Scenario, read_scenario, without_supervision
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.step_time import REACHED, StepTime, assumptions, step_time
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.data.layouts import planned_layout
from uno_ds.data.sources import EMBEDDED
from uno_ds.recipe import Recipe
from uno_ds.run import load
from uno_ds.settings import SettingsError

FASTEST = 1_000_000  # TFLOP/s


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    warnings: list[str] = []
    recipe, ranks = load(
        options.recipe,
        overrides_of(options),
        world_size=options.world_size,
        absent=warnings,
    )
    given = read_scenario(options.scenario) if options.scenario else None
    costs = estimate(recipe, ranks, layouts_without_data(recipe), given)
    layout = costs.largest.removesuffix(UNSUPERVISED)
    pack = costs.packs[layout]
    later = costs.packs.get(layout + UNSUPERVISED, without_supervision(pack))
    time = _time(recipe, ranks, (pack, later), costs, options.rate) if options.rate else None
    adapters = adapters_of(recipe)
    count = flops(recipe.architecture, pack, adapters)
    in_full = flops(recipe.architecture, pack) if adapters is not None else None
    if options.json:
        write_json(
            {
                "recipe": recipe.name,
                "world_size": ranks,
                "warnings": warnings,
                "scenario": asdict(pack),
                "steps": recipe.steps,
                "supervised_steps": recipe.supervised_steps,
                "flops": asdict(count),
                "flops_without_adapters": asdict(in_full) if in_full is not None else None,
                **bytes_of(costs),
                "time": time,
            }
        )
    else:
        _print(recipe, ranks, warnings, pack, count, in_full, costs)
        print_supervised_steps(recipe)
        if time:
            low, high = time["gpu_hours"]
            print(
                f"\n{recipe.steps:,} steps on {ranks} GPU(s): {time['step_seconds'][0]:.3g} to "
                f"{time['step_seconds'][1]:.3g} s a step, "
                f"{low:,.0f} to {high:,.0f} GPU hours. This is modelled:"
            )
            print("\n".join(f"  {sentence}" for sentence in time["assumptions"]))
    return 0


def _time(
    recipe: Recipe, ranks: int, packs: tuple[Scenario, Scenario], costs: Estimate, rate: float
) -> dict[str, Any]:
    """Modelled time of a step at `rate` TFLOP/s, and of the run, whose later steps have the second
    of `packs`. Raises SettingsError without a GPU to plan for."""
    if recipe.hardware.gpu is None:
        raise SettingsError(
            "--rate",
            f"needs the links of a GPU: --set hardware.gpu=NAME, one of {', '.join(GPUS)}.",
        )
    gpu, per_node = GPUS[recipe.hardware.gpu], recipe.hardware.gpus_per_node
    packs_per_step = recipe.engine.packs_per_step
    assert packs_per_step is not None, "set when the recipe is loaded"
    plan = plan_of(recipe, read_answers=False)
    flops_of_steps: list[int] = []
    times: list[StepTime] = []
    for pack in packs:
        parts = step_flops(recipe.architecture, work_of(recipe.architecture, pack), plan)
        flop = max(1, packs_per_step // ranks) * total(parts).total
        flops_of_steps.append(flop)
        times.append(step_time(flop, costs.traffic, gpu, ranks, per_node, rate * 1e12, REACHED))
    found, later = times
    supervised = found.gpu_hours(recipe.supervised_steps)
    rest = later.gpu_hours(recipe.steps - recipe.supervised_steps)
    return {
        "step_seconds": [found.hidden, found.exposed],
        "computing_seconds": found.computing,
        "sending_seconds": found.sending,
        "gpu_hours": [first + second for first, second in zip(supervised, rest, strict=True)],
        "steps": recipe.steps,
        "flop_of_a_rank": flops_of_steps[0],
        "assumptions": assumptions(
            recipe.hardware.gpu, gpu, per_node, rate * 1e12, measured=False, reached=REACHED
        ),
    }


def layouts_without_data(recipe: Recipe) -> list[str]:
    """Layouts of the sources, without opening them; `auto` counts as t2i."""
    return [
        source.path.removeprefix("scenes/")
        if source.path in EMBEDDED
        else planned_layout(source.layout)
        for source in recipe.data.sources
    ]


def _print(
    recipe: Recipe,
    ranks: int,
    warnings: list[str],
    pack: Scenario,
    count: Flops,
    in_full: Flops | None,
    costs: Estimate,
) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
    tokens = {name: count for name, count in asdict(pack).items() if name != "samples"}
    contents = ", ".join(f"{name} {count}" for name, count in tokens.items() if count)
    print(
        f"{recipe.name}, {ranks} rank(s); a pack of {pack.tokens:,} tokens in {pack.samples} "
        f"sample(s): {contents}"
    )
    print(f"\n{'PFLOP of a pack':<24}{'naive':>12}{'structured':>12}")
    print(
        f"  {'flow matching':<22}{count.flow_naive / 1e15:>12.4g}"
        f"{count.flow_structured / 1e15:>12.4g}"
    )
    print(f"  {'UNO':<22}{count.uno_naive / 1e15:>12.4g}{count.uno_structured / 1e15:>12.4g}")
    if count.flow_structured:
        print(
            f"  UNO costs {count.uno_structured / count.flow_structured:.2f} of flow matching, "
            "both structured"
        )
    if in_full is not None:
        print(
            f"  adapters do {count.uno_structured / in_full.uno_structured:.2f} of the operations "
            "of training the generation expert in full (UNO, structured)"
        )
    print_bytes(ranks, costs)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="estimate.py",
        description="Estimates operations, memory and traffic of a recipe from its numbers alone: "
        "only the recipe is read and checked.",
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
        "--ds-config",
        metavar="NAME_OR_FILE",
        help="DeepSpeed configuration (short for --set engine.deepspeed=...)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of ranks (default: hardware.gpus of the recipe, or 1)",
    )
    parser.add_argument(
        "--scenario",
        metavar="prompt=200,latents=4096,...",
        help="contents of a pack: prompt, latents, caption, metaqueries (tokens of a sample), "
        "samples, and optionally vit, clean, target (default: the fullest pack of the recipe)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TFLOPS",
        help="TFLOP/s that a GPU reaches in a step, as measured or assumed: also estimate how long "
        "a step and the run take",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    options = parser.parse_args(arguments)
    check_ranks(parser, options.world_size)
    if options.rate is not None and not 0 < options.rate <= FASTEST:
        parser.error(f"--rate must be above 0 and at most {FASTEST:,}, got {options.rate}")
    return options
