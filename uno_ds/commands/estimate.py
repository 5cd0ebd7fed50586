"""`estimate.py`: what a recipe costs, from its numbers alone: operations, memory and traffic of one
rank."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from uno_ds.commands.dry_run import Estimate, bytes_of, estimate, print_bytes
from uno_ds.commands.flags import Parser, check_ranks
from uno_ds.commands.json_output import write_json
from uno_ds.commands.runner import one_line_errors
from uno_ds.commands.train import overrides_of
from uno_ds.cost.flops import Flops, flops
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.scenario import Scenario, read_scenario
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.step_time import REACHED, assumptions, step_time
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
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
    told = estimate(recipe, ranks, _layouts(recipe), given)
    pack = given or told.packs[told.neediest]
    time = _time(recipe, ranks, pack, told, options.rate) if options.rate else None
    count = flops(recipe.architecture, pack)
    if options.json:
        write_json(
            {
                "recipe": recipe.name,
                "world_size": ranks,
                "warnings": warnings,
                "scenario": asdict(pack),
                "flops": asdict(count),
                **bytes_of(told),
                "time": time,
            }
        )
    else:
        _print(recipe, ranks, warnings, pack, count, told)
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
    recipe: Recipe, ranks: int, pack: Scenario, told: Estimate, rate: float
) -> dict[str, Any]:
    """Modelled time of a step at `rate` TFLOP/s. Raises SettingsError without a GPU to plan for."""
    if recipe.hardware.gpu is None:
        raise SettingsError(
            "--rate", f"needs to know the links: --set hardware.gpu=NAME, one of {', '.join(GPUS)}."
        )
    gpu, per_node = GPUS[recipe.hardware.gpu], recipe.hardware.gpus_per_node
    accumulation = max(1, recipe.engine.packs_per_step // ranks)
    flop = (
        accumulation
        * total(
            step_flops(
                recipe.architecture,
                work_of(recipe.architecture, pack),
                plan_of(recipe, read_answers=False),
            )
        ).total
    )
    found = step_time(flop, told.traffic, gpu, ranks, per_node, rate * 1e12, REACHED)
    return {
        "step_seconds": [found.hidden, found.exposed],
        "computing_seconds": found.computing,
        "sending_seconds": found.sending,
        "gpu_hours": list(found.gpu_hours(recipe.steps)),
        "steps": recipe.steps,
        "flop_of_a_rank": flop,
        "assumptions": assumptions(
            recipe.hardware.gpu, gpu, per_node, rate * 1e12, measured=False, reached=REACHED
        ),
    }


def _layouts(recipe: Recipe) -> list[str]:
    """Of the sources, without opening them; one that does not say is taken for the usual one."""
    return [
        source.path.removeprefix("scenes/")
        if source.path in EMBEDDED
        else source.layout.replace("auto", "t2i")
        for source in recipe.data.sources
    ]


def _print(
    recipe: Recipe, ranks: int, warnings: list[str], pack: Scenario, count: Flops, told: Estimate
) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
    print(
        f"{recipe.name}, {ranks} rank(s); a pack of {pack.tokens:,} tokens in {pack.samples} "
        "sample(s): "
        + ", ".join(
            f"{name} {number}"
            for name, number in asdict(pack).items()
            if number and name != "samples"
        )
    )
    print(f"\n{'PFLOP of a pack':<24}{'naive':>12}{'structured':>12}")
    print(
        f"  {'flow matching':<22}{count.flow_naive / 1e15:>12.4g}{count.flow_structured / 1e15:>12.4g}"
    )
    print(f"  {'UNO':<22}{count.uno_naive / 1e15:>12.4g}{count.uno_structured / 1e15:>12.4g}")
    if count.flow_structured:
        print(
            f"  UNO costs {count.uno_structured / count.flow_structured:.2f} of flow matching, "
            "both structured"
        )
    print_bytes(ranks, told)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="estimate.py",
        description="Says what a recipe costs, from its numbers alone: nothing is opened or "
        "checked but the recipe.",
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
        help="what a pack holds: prompt, latents, caption, metaqueries (tokens of a sample), samples, and if wanted vit, clean, target "
        "(default: the fullest pack of the recipe)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TFLOPS",
        help="TFLOP/s that a GPU reaches in a step, as measured or assumed: also say how long a "
        "step and the run take",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    options = parser.parse_args(arguments)
    check_ranks(parser, options.world_size)
    if options.rate is not None and not 0 < options.rate <= FASTEST:
        parser.error(f"--rate must be above 0 and at most {FASTEST:,}, got {options.rate}")
    return options
