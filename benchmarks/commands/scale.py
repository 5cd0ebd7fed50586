"""What ZeRO sends on 1, 2 and 4 ranks against the model, and the modelled step time on 8 to 1,024 GPUs.

    python -m benchmarks scale [--recipe tiny] [--ranks 1,2,4] [--json FILE]
    python -m benchmarks scale --ranks "" --model bagel_7b_uno --gpu H200-141GB --rate TFLOPS [--json FILE]

Ranks are processes on the CPU of this machine and share its cores: what they send is compared, not how long they take.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands.overhead import SHARED_CORES
from benchmarks.commands.sweep import SMALL
from benchmarks.suite.packs import SCENARIOS, drawn_samples, settled
from benchmarks.suite.results import new_result, write_result
from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import one_line_errors
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Sharding
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.step_flops import step_flops, total
from uno_ds.cost.step_time import REACHED, assumptions, step_time
from uno_ds.cost.traffic import gathered, traffic
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import work_of
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.settings import to_plain

MODELLED = (8, 64, 512, 1024)
PATIENCE = 4
STEADY = 3  # DeepSpeed records the order of modules in the first step and prefetches by it from the second on


ROOT = Path(__file__).resolve().parents[2]


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        return count_as_rank(options)
    return run(options)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, absent=[])
    plain = to_plain(recipe)
    plain.pop("architecture")
    result = new_result("scale", plain)
    result["unknown"] += [
        SHARED_CORES,
        "Bytes are counted where DeepSpeed asks for a collective; what a network adds to them was not measured.",
    ]
    one_turn = 0.0
    for ranks in options.ranks:
        # Ranks beyond the cores take turns. What one turn has taken here can only make a limit longer.
        turns = max(1.0, ranks / len(os.sched_getaffinity(0)))
        limit, began = turns * max(options.seconds, PATIENCE * one_turn), time.monotonic()
        entry = {
            "name": f"{recipe.name} on {ranks} rank(s)",
            "ranks": ranks,
            "measured": True,
            "skipped": None,
            **predicted_volume(recipe, ranks),
        }
        try:
            entry["counted"] = start_ranks(options, ranks, limit)
            one_turn = max(one_turn, (time.monotonic() - began) / turns)
            entry["equal"] = all(answer == entry["predicted"] for answer in entry["counted"])
            first = entry["counted"][0]
            print(
                f"{ranks} rank(s): elements gathered {first['gather']:,}, reduced {first['reduce']:,}; the model says "
                f"{entry['predicted']['gather']:,} and {entry['predicted']['reduce']:,}; a rank sends {entry['bytes_sent'] / 1e6:.2f} MB in a step",
                flush=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            entry["skipped"] = f"{type(error).__name__}: {error}"
            print(f"{ranks} rank(s): {entry['skipped']}")
        result["measurements"].append(entry)
        if options.json:
            write_result(options.json, result)
    if options.rate:
        result["measurements"] += modelled(options)
    else:
        result["unknown"].append("No rate was given (--rate), so no time on GPUs is modelled.")
    if options.json:
        write_result(options.json, result, complete=True)
        print(f"written: {options.json}")
    return 0


def predicted_volume(recipe: Recipe, ranks: int) -> dict[str, Any]:
    recipe = _on(recipe, ranks)
    parameters, sharding = (
        parameters_of(recipe),
        Sharding.of(recipe, ranks, recipe.engine.resolved_precision()),
    )
    kept_whole = sum(sharding.shard(p.numel) * ranks for p in parameters if sharding.persistent(p))
    # One rank copies where more would gather, but still passes its gradients through a reduction of one.
    elements = {
        "gather": sum(gathered(parameters, sharding, recipe.model.recompute)) + kept_whole
        if ranks > 1
        else 0,
        "reduce": sum(sharding.shard(p.numel) * ranks for p in parameters if p.trainable),
    }
    return {
        "predicted": elements,
        "bytes_sent": traffic(parameters, sharding, recipe.model.recompute).total,
    }


def modelled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time and GPU hours of `--model` on 8 to 1,024 GPUs of a kind at `--rate`."""
    base, gpu, entries = load_recipe(options.model, absent=[]), GPUS[options.gpu], []
    pack = SCENARIOS[options.scenario]
    shape, per_node = base.architecture, base.hardware.gpus_per_node
    flop = total(
        step_flops(
            shape,
            work_of(
                shape,
                dataclasses.replace(
                    pack, target=min(shape.vit_side**2, round(pack.latents * 1.306))
                ),
            ),
            plan_of(base, read_answers=False),
        )
    ).total
    for gpus in MODELLED:
        recipe = _on(base, gpus)
        sharding = Sharding.of(recipe, gpus, "bf16")
        found = step_time(
            flop,
            traffic(parameters_of(recipe), sharding, recipe.model.recompute),
            gpu,
            gpus,
            per_node,
            options.rate * 1e12,
            REACHED,
        )
        told = assumptions(
            options.gpu, gpu, per_node, options.rate * 1e12, options.rate_is_measured, REACHED
        )
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
                "gpu_hours": list(found.gpu_hours(base.steps)),
                "assumptions": told,
            }
        )
        print(
            f"{gpus:>5} {options.gpu}: modelled {found.hidden:.3g} to {found.exposed:.3g} s a step, {found.gpu_hours(base.steps)[0]:,.0f} to "
            f"{found.gpu_hours(base.steps)[1]:,.0f} GPU hours for {base.steps:,} steps"
        )
    print("\n".join(f"  {sentence}" for sentence in told))
    return entries


