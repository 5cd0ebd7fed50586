"""Speed of writing and reading checkpoints, against plain writes and reads of as many bytes on the
same disk; how long training waits for a save; and the size of a checkpoint.

    python -m benchmarks checkpointing [--ranks 2] [--layers 1] [--repeats 3] [--folder DIR]
        [--json FILE]

Ranks on the CPU (gloo) under ZeRO-3 with fp32 masters, two moments and a moving average. Writes are
timed until the data is on the disk; files are dropped from the page cache before they are read.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands.loading import EMA, wide_recipe, wide_shape, write_base
from benchmarks.suite.command_line import Parser
from benchmarks.suite.ranks import start_ranks
from benchmarks.suite.results import ResultFile

CHUNK = 16 << 20
# What is timed, in order. Those of MOVES_BYTES move the checkpoint's bytes, the others are waits.
QUANTITIES = (
    "plain_write",
    "save",
    "save_blocked",
    "background_blocked",
    "background_until_written",
    "plain_read",
    "load",
)
MOVES_BYTES = ("plain_write", "save", "plain_read", "load")


def plain_write(path: Path, size: int) -> None:
    content = torch.randint(0, 255, (CHUNK,), dtype=torch.uint8).numpy().data
    with path.open("wb", buffering=0) as stream:
        while size > 0:
            size -= stream.write(content[:size])
        os.fsync(stream.fileno())


def plain_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds until all ranks have finished `work`."""
    torch.distributed.barrier()
    begun = time.perf_counter()
    work()
    torch.distributed.barrier()
    return time.perf_counter() - begun


def run_rank(folder: Path, ranks: int, repeats: int) -> None:
    """Measures one rank. DeepSpeed is imported in the ranks only."""
    from uno_ds.training import checkpoint
    from uno_ds.training.checkpoint import CheckpointSettings
    from uno_ds.training.checkpoint_file import open_checkpoint, rank_file
    from uno_ds.training.ema import Ema
    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group
    from uno_ds.training.saving import Saver
    from uno_ds.training.shards import TrainedState

    engine = Engine(wide_recipe(folder, ranks, "fp32"), start_process_group(), read_answers=False)
    ema = Ema(engine, EMA)
    state = TrainedState(engine)
    # Moments exist after the first step only.
    state.begin_restore(1)
    state.end_restore()
    checkpoints = folder / "checkpoints"
    plain = folder / f"plain{engine.rank}"
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    manifest: dict[str, Any] = {}
    for number in range(repeats):
        saver = Saver(checkpoints, CheckpointSettings(keep_last=1), engine, ema)
        step = 2 * number
        found["save"].append(seconds_of(partial(saver.save, step, {}, {})))
        found["save_blocked"] += saver.blocked_seconds

        settings = CheckpointSettings(keep_last=1, asynchronous=True)
        background = Saver(checkpoints, settings, engine, ema)
        # The first save allocates the buffer on the host.
        background.save(step + 1, {}, {})
        background.settle()
        begun = time.perf_counter()
        background.save(step + 1, {}, {})
        while not background.ready:
            time.sleep(0.01)
        found["background_until_written"].append(time.perf_counter() - begun)
        background.settle()
        found["background_blocked"].append(background.blocked_seconds[-1])

        latest, manifest = open_checkpoint(checkpoints / "latest", "latest")
        own = latest / rank_file(engine.rank)
        size = own.stat().st_size
        found["plain_write"].append(seconds_of(partial(plain_write, plain, size)))
        drop_from_cache(plain)
        drop_from_cache(own)
        found["plain_read"].append(seconds_of(partial(plain_read, plain)))
        load = partial(checkpoint.load, latest, manifest, engine, ema)
        found["load"].append(seconds_of(load))
    if engine.rank == 0:
        checkpoint_bytes = sum(record["bytes"] for record in manifest["files"].values())
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in state.parameters.values())
        content = {"seconds": found, "bytes": checkpoint_bytes, "trainable": trainable}
        (folder / "found.json").write_text(json.dumps(content))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(folder: Path, options: argparse.Namespace, result: ResultFile) -> None:
    write_base(folder / "base", wide_shape(options.layers), torch.float32)
    arguments = ["checkpointing", "--ranks", str(options.ranks), "--repeats", str(options.repeats)]
    arguments += ["--folder", str(folder), "--phase", "rank"]
    start_ranks(arguments, options.ranks)
    found = json.loads((folder / "found.json").read_text())
    size = found["bytes"]
    state_bytes = 16 * found["trainable"]
    result.details.update(
        checkpoint_bytes=size,
        state_bytes=state_bytes,
        checkpoint_over_state=round(size / state_bytes, 4),
    )
    for name in QUANTITIES:
        seconds = found["seconds"][name]
        median = round(statistics.median(seconds), 3)
        rate = round(size / median / 1e6) if name in MOVES_BYTES else None
        result.add(
            {
                "name": name,
                "seconds": [round(value, 3) for value in seconds],
                "median_seconds": median,
                "megabytes_per_second": rate,
            }
        )


def print_result(result: ResultFile) -> None:
    size = result.details["checkpoint_bytes"] / 1e6
    times = result.details["checkpoint_over_state"]
    seconds = {entry["name"]: entry["median_seconds"] for entry in result.measurements}
    speed = {entry["name"]: entry["megabytes_per_second"] for entry in result.measurements}
    print(f"checkpoint {size:.0f} MB = {times:.3f} x the trained state (16 bytes a parameter)")
    print(f"plain write {speed['plain_write']} MB/s, save {speed['save']} MB/s")
    print(f"plain read {speed['plain_read']} MB/s, load {speed['load']} MB/s")
    print(
        f"training waits {seconds['save_blocked']:.2f} s for a save, "
        f"{seconds['background_blocked']:.2f} s for one in the background "
        f"(written after {seconds['background_until_written']:.2f} s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.phase:
        run_rank(options.folder, options.ranks, options.repeats)
        return 0
    settings = {"ranks": options.ranks, "layers": options.layers, "repeats": options.repeats}
    result = ResultFile(options.json, "checkpointing", details={"settings": settings})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder).resolve(), options, result)
    print_result(result)
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="checkpointing", description="Measures speed and size of checkpoints.")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    parser.add_argument(
        "--layers",
        type=int,
        default=1,
        help="decoder layers with 54 million trained parameters each (default 1)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeats; medians are reported (default 3)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write: the disk that is measured (default: a temporary folder)",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--phase", choices=("rank",), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)
