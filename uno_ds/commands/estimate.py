"""`estimate.py`: operations, memory and traffic of one rank, from the numbers of a recipe alone."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
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
from uno_ds.cost.fit import sharding_of
from uno_ds.cost.flops import Flops, flops
from uno_ds.cost.hardware import GPUS, Gpu
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scaling import Links, bound_of, flop_of, overlaps_of, parts_of_step, scaling
from uno_ds.cost.scaling_picture import draw_scaling
from uno_ds.cost.scenario import UNSUPERVISED, Scenario, read_scenario, without_supervision
from uno_ds.cost.step_time import REACHED, assumptions, step_time
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
    time = _time(recipe, ranks, (pack, later), costs, options) if options.rate else None
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
            _print_parts(time)
            print("\n".join(f"  {sentence}" for sentence in time["assumptions"]))
            if time["computing_seconds_in_full"] is not None:
                print(
                    f"  computing takes {time['computing_seconds']:.3g} s of a step with adapters "
                    f"and would take {time['computing_seconds_in_full']:.3g} s with the whole "
                    "generation expert in training"
                )
            _print_scaling(time.get("scaling", []), pack, options.scaling)
    return 0


def _machine(recipe: Recipe, ranks: int, options: argparse.Namespace) -> tuple[str, Gpu, int]:
    """(name, GPU with its links, GPUs of a host) to model the time with: those of the recipe, or of
    --nodes, --link and --network. Raises SettingsError where neither says."""
    per_host = recipe.hardware.gpus_per_node
    if options.nodes is not None:
        if ranks % options.nodes:
            raise SettingsError(
                "--nodes", f"is {options.nodes}, which does not divide {ranks} rank(s)."
            )
        per_host = ranks // options.nodes
    name = recipe.hardware.gpu
    if name is None and options.link is None:
        raise SettingsError(
            "--rate",
            f"needs the links of a GPU: --set hardware.gpu=NAME, one of {', '.join(GPUS)}, or "
            "--link and --network.",
        )
    if name is None and options.network is None and ranks > per_host:
        raise SettingsError(
            "--network", f"is needed: {ranks} ranks are on {-(-ranks // per_host)} hosts."
        )
    sheet = GPUS[name] if name else Gpu(0, 0.0, 0.0, 0.0, 0)
    link = sheet.link if options.link is None else options.link * 1e9
    network = sheet.network if options.network is None else options.network * 1e9 / per_host
    return name or "device", dataclasses.replace(sheet, link=link, network=network), per_host


def _time(
    recipe: Recipe,
    ranks: int,
    packs: tuple[Scenario, Scenario],
    costs: Estimate,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Modelled time of a step, and of the run, whose later steps have the second of `packs`. Raises
    SettingsError without a GPU to plan for."""
    name, gpu, per_host = _machine(recipe, ranks, options)
    rate = options.rate * 1e12
    pack, pack_later = packs
    passes = flop_of(recipe, pack)
    sharding = sharding_of(recipe, ranks)
    flop = sharding.accumulation * passes.total
    flop_later = sharding.accumulation * flop_of(recipe, pack_later).total
    in_full = None
    if recipe.model.train == "lora":
        in_full = sharding.accumulation * flop_of(recipe, pack, adapters=False).total / rate
    found = step_time(flop, costs.traffic, gpu, ranks, per_host, rate, REACHED)
    later = step_time(flop_later, costs.traffic, gpu, ranks, per_host, rate, REACHED)
    supervised = found.gpu_hours(recipe.supervised_steps)
    rest = later.gpu_hours(recipe.steps - recipe.supervised_steps)
    links = Links(gpu.link, per_host * gpu.network, per_host, REACHED)
    parts = parts_of_step(
        parameters_of(recipe),
        sharding,
        recipe.model.recompute,
        passes,
        rate,
        links,
        overlaps_of(recipe),
    )
    seconds = sum(part.seconds for part in parts)
    given = options.link is not None or options.network is not None
    time = {
        "step_seconds": [found.hidden, found.exposed],
        "computing_seconds": found.computing,
        "computing_seconds_in_full": in_full,
        "sending_seconds": found.sending,
        "gpu_hours": [first + second for first, second in zip(supervised, rest, strict=True)],
        "steps": recipe.steps,
        "flop_of_a_rank": flop,
        "overlapped_seconds": seconds,
        "exposed_seconds": seconds - found.computing,
        "bound": bound_of(parts, links.ring(ranks)[1]),
        "parts": [{**asdict(part), "seconds": part.seconds} for part in parts],
        "assumptions": assumptions(
            name,
            gpu,
            per_host,
            rate,
            measured=False,
            reached=REACHED,
            links="as given" if given else "data sheets",
        ),
    }
    if options.scaling:
        capacity = gpu.memory or None
        points = scaling(recipe, pack, rate, links, capacity)
        draw_scaling(points, name, options.scaling)
        time["scaling"] = [asdict(point) for point in points]
    return time