def start_ranks(options: argparse.Namespace, ranks: int, limit: float) -> list[dict[str, int]]:
    """What each rank counted. Raises TimeoutExpired after `limit` seconds, with all ranks ended."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.commands.scale",
            "--recipe",
            options.recipe,
            "--worker",
            folder,
        ]
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + limit
        try:
            for process in processes:
                if process.wait(max(0.0, deadline - time.monotonic())):
                    raise subprocess.SubprocessError(f"a rank ended with code {process.returncode}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def count_as_rank(options: argparse.Namespace) -> int:
    """One rank: steps on a drawn pack, and in the last one counts the elements of DeepSpeed's gathers and reductions."""
    import torch.distributed as dist

    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group

    device = start_process_group()
    recipe = settled(_on(load_recipe(options.recipe, absent=[]), dist.get_world_size()), SMALL)
    engine = Engine(recipe, device, read_answers=False)
    batch = recipe.collator(recipe.layout(None).tokens)(
        drawn_samples(recipe, SMALL, seed=dist.get_rank())
    )
    for _ in range(STEADY - 1):
        engine.train_step([batch], 0.0)
    with counted_elements() as moved:
        engine.train_step([batch], 0.0)
    (options.worker / f"{dist.get_rank()}.json").write_text(json.dumps(moved))
    dist.barrier()
    dist.destroy_process_group()
    return 0


@contextmanager
def counted_elements() -> Iterator[dict[str, int]]:
    """{"gather", "reduce": elements of the whole tensors} of the collectives that DeepSpeed asks for within it."""
    from deepspeed.comm import comm

    moved, backend = {"gather": 0, "reduce": 0}, comm.cdb
    originals = {"all_gather_function": ("gather", 0), "reduce_scatter_function": ("reduce", 1)}
    before = {name: getattr(backend, name) for name in originals}

    def counting(name: str, kind: str, place: int) -> Callable:
        def call(*tensors: Any, **options: Any) -> Any:
            whole = [value for value in (*tensors, *options.values()) if hasattr(value, "numel")][
                place
            ]
            moved[kind] += whole.numel()
            return before[name](*tensors, **options)

        return call

    for name, (kind, place) in originals.items():
        setattr(backend, name, counting(name, kind, place))
    try:
        yield moved
    finally:
        for name, function in before.items():
            setattr(backend, name, function)


def _on(recipe: Recipe, ranks: int) -> Recipe:
    """One pack per rank, and metaqueries as the drawn packs have them."""
    grid = (
        int(np.sqrt(SMALL.metaqueries))
        if recipe.architecture.codec == "pixel"
        else recipe.sequence.metaquery_grid
    )
    return dataclasses.replace(
        recipe,
        engine=dataclasses.replace(recipe.engine, packs_per_step=ranks),
        sequence=dataclasses.replace(recipe.sequence, metaquery_grid=grid),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="scale.py",
        description="What ZeRO sends on this machine's ranks against the model, and the modelled time on many GPUs.",
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
        help="limit for as many ranks as there are cores; longer for more, and where the first ones were slow (default 150)",
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
    if not all(
        part.isascii() and part.isdigit() and int(part)
        for part in options.ranks.split(",")
        if options.ranks
    ):
        parser.error("--ranks are numbers separated by commas")
    options.ranks = [int(part) for part in options.ranks.split(",")] if options.ranks else []
    if options.rate is not None and not 0 < options.rate < float("inf"):
        parser.error("--rate is above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
