"""How much host memory each rank needs to load a base under ZeRO-3, to write a checkpoint, and one process to export it.

    python -m benchmarks loading [--ranks 4] [--layers 4] [--precision fp32] [--folder DIR] [--json FILE]

A synthetic base with BAGEL's names and few wide layers is written, loaded by real ranks (gloo, CPU), saved as a
checkpoint and exported. Growth is of the resident set since before the phase: at its peak, and at its end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from uno_ds.model.architecture import Architecture, write_architecture
from uno_ds.model.weights import model_layout, weight_files, write_weights
from uno_ds.recipe import Recipe, packaged
from uno_ds.settings import build
from uno_ds.training.report import environment

SPARE = 600_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMA = 0.999


ROOT = Path(__file__).resolve().parents[2]


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
    layout, generator = model_layout(shape), torch.Generator().manual_seed(0)
    write_weights(
        folder,
        layout,
        lambda name: torch.rand(layout[name].shape, generator=generator) - 0.5,
        dtype,
    )
    write_architecture(shape, folder)
    for file in packaged("tiny_base").glob("tokenizer*"):
        shutil.copy(file, folder)
    return sum((folder / file).stat().st_size for file in weight_files(folder))


@contextmanager
def resident_growth(into: dict[str, Any], name: str) -> Iterator[None]:
    """Adds {NAME: {peak, after, seconds}} to `into`: bytes by which the resident set grew, by the kernel's own counters."""
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
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def run_rank(folder: Path, ranks: int, precision: str) -> None:
    """What one rank measures; DeepSpeed is imported in the ranks only."""
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
            recipe, config, DTYPES[precision], device, read_answers=False
        )
    found["shard_bytes"] = sum(parameter.ds_tensor.nbytes for parameter in objective.parameters())
    found["whole_bytes"] = sum(
        parameter.ds_numel * parameter.element_size() for parameter in objective.parameters()
    )
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
    (folder / "export.json").write_text(json.dumps(found["export"]))


def start_ranks(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.commands.loading",
        "--precision",
        options.precision,
        "--ranks",
        str(options.ranks),
        "--folder",
        str(folder),
        "--phase",
        "rank",
    ]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29731",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    processes = [
        subprocess.Popen(
            arguments, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(options.ranks)
    ]
    codes = [process.wait() for process in processes]
    assert not any(codes), codes
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    shape = wide_shape(options.layers)
    size = write_base(folder / "base", shape, DTYPES[options.precision])
    ranks = start_ranks(folder, options)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.commands.loading",
            "--folder",
            str(folder),
            "--phase",
            "export",
        ],
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    largest = max(tensor.numel() for tensor in model_layout(shape).values())
    layer = sum(
        tensor.numel()
        for name, tensor in model_layout(shape).items()
        if name.startswith("layers.0.")
    )
    peaks = [rank["load"]["peak"] for rank in ranks]
    holds = {
        "each rank's growth is at most its shard and 600 MB": all(
            rank["load"]["peak"] <= rank["shard_bytes"] + SPARE for rank in ranks
        ),
        "all ranks together grow by less than twice the checkpoint": sum(peaks) < 2 * size,
    }
    return {
        "checkpoint_bytes": size,
        "precision": f"{options.precision} file, {options.precision} engine",
        "largest_tensor_values": largest,
        "layer_values": layer,
        "ranks": ranks,
        "load_peak_sum": sum(peaks),
        "load_peak_sum_over_checkpoint": round(sum(peaks) / size, 3),
        "export": json.loads((folder / "export.json").read_text()),
        "holds": holds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    options = parser.parse_args(arguments)
    if options.phase == "rank":
        run_rank(options.folder, options.ranks, options.precision)
        return 0
    if options.phase == "export":
        run_export(options.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options)
    mega = 1e6
    print(
        f"base: {result['checkpoint_bytes'] / mega:.0f} MB, {result['precision']}, {options.ranks} ranks under ZeRO-3"
    )
    for number, rank in enumerate(result["ranks"]):
        phases = "  ".join(
            f"{name} peak {rank[name]['peak'] / mega:.0f} MB, after {rank[name]['after'] / mega:.0f} MB, {rank[name]['seconds']:.1f} s;"
            for name in ("load", "engine_and_average", "save")
        )
        print(f"rank {number}: shard {rank['shard_bytes'] / mega:.0f} MB;  {phases}")
    print(
        f"load, all ranks: {result['load_peak_sum'] / mega:.0f} MB = {result['load_peak_sum_over_checkpoint']:.2f} x the checkpoint"
    )
    print(
        f"export, one process: peak {result['export']['peak'] / mega:.0f} MB, {result['export']['seconds']:.1f} s"
    )
    for claim, true in result["holds"].items():
        print(f"{'holds' if true else 'DOES NOT HOLD'}: {claim}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    **environment(),
                    "settings": {"ranks": options.ranks, "layers": options.layers},
                    **result,
                },
                indent=1,
            )
            + "\n"
        )
    return 0 if all(result["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
