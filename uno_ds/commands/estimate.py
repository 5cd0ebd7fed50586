"""`estimate.py`: what a recipe costs, from its numbers alone: operations, memory and traffic of one rank."""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from uno_ds.commands.dry_run import Estimate, bytes_of, estimate, print_bytes
from uno_ds.commands.json_output import write_json
from uno_ds.commands.train import Parser, load
from uno_ds.cost.flops import Flops, flops
from uno_ds.cost.scenario import Scenario, read_scenario
from uno_ds.data.sources import EMBEDDED
from uno_ds.recipe import Recipe
from uno_ds.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(arguments)
        warnings: list[str] = []
        recipe, ranks = load(options, warnings)
        given = read_scenario(options.scenario) if options.scenario else None
        told = estimate(recipe, ranks, _layouts(recipe), given)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    pack = given or told.packs[told.neediest]
    count = flops(recipe.architecture, pack)
    if options.json:
        write_json({"recipe": recipe.name, "world_size": ranks, "warnings": warnings, "scenario": asdict(pack), "flops": asdict(count), **bytes_of(told)})
    else:
        _print(recipe, ranks, warnings, pack, count, told)
    return 0


def _layouts(recipe: Recipe) -> list[str]:
    """Of the sources, without opening them; one that does not say is taken for the usual one."""
    return [source.path.removeprefix("scenes/") if source.path in EMBEDDED else source.layout.replace("auto", "t2i") for source in recipe.data.sources]


def _print(recipe: Recipe, ranks: int, warnings: list[str], pack: Scenario, count: Flops, told: Estimate) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{recipe.name}, {ranks} rank(s); a pack of {pack.tokens:,} tokens in {pack.samples} sample(s): "
          + ", ".join(f"{name} {number}" for name, number in asdict(pack).items() if number and name != "samples"))
    print(f"\n{'PFLOP of a pack':<24}{'naive':>12}{'structured':>12}")
    print(f"  {'flow matching':<22}{count.flow_naive / 1e15:>12.4g}{count.flow_structured / 1e15:>12.4g}")
    print(f"  {'UNO':<22}{count.uno_naive / 1e15:>12.4g}{count.uno_structured / 1e15:>12.4g}")
    if count.flow_structured:
        print(f"  UNO costs {count.uno_structured / count.flow_structured:.2f} of flow matching, both structured")
    print_bytes(ranks, told)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="estimate.py", description="Says what a recipe costs, from its numbers alone: nothing is opened or checked but the recipe.")
    parser.add_argument("--recipe", required=True, metavar="NAME_OR_FILE", help="a recipe that ships with uno_ds or a YAML file")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="overrides one key of the recipe; may be repeated")
    parser.add_argument("--ds-config", metavar="NAME_OR_FILE", help="DeepSpeed configuration (short for --set engine.deepspeed=...)")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks (default: hardware.gpus of the recipe, or 1)")
    parser.add_argument("--scenario", metavar="prompt=200,latents=4096,...",
                        help="what a pack holds: prompt, latents, caption, metaqueries (tokens of a sample), samples, and if wanted vit, clean, target "
                             "(default: the fullest pack of the recipe)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error("--world-size is at least 1")
    return options
