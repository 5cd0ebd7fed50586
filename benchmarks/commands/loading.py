"""Host memory that each rank needs to load a base under ZeRO-3 and to write a checkpoint, and that
one process needs to export it.

    python -m benchmarks loading [--ranks 4] [--layers 4] [--precision fp32] [--folder DIR]
        [--json FILE]

A synthetic base with BAGEL's names and few wide layers is written, loaded by ranks on the CPU
(gloo), saved as a checkpoint and exported. Growth is that of the resident set since the start of a
phase: at its peak, and at its end."""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.command_line import Parser
from benchmarks.suite.models import DTYPES
from benchmarks.suite.ranks import start_ranks
from benchmarks.suite.results import ResultFile
from uno_ds.model.architecture import Architecture, write_architecture
from uno_ds.model.weights import meta_tensors, weight_files, write_weights
from uno_ds.recipe import Recipe, packaged
from uno_ds.settings import build
from uno_ds.training.shards import is_zero3

SPARE = 600_000_000
EMA = 0.999
MEGA = 1e6
RANK_PHASES = ("load", "engine_and_average", "save")


def wide_shape(layers: int) -> Architecture:
    return build(
        Architecture,
        {
            "hidden": 1024,
            "layers": layers,
            "heads": 8,
            "kv_heads": 4,
            "mlp": 16384,
            "vocabulary": 32768,
            "vit_hidden": 64,
            "vit_layers": 1,
            "vit_heads": 2,
            "vit_mlp": 128,
            "vit_patch": 8,
            "vit_side": 8,
            "codec": "pixel",
            "codec_downsample": 2,
            "latent_channels": 12,
            "latent_patch": 2,
            "latent_side": 8,
        },
    )


def wide_recipe(folder: Path, ranks: int, precision: str) -> Recipe:
    images = {"max_side": 32, "min_side": 16, "max_pixels": 1024}
    return build(
        Recipe,
        {
            "name": "loading",
            "output": str(folder / "runs"),
            "steps": 1,
            "model": {"base": str(folder / "base")},
            "sequence": {"token_budget": 4096, "metaquery_grid": 2},
            "data": {
                "sources": [{"path": "scenes/t2i"}],
                "latent_image": images,
                "vit_image": images,
            },
            "optimizer": {"ema": EMA},
            "engine": {"deepspeed": "zero3", "precision": precision, "packs_per_step": ranks},
        },
    )


def write_base(folder: Path, shape: Architecture, dtype: torch.dtype) -> int:
    """Writes the base, one tensor at a time; returns the bytes of its weights."""
    like, generator = meta_tensors(shape), torch.Generator().manual_seed(0)
    write_weights(
        folder,
        like,
        lambda name: torch.rand(like[name].shape, generator=generator) - 0.5,
        dtype,
    )
    write_architecture(shape, folder)
    for file in packaged("tiny_base").glob("tokenizer*"):
        shutil.copy(file, folder)
    return sum((folder / file).stat().st_size for file in weight_files(folder))


@contextmanager
def resident_growth(into: dict[str, Any], name: str) -> Iterator[None]:
    """Adds {NAME: {peak, after, seconds}} to `into`: bytes by which the resident set grew, as the
    kernel counts them."""
    before, start = _status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    yield
    seconds = time.perf_counter() - start
    into[name] = {
        "peak": _status("VmHWM") - before,
        "after": _status("VmRSS") - before,
        "seconds": round(seconds, 2),
    }


def _status(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(field))
    return int(kibibytes) * 1024


