"""The modelled time of a step against measured ones, of ranks on this machine whose links have a
given rate.

    python -m benchmarks step_time [--ranks 1,2,3] [--network 100,1000] [--json FILE]

Each rank is a host of its own (a network namespace), which sends at most so many Mbit/s; that needs
root and iproute2. The rate of computing is that of one rank alone, shared where there are more
ranks than cores.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands.scale import with_one_pack_per_rank
from benchmarks.suite.command_line import Parser
from benchmarks.suite.limits import SHARED_CORES
from benchmarks.suite.namespaces import Hosts
from benchmarks.suite.packs import drawn_samples, settled
from benchmarks.suite.ranks import start_ranks
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import TINY_SCENARIO
from uno_ds.cost.fit import sharding_of
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scaling import Links, bound_of, overlaps_of, parts_of_step
from uno_ds.cost.step_flops import Passes, step_flops, total
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work
from uno_ds.recipe import Recipe, load_recipe

# DeepSpeed records the order of modules in the first step and prefetches by it from the second on.
WARM_UP, TIMED = 3, 7
# Of a full Ethernet frame of 1,514 bytes, 1,448 are the payload of TCP.
PAYLOAD = 1448 / 1514
SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        return time_as_rank(options)
    result = ResultFile(options.json, "step time", load_recipe(options.recipe, absent=[]))
    result.unknown.append(SHARED_CORES)
    print(
        f"{'configuration':<15}{'ranks':>6}{'Mbit/s':>9}{'measured s':>12}{'modelled s':>12}"
        f"{'error':>8}{'no overlap':>12}{'error':>8}  most is"
    )
    for configuration in options.configurations:
        alone = measured_seconds(options.recipe, configuration, 1, None)
        for megabits in options.network:
            for ranks in options.ranks:
                entry = compare(options.recipe, configuration, ranks, megabits, alone)
                result.add(entry)
                print(_row(entry), flush=True)
    result.finish()
    return 0


def compare(
    name: str, configuration: str, ranks: int, megabits: float, alone: float
) -> dict[str, Any]:
    """`alone`: seconds of a step of one rank."""
    seconds = alone if ranks == 1 else measured_seconds(name, configuration, ranks, megabits)
    recipe = _recipe(name, configuration, ranks)
    flop = _flop(recipe)
    share = max(1.0, ranks / len(os.sched_getaffinity(0)))
    rate = flop.total / (alone * share)
    bandwidth = megabits * 1e6 / 8
    # Every rank is a host of its own.
    links = Links(bandwidth, bandwidth, 1, PAYLOAD)
    # gloo, which joins CPU ranks, does a reduce-scatter by an all-reduce.
    sharding = dataclasses.replace(sharding_of(recipe, ranks), scatters=False)
    modelled = []
    for overlaps in (overlaps_of(recipe), False):
        parts = parts_of_step(
            parameters_of(recipe),
            sharding,
            recipe.model.recompute,
            flop,
            rate,
            links,
            overlaps,
        )
        modelled.append(sum(part.seconds for part in parts))
    return {
        "name": f"{configuration} on {ranks} rank(s) at {megabits:g} Mbit/s",
        "configuration": configuration,
        "ranks": ranks,
        "megabits": megabits,
        "skipped": None,
        "measured_seconds": seconds,
        "modelled_seconds": modelled[0],
        "modelled_without_overlap": modelled[1],
        "error": modelled[0] / seconds - 1,
        "error_without_overlap": modelled[1] / seconds - 1,
        "bound": bound_of(parts, links.ring(ranks)[1]),
    }


def _row(entry: dict[str, Any]) -> str:
    return (
        f"{entry['configuration']:<15}{entry['ranks']:>6}{entry['megabits']:>9g}"
        f"{entry['measured_seconds']:>12.3f}{entry['modelled_seconds']:>12.3f}"
        f"{entry['error']:>8.0%}{entry['modelled_without_overlap']:>12.3f}"
        f"{entry['error_without_overlap']:>8.0%}  {entry['bound']}"
    )


def measured_seconds(recipe: str, configuration: str, ranks: int, megabits: float | None) -> float:
    """The median step of rank 0. `megabits`: what each rank sends at most in a second; None: they
    are on one host. Raises RanksFailed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["step_time", "--recipe", recipe, "--configurations", configuration]
        arguments += ["--worker", folder]
        if megabits is None:
            start_ranks(arguments, ranks, SECONDS)
        else:
            with Hosts(ranks, megabits) as hosts:
                start_ranks(arguments, ranks, SECONDS, hosts.place)
        seconds: list[float] = json.loads((Path(folder) / "seconds.json").read_text())
    return statistics.median(seconds)


def time_as_rank(options: argparse.Namespace) -> int:
    """One rank: steps on a drawn pack, at a learning rate of 0."""
    import torch.distributed as dist

    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group

    device = start_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    recipe = settled(_recipe(options.recipe, options.configurations[0], ranks), TINY_SCENARIO)
    engine = Engine(recipe, device, read_answers=False)
    collate = recipe.collator(recipe.composer(None).tokens)
    batch = collate(drawn_samples(recipe, TINY_SCENARIO, seed=0))
    seconds = []
    for _ in range(WARM_UP + TIMED):
        dist.barrier()
        started = time.perf_counter()
        engine.train_step([batch], 0.0)
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        (options.worker / "seconds.json").write_text(json.dumps(seconds[WARM_UP:]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _recipe(name: str, configuration: str, ranks: int) -> Recipe:
    recipe = with_one_pack_per_rank(load_recipe(name, absent=[]), ranks)
    engine = dataclasses.replace(recipe.engine, deepspeed=configuration)
    return dataclasses.replace(recipe, engine=engine)


def _flop(recipe: Recipe) -> Passes:
    """Of the pack that every rank trains on."""
    small = settled(recipe, TINY_SCENARIO)
    batch = small.collator(small.composer(None).tokens)(drawn_samples(small, TINY_SCENARIO, seed=0))
    return total(step_flops(small.architecture, Work.of(batch), plan_of(small, False)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="step_time", description="The modelled time of a step against measured ones."
    )
    parser.add_argument("--recipe", default="tiny", metavar="NAME_OR_FILE", help="default tiny")
    parser.add_argument("--ranks", default="1,2,3", help="separated by commas (default 1,2,3)")
    parser.add_argument(
        "--network",
        default="100,1000",
        metavar="MBITS",
        help="Mbit/s that each rank sends, separated by commas (default 100,1000)",
    )
    parser.add_argument(
        "--configurations",
        default="zero1,zero2,zero3",
        help="of DeepSpeed, separated by commas (default zero1,zero2,zero3)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.ranks = [int(number) for number in options.ranks.split(",")]
        options.network = [float(number) for number in options.network.split(",")]
    except ValueError:
        parser.error("--ranks and --network are numbers separated by commas")
    if min(options.ranks) < 1 or not 0 < min(options.network) <= max(options.network) < 1e6:
        parser.error("--ranks are at least 1, and --network is above 0 and below 1,000,000")
    options.configurations = options.configurations.split(",")
    return options
