"""Traffic of ZeRO on 1, 2 and 4 ranks against the model, and the modelled step time on 8 to 1,024
GPUs.

    python -m benchmarks scale [--recipe tiny] [--ranks 1,2,4] [--json FILE]
    python -m benchmarks scale --ranks "" --model bagel_7b_uno --gpu H200-141GB --rate TFLOPS

Ranks are processes on this machine's CPU and share its cores: their traffic is compared, their time
is not.
"""

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.suite.command_line import Parser
from benchmarks.suite.limits import SHARED_CORES
from benchmarks.suite.packs import drawn_samples, settled
from benchmarks.suite.ranks import RanksFailed, start_ranks
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import SCENARIOS, TINY_SCENARIO
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Sharding
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.step_time import REACHED, assumptions, step_time
from uno_ds.cost.traffic import gathered, traffic
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.recipe import Recipe, load_recipe

MODELLED = (8, 64, 512, 1024)
PATIENCE = 4
# DeepSpeed records the order of modules in the first step and prefetches by it from the second on.
STEADY = 3
# Patches of 14 pixels in the visual encoder for each latent of 16 pixels: (16 / 14)^2.
TARGETS_PER_LATENT = 1.306


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        return count_as_rank(options)
    recipe = load_recipe(options.recipe, absent=[])
    result = ResultFile(options.json, "scale", recipe)
    result.unknown.append(SHARED_CORES)
    result.unknown.append(
        "Bytes are counted where DeepSpeed calls a collective; the overhead of a network was not "
        "measured."
    )
    # Seconds of the slowest ranks so far, as if each had a core. It can only raise a limit.
    slowest = 0.0
    for ranks in options.ranks:
        # Ranks beyond the number of cores share them.
        share = max(1.0, ranks / len(os.sched_getaffinity(0)))
        limit = share * max(options.seconds, PATIENCE * slowest)
        began = time.monotonic()
        entry = measure(recipe, options.recipe, ranks, limit)
        if not entry["skipped"]:
            slowest = max(slowest, (time.monotonic() - began) / share)
        print_measurement(entry)
        result.add(entry)
    if options.rate:
        result.measurements.extend(modelled(options))
    else:
        result.unknown.append("No rate was given (--rate), so no time on GPUs is modelled.")
    result.finish()
    return 0


def measure(recipe: Recipe, name: str, ranks: int, limit: float) -> dict[str, Any]:
    """The traffic that so many ranks count, and the model's. A failure is noted in `skipped`."""
    entry = {
        "name": f"{recipe.name} on {ranks} rank(s)",
        "ranks": ranks,
        "measured": True,
        "skipped": None,
        **predicted_volume(recipe, ranks),
    }
    try:
        entry["counted"] = counted_traffic(name, ranks, limit)
    except (RanksFailed, OSError) as error:
        entry["skipped"] = f"{type(error).__name__}: {error}"
        return entry
    entry["equal"] = all(counts == entry["predicted"] for counts in entry["counted"])
    return entry


def print_measurement(entry: dict[str, Any]) -> None:
    if entry["skipped"]:
        print(f"{entry['ranks']} rank(s): {entry['skipped']}", flush=True)
        return
    counted = entry["counted"][0]
    predicted = entry["predicted"]
    print(
        f"{entry['ranks']} rank(s): elements gathered {counted['gather']:,}, reduced "
        f"{counted['reduce']:,}; by the model {predicted['gather']:,} and "
        f"{predicted['reduce']:,}; a rank sends {entry['bytes_sent'] / 1e6:.2f} MB in a step",
        flush=True,
    )


def predicted_volume(recipe: Recipe, ranks: int) -> dict[str, Any]:
    recipe = with_one_pack_per_rank(recipe, ranks)
    recompute = recipe.model.recompute
    parameters = parameters_of(recipe)
    sharding = Sharding.of(recipe, ranks, recipe.engine.resolved_precision())

    def padded(numel: int) -> int:
        return sharding.shard(numel) * ranks

    persistent = sum(padded(p.numel) for p in parameters if sharding.persistent(p))
    # One rank copies instead of gathering, but still passes its gradients through a reduction.
    gather = sum(gathered(parameters, sharding, recompute)) + persistent if ranks > 1 else 0
    reduce = sum(padded(p.numel) for p in parameters if p.trainable)
    return {
        "predicted": {"gather": gather, "reduce": reduce},
        "bytes_sent": traffic(parameters, sharding, recompute).total,
    }