def layouts_without_data(recipe: Recipe) -> list[str]:
    """Layouts of the sources, without opening them; `auto` counts as t2i."""
    return [
        source.path.removeprefix("scenes/")
        if source.path in EMBEDDED
        else planned_layout(source.layout)
        for source in recipe.data.sources
    ]


def _print_parts(time: dict[str, Any]) -> None:
    print(
        f"  with what DeepSpeed overlaps: {time['overlapped_seconds']:.3g} s, of which sending "
        f"adds {time['exposed_seconds']:.3g} s; most of it is {time['bound']}"
    )
    for part in time["parts"]:
        sending = part["everywhere"] + part["within"]
        print(
            f"    {part['name']:<10} computing {part['computing']:>9.3g} s, sending "
            f"{sending:>9.3g} s{', overlapped' if part['overlaps'] else ''}"
        )


def _print_scaling(points: list[dict[str, Any]], pack: Scenario, png: Path | None) -> None:
    if not points:
        return
    print(
        f"\none pack of {pack.tokens:,} tokens a GPU and step, modelled\n"
        f"  {'configuration':<17}{'GPUs':>6}{'step s':>9}{'exposed s':>11}{'peak GB':>9}"
        f"{'GPU h / 1,000 packs':>21}  most is"
    )
    for point in points:
        print(
            f"  {point['configuration']:<17}{point['gpus']:>6,}{point['seconds']:>9.3g}"
            f"{point['exposed']:>11.3g}{point['peak'] / 1e9:>9.1f}{point['gpu_hours']:>21.3g}  "
            f"{point['bound']}"
        )
    print(f"picture: {png}")


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
        "samples, and optionally vit, clean, target, images (default: the fullest pack of the "
        "recipe)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TFLOPS",
        help="TFLOP/s that a GPU reaches in a step, as measured or assumed: also estimate how long "
        "a step and the run take",
    )
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="M",
        help="with --rate: hosts that the ranks are spread over (default: by "
        "hardware.gpus_per_node)",
    )
    parser.add_argument(
        "--network",
        type=float,
        metavar="GBS",
        help="with --rate: GB/s and direction of a host to the others, all of its cards together "
        "(default: the data sheet of hardware.gpu)",
    )
    parser.add_argument(
        "--link",
        type=float,
        metavar="GBS",
        help="with --rate: GB/s and direction of a GPU to the others of its host (default: the "
        "data sheet)",
    )
    parser.add_argument(
        "--scaling",
        type=Path,
        metavar="PNG",
        help="with --rate: also the step on 8 to 1,024 GPUs under ZeRO-1, 2, 3 and 3 with hpZ, as "
        "a table and a picture",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    options = parser.parse_args(arguments)
    check_ranks(parser, options.world_size)
    if options.rate is not None and not 0 < options.rate <= FASTEST:
        parser.error(f"--rate must be above 0 and at most {FASTEST:,}, got {options.rate}")
    for flag in ("nodes", "network", "link", "scaling"):
        if getattr(options, flag) is not None and options.rate is None:
            parser.error(f"--{flag} goes with --rate")
    if options.nodes is not None and options.nodes < 1:
        parser.error(f"--nodes must be at least 1, got {options.nodes}")
    for flag in ("network", "link"):
        value = getattr(options, flag)
        if value is not None and not 0 < value <= FASTEST:
            parser.error(f"--{flag} must be above 0 and at most {FASTEST:,}, got {value}")
    return options