def run_rank(folder: Path, ranks: int, precision: str) -> None:
    """Measures one rank. DeepSpeed is imported in the ranks only."""
    from uno_ds.training.deepspeed_config import deepspeed_config
    from uno_ds.training.ema import Ema
    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group
    from uno_ds.training.saving import Saver
    from uno_ds.training.sharded_objective import build_objective

    device = start_process_group()
    found: dict[str, Any] = {}
    recipe = wide_recipe(folder, ranks, precision)
    config = deepspeed_config(recipe, ranks)
    with resident_growth(found, "load"):
        objective, _ = build_objective(
            recipe, recipe.kernels.resolved(), config, DTYPES[precision], device, read_answers=False
        )
    parameters = [p for p in objective.parameters() if is_zero3(p)]
    assert len(parameters) == len(list(objective.parameters()))
    found["shard_bytes"] = sum(p.ds_tensor.nbytes for p in parameters)
    found["whole_bytes"] = sum(p.ds_numel * p.element_size() for p in parameters)
    del objective
    with resident_growth(found, "engine_and_average"):
        engine = Engine(recipe, device, read_answers=False)
        ema = Ema(engine, EMA)
    with resident_growth(found, "save"):
        assert Saver(folder / "checkpoints", recipe.checkpoint, engine, ema).save(0, {}, {})
    (folder / f"rank{engine.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_export(folder: Path) -> None:
    from uno_ds.training.export import export_checkpoint

    found: dict[str, Any] = {}
    with resident_growth(found, "export"):
        export_checkpoint(folder / "checkpoints" / "latest", folder / "exported", average=True)
    (folder / "export.json").write_text(json.dumps(found))


def measure(folder: Path, options: argparse.Namespace, result: ResultFile) -> bool:
    """Adds the measurements; returns whether the bounds of memory hold."""
    shape = wide_shape(options.layers)
    size = write_base(folder / "base", shape, DTYPES[options.precision])
    shared = ["loading", "--precision", options.precision, "--folder", str(folder)]
    shared += ["--ranks", str(options.ranks)]
    start_ranks([*shared, "--phase", "rank"], options.ranks)
    start_ranks([*shared, "--phase", "export"], 1)
    files = [folder / f"rank{rank}.json" for rank in range(options.ranks)]
    ranks = [json.loads(file.read_text()) for file in files]
    export = json.loads((folder / "export.json").read_text())

    tensors = meta_tensors(shape)
    first_layer = [tensor for name, tensor in tensors.items() if name.startswith("layers.0.")]
    peaks = [rank["load"]["peak"] for rank in ranks]
    fits_shard = all(rank["load"]["peak"] <= rank["shard_bytes"] + SPARE for rank in ranks)
    holds = {
        "each rank's growth is at most its shard and 600 MB": fits_shard,
        "all ranks together grow by less than twice the checkpoint": sum(peaks) < 2 * size,
    }
    result.details.update(
        checkpoint_bytes=size,
        precision=f"{options.precision} file, {options.precision} engine",
        largest_tensor_values=max(tensor.numel() for tensor in tensors.values()),
        layer_values=sum(tensor.numel() for tensor in first_layer),
        load_peak_sum=sum(peaks),
        load_peak_sum_over_checkpoint=round(sum(peaks) / size, 3),
        holds=holds,
    )
    for number, rank in enumerate(ranks):
        result.add({"name": f"rank {number}", **rank})
    result.add({"name": "export", **export})
    return all(holds.values())


def print_result(result: ResultFile, ranks: int) -> None:
    details = result.details
    size = details["checkpoint_bytes"] / MEGA
    print(f"base: {size:.0f} MB, {details['precision']}, {ranks} ranks under ZeRO-3")
    for measurement in result.measurements:
        if "shard_bytes" not in measurement:
            continue
        print(f"{measurement['name']}: shard {measurement['shard_bytes'] / MEGA:.0f} MB")
        for phase in RANK_PHASES:
            growth = measurement[phase]
            print(
                f"  {phase}: peak {growth['peak'] / MEGA:.0f} MB, "
                f"after {growth['after'] / MEGA:.0f} MB, {growth['seconds']:.1f} s"
            )
    total = details["load_peak_sum"] / MEGA
    times = details["load_peak_sum_over_checkpoint"]
    print(f"load, all ranks: {total:.0f} MB = {times:.2f} x the checkpoint")
    export = result.measurements[-1]["export"]
    print(f"export, one process: peak {export['peak'] / MEGA:.0f} MB, {export['seconds']:.1f} s")
    for claim, true in details["holds"].items():
        print(f"{'holds' if true else 'DOES NOT HOLD'}: {claim}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.phase == "rank":
        run_rank(options.folder, options.ranks, options.precision)
        return 0
    if options.phase == "export":
        run_export(options.folder)
        return 0
    settings = {"ranks": options.ranks, "layers": options.layers}
    result = ResultFile(options.json, "loading", details={"settings": settings})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        holds = measure(Path(folder).resolve(), options, result)
    print_result(result, options.ranks)
    result.finish()
    return 0 if holds else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="loading", description="Measures host memory of loading and saving.")
    parser.add_argument("--ranks", type=int, default=4, help="ranks on this machine (default 4)")
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        help="decoder layers of 107 million parameters each (default 4: 2 GB in fp32)",
    )
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        default="fp32",
        help="of the file and of the engine (default fp32)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write, five times the checkpoint (default: a temporary folder)",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--phase", choices=("rank", "export"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)