def modelled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time and GPU hours of `--model` on 8 to 1,024 GPUs of a kind at `--rate`."""
    base = load_recipe(options.model, absent=[])
    gpu = GPUS[options.gpu]
    per_node = base.hardware.gpus_per_node
    rate = options.rate * 1e12
    flop = _flop_of_a_step(base, options.scenario)
    assumed = assumptions(options.gpu, gpu, per_node, rate, options.rate_is_measured, REACHED)
    entries = []
    for gpus in MODELLED:
        recipe = with_one_pack_per_rank(base, gpus)
        sharding = Sharding.of(recipe, gpus, "bf16")
        sent = traffic(parameters_of(recipe), sharding, recipe.model.recompute)
        found = step_time(flop, sent, gpu, gpus, per_node, rate, REACHED)
        low, high = found.gpu_hours(base.steps)
        entries.append(
            {
                "name": f"{base.name}, scenario {options.scenario}, {gpus} GPUs",
                "gpus": gpus,
                "gpu": options.gpu,
                "measured": False,
                "skipped": None,
                "step_seconds": [found.hidden, found.exposed],
                "computing_seconds": found.computing,
                "sending_seconds": found.sending,
                "steps": base.steps,
                "gpu_hours": [low, high],
                "assumptions": assumed,
            }
        )
        print(
            f"{gpus:>5} {options.gpu}: modelled {found.hidden:.3g} to {found.exposed:.3g} s a "
            "step, "
            f"{low:,.0f} to {high:,.0f} GPU hours for {base.steps:,} steps"
        )
    print("\n".join(f"  {sentence}" for sentence in assumed))
    return entries


def _flop_of_a_step(recipe: Recipe, scenario: str) -> float:
    """Of one GPU with one pack of the scenario."""
    shape = recipe.architecture
    pack = SCENARIOS[scenario]
    target = min(shape.vit_side**2, round(pack.latents * TARGETS_PER_LATENT))
    work = work_of(shape, dataclasses.replace(pack, target=target))
    return total(step_flops(shape, work, plan_of(recipe, read_answers=False))).total


def counted_traffic(recipe: str, ranks: int, limit: float) -> list[dict[str, int]]:
    """What each rank counted. Raises RanksFailed if the ranks fail or take longer than `limit`
    seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(["scale", "--recipe", recipe, "--worker", folder], ranks, limit)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]


def count_as_rank(options: argparse.Namespace) -> int:
    """One rank: steps on a drawn pack; in the last one it counts the elements of DeepSpeed's
    gathers and reductions."""
    import torch.distributed as dist

    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group

    device = start_process_group()
    rank = dist.get_rank()
    recipe = with_one_pack_per_rank(load_recipe(options.recipe, absent=[]), dist.get_world_size())
    recipe = settled(recipe, TINY_SCENARIO)
    engine = Engine(recipe, device, read_answers=False)
    collate = recipe.collator(recipe.composer(None).tokens)
    batch = collate(drawn_samples(recipe, TINY_SCENARIO, seed=rank))
    for _ in range(STEADY - 1):
        engine.train_step([batch], 0.0)
    with counted_elements() as moved:
        engine.train_step([batch], 0.0)
    (options.worker / f"{rank}.json").write_text(json.dumps(moved))
    dist.barrier()
    dist.destroy_process_group()
    return 0


@contextmanager
def counted_elements() -> Iterator[dict[str, int]]:
    """{"gather", "reduce": elements of the whole tensors} of the collectives that DeepSpeed calls
    within it."""
    from deepspeed.comm import comm

    moved = {"gather": 0, "reduce": 0}
    backend = comm.cdb
    # Collective: (what it counts as, the position of the whole tensor among its tensors).
    collectives = {"all_gather_function": ("gather", 0), "reduce_scatter_function": ("reduce", 1)}
    originals = {name: getattr(backend, name) for name in collectives}

    def counting(name: str, kind: str, place: int) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            given = (*arguments, *options.values())
            tensors = [value for value in given if hasattr(value, "numel")]
            moved[kind] += tensors[place].numel()
            return originals[name](*arguments, **options)

        return call

    for name, (kind, place) in collectives.items():
        setattr(backend, name, counting(name, kind, place))
    try:
        yield moved
    finally:
        for name, function in originals.items():
            setattr(backend, name, function)


def with_one_pack_per_rank(recipe: Recipe, ranks: int) -> Recipe:
    """One pack per rank, and the metaqueries of the drawn packs."""
    grid = recipe.sequence.metaquery_grid
    if recipe.architecture.codec == "pixel":
        grid = math.isqrt(TINY_SCENARIO.metaqueries)
    return dataclasses.replace(
        recipe,
        engine=dataclasses.replace(recipe.engine, packs_per_step=ranks),
        sequence=dataclasses.replace(recipe.sequence, metaquery_grid=grid),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="scale",
        description="Traffic of ZeRO against the model, and modelled time on many GPUs.",
    )
    parser.add_argument(
        "--recipe",
        default="tiny",
        metavar="NAME_OR_FILE",
        help="whose volume is counted (default tiny)",
    )
    parser.add_argument(
        "--ranks",
        default="1,2,4",
        help="numbers of ranks, separated by commas; empty: none (default 1,2,4)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=150,
        help="limit for as many ranks as there are cores; longer for more ranks, and if the first "
        "ones were slow (default 150)",
    )
    parser.add_argument(
        "--model",
        default="bagel_7b_uno",
        metavar="NAME_OR_FILE",
        help="recipe whose time is modelled (default bagel_7b_uno)",
    )
    parser.add_argument(
        "--scenario", default="A", choices=tuple(SCENARIOS), help="its packs (default A)"
    )
    parser.add_argument(
        "--gpu",
        default="H200-141GB",
        choices=tuple(GPUS),
        help="kind of GPU that is modelled (default H200-141GB)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TFLOPS",
        help="TFLOP/s that a GPU reaches in a step; without it no time is modelled",
    )
    parser.add_argument(
        "--rate-is-measured",
        action="store_true",
        help="the rate comes from a measurement on that kind of GPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    numbers = options.ranks.split(",") if options.ranks else []
    if not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        parser.error("--ranks are numbers separated by commas")
    options.ranks = [int(number) for number in numbers]
    if options.rate is not None and not 0 < options.rate < float("inf"):
        parser.error("--rate is above 0")
    return options
